"""``swifti2v data ... --ray`` on two nodes: the same as in one process, whatever dies."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from swifti2v.media import open_writer, read_clip
from swifti2v.training.cache.tensor_cache import TensorCache
from tests.helpers.command_line import error_line, succeed, swifti2v
from tests.helpers.ray_cluster import cluster

SIZE, NUM_FRAMES, NUM_CLIPS = 64, 17, 6
CONFIG = """
model: {model}
objective: {{ windows: {{ segment_sizes: [1, 2], context_sizes: [1] }} }}
run: {{ batch_size: 4, precision: float32 }}
phases:
  - steps: 6
    data: {{ manifests: [{{ path: {manifest} }}], rules: {{ buckets: [[9, 64, 64]] }} }}
"""
SMALL = ["--num-frames", NUM_FRAMES, "--height", SIZE, "--width", SIZE]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rows = []
    for number in range(NUM_CLIPS):
        frames = np.random.default_rng(number).integers(
            0, 256, (NUM_FRAMES + number, SIZE, SIZE, 3), np.uint8
        )
        path = tmp_path / f"{number}.mkv"
        with open_writer(path, height=SIZE, width=SIZE, fps=16, codec="ffv1") as writer:
            writer.write(frames)
        rows.append({"video": path.name, "prompt": f"clip {number}"})
    (tmp_path / "bad.mkv").write_bytes(b"no clip")
    listed = [json.dumps(row) for row in (*rows, {"video": "bad.mkv", "prompt": "bad"})]
    (tmp_path / "clips.jsonl").write_text("\n".join(listed))
    return tmp_path / "clips.jsonl"


def run(*words: object) -> str:
    return succeed(swifti2v("data", *words)).stdout


def entries(directory: Path, kind: str) -> dict[str, Any]:
    """Records and tensors of a cache by key."""
    fingerprint = json.loads((directory / kind / "fingerprint.json").read_text())
    cache, found = TensorCache(directory / kind, fingerprint), {}
    for path in (directory / kind).glob("*.index.jsonl"):
        for line in path.read_text().splitlines():
            for key in json.loads(line)["entries"]:
                assert key not in found  # none was made twice
                found[key] = cache.get(key)
    return found


def transitions(output: Path) -> dict[str, Any]:
    """Rows of the manifest, and records and frames of the clips."""
    clips = {path.name: read_clip(path).frames.tobytes() for path in output.glob("clips/*.mkv")}
    records = {path.name: path.read_text() for path in output.glob("clips/*.json")}
    return {"rows": (output / "manifest.jsonl").read_text(), **clips, **records}


def kill_an_actor(log: list[int]) -> None:
    """Kill the first actor that makes batches, as soon as it is there."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for process in psutil.process_iter(["cmdline"]):
            if "ray::MapWorker(MapBatches(_Maker)).submit" in " ".join(
                process.info["cmdline"] or []
            ):
                process.kill()
                log.append(process.pid)
                return
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Data, its own settings
def test_a_cluster_makes_what_one_process_makes(
    manifest: Path, model: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(model=model, manifest=manifest))
    cache = ("cache", "--config", config, "--set", "run.bad_samples=skip", "--json")
    made = ("transition", manifest, "--model", model, *SMALL, "--json")
    inspected = run("inspect", manifest, "--bucket", "9x64x64", "--json")
    here = json.loads(run(*cache, "--output-dir", tmp_path / "here"))
    run(*made, "--output-dir", tmp_path / "one", "--device", "cpu")
    with cluster(1, 1) as nodes:
        ray = ("--ray", nodes.address, "--cpus-per-actor", 1)
        killed: list[int] = []
        killer = threading.Thread(target=kill_an_actor, args=(killed,))
        killer.start()
        there = json.loads(run(*cache, "--output-dir", tmp_path / "there", *ray))
        killer.join()
        again = json.loads(run(*cache, "--output-dir", tmp_path / "there", *ray))
        run(*made, "--output-dir", tmp_path / "many", *ray)
        index = json.loads(run("index", manifest, *ray, "--json"))
        assert run(
            "inspect", manifest, "--bucket", "9x64x64", "--json", "--ray", nodes.address
        ) == (inspected)
    assert len(killed) == 1
    for key in ("prompts", "entries", "latent_bytes"):
        assert there[key] == here[key]
    assert (again["entries_made"], again["prompts_made"]) == (0, 0)
    for kind in ("prompts", "stage2"):
        own, others = (entries(tmp_path / name, kind) for name in ("there", "here"))
        assert own.keys() == others.keys()
        for key, entry in own.items():
            assert entry.record == others[key].record
            assert entry.tensors.keys() == others[key].tensors.keys()
            assert all(torch.equal(v, others[key].tensors[n]) for n, v in entry.tensors.items())
    assert transitions(tmp_path / "many") == transitions(tmp_path / "one")
    assert (index["read"], [reject["id"] for reject in index["rejects"]]) == (
        NUM_CLIPS,
        ["bad.mkv"],
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ray", "auto", "--shard", "1/2"), "leave out --shard 1/2"),
        (("--cpus-per-actor", 2), "--cpus-per-actor is for --ray"),
    ],
)
def test_options_that_contradict_a_cluster_are_refused(
    manifest: Path, options: tuple[object, ...], message: str
) -> None:
    assert message in error_line(swifti2v("data", "index", manifest, *options))
