"""``swifti2v batch --ray``: what machines lose, the batch does not."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swifti2v.cluster import count_places
from swifti2v.storage import hash_file
from tests.helpers.command_line import save_photo, succeed, swifti2v
from tests.helpers.ray_cluster import cluster, find_actors, kill

SETTINGS = ["num_frames=81", "width=160", "height=96", "stage2.segment_size=1"]
NUM_SEGMENTS = 20
WAIT_SECONDS = 120


@pytest.fixture
def manifest(tmp_path):
    save_photo(tmp_path / "photo.png", 160, 96)
    rows = [{"image": "photo.png", "prompt": "pan left", "id": f"clip{n}"} for n in range(4)]
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "clips.jsonl"


def command(manifest: Path, output: Path, *more: object) -> list[str]:
    settings = [part for text in SETTINGS for part in ("--set", text)]
    return [str(part) for part in ("batch", manifest, "-o", output, *settings, *more)]


def start(manifest: Path, output: Path, address: str) -> subprocess.Popen[bytes]:
    more = ("--ray", address, "--cpus-per-actor", 1)
    words = [sys.executable, "-m", "swifti2v", *command(manifest, output, *more)]
    return subprocess.Popen(words)


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.02)


def is_under_way(output: Path) -> bool:
    """Whether a clip has some segments and not all."""
    folders = output.glob("work/clip*/run")
    return any(3 <= len(list(folder.glob("segment_*"))) < NUM_SEGMENTS // 2 for folder in folders)


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_actor_node_and_driver_are_lost_and_the_videos_are_the_same(manifest, tmp_path):
    succeed(swifti2v(*command(manifest, tmp_path / "here")))
    out = tmp_path / "out"
    with cluster(1, 1) as nodes:
        driver = start(manifest, out, nodes.address)
        wait_for(lambda: is_under_way(out), "a clip under way")
        kill(find_actors()[0])
        wait_for(lambda: list(out.glob("records/*.json")), "a finished clip")
        wait_for(lambda: is_under_way(out), "another clip under way")
        driver.kill()
        driver.wait()
        num_left = 4 - len(list(out.glob("records/*.json")))
        assert num_left > 0
        wait_for(lambda: not find_actors(), "the end of the driver's actors")

        driver = start(manifest, out, nodes.address)
        wait_for(lambda: is_under_way(out), "a clip under way")
        nodes.remove_node(nodes.list_all_nodes()[1], allow_graceful=False)
        assert driver.wait(WAIT_SECONDS) == 0

    made = records(out)
    assert [record["sha256"] for record in made] == [
        r["sha256"] for r in records(tmp_path / "here")
    ]
    assert [hash_file(out / record["video"]) for record in made] == [r["sha256"] for r in made]
    assert not list(out.glob("work/clip*"))


def test_places_are_those_of_living_nodes_with_all_that_is_needed():
    nodes = [
        {"Alive": True, "Resources": {"CPU": 5.0, "memory": 100.0}},
        {"Alive": True, "Resources": {"CPU": 8.0, "memory": 10.0}},
        {"Alive": False, "Resources": {"CPU": 8.0, "memory": 100.0}},
        {"Alive": True, "Resources": {"GPU": 2.0, "memory": 100.0}},
    ]
    assert count_places(nodes, {"CPU": 2.0, "memory": 20.0}) == 2
    assert count_places(nodes, {"GPU": 1.0}) == 2
    assert count_places(nodes, {"GPU": 4.0}) == 0
