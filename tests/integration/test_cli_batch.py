"""``swifti2v batch``: many clips in one process, on this machine or to a store."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
from typer.testing import Result

from swifti2v.batch.making import ClipMaker
from swifti2v.batch.results import ResultFolder
from swifti2v.batch.rows import Machine, read_rows
from swifti2v.cli.models_dir import models_environment
from swifti2v.cluster import Cluster
from swifti2v.models.loading.models_dir import VARIABLE
from swifti2v.storage import hash_file
from tests.helpers.command_line import (
    error_line,
    generate,
    save_clip,
    save_photo,
    succeed,
    swifti2v,
)
from tests.helpers.tiny import SIZE


@pytest.fixture
def manifest(model, photo, tmp_path):
    rows = [
        {"image": photo.name, "prompt": "zoom", "id": f"clip {seed}", "seed": seed}
        for seed in (7, 8)
    ]
    return write(tmp_path / "clips.jsonl", rows)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def batch(manifest: Path, model: Path, output: Path | str, *more: object) -> Result:
    return swifti2v("batch", manifest, "-o", output, "--set", f"model={model}", *more)


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def test_clips_are_those_of_generate(manifest, model, photo, tmp_path):
    result = succeed(batch(manifest, model, tmp_path / "out"))
    assert "2 of 2 clips finished, 0 failed" in result.stdout
    succeed(generate(model, photo, tmp_path / "alone.mp4"))
    assert hash_file(tmp_path / "out" / "clip 7.mp4") == hash_file(tmp_path / "alone.mp4")
    first, second = records(tmp_path / "out")
    assert (first["id"], first["status"], first["video"]) == ("clip 7", "completed", "clip 7.mp4")
    assert first["sha256"] == hash_file(tmp_path / "out" / "clip 7.mp4") != second["sha256"]
    assert first["num_bytes"] == (tmp_path / "out" / "clip 7.mp4").stat().st_size
    assert list((tmp_path / "out" / "work").glob("[!.]*")) == []


def test_a_second_run_makes_what_is_missing_alone(manifest, model, tmp_path):
    out = tmp_path / "out"
    assert "1 of 2 clips finished" in succeed(batch(manifest, model, out, "--limit", 1)).stdout
    first = (out / "clip 7.mp4").stat().st_mtime_ns
    succeed(batch(manifest, model, out))
    assert (out / "clip 7.mp4").stat().st_mtime_ns == first
    assert len(records(out)) == 2
    (out / "clip 8.mp4").unlink()
    result = succeed(batch(manifest, model, out, "--dry-run"))
    assert "2 clips, 1 are finished" in result.stderr
    assert not (out / "clip 8.mp4").exists()


def test_a_finished_clip_that_is_asked_for_otherwise_is_refused(manifest, model, photo, tmp_path):
    out = tmp_path / "out"
    succeed(batch(manifest, model, out))
    text = error_line(batch(manifest, model, out, "--set", "stage2.segment_size=1"))
    assert "clip clip 7" in text
    assert "segment_size" in text
    save_photo(photo, SIZE, SIZE * 2)
    assert "was made from another photo or clip" in error_line(batch(manifest, model, out))


def test_a_clip_that_fails_leaves_the_others_and_is_tried_again(model, photo, tmp_path):
    (tmp_path / "torn.png").write_bytes(photo.read_bytes()[:60])
    rows = [{"image": name, "prompt": "zoom", "seed": 7} for name in ("torn.png", photo.name)]
    manifest, out = write(tmp_path / "clips.jsonl", rows), tmp_path / "out"
    result = batch(manifest, model, out)
    assert result.exit_code == 1
    assert "1 of 2 clips finished, 1 failed" in result.stdout
    torn, whole = records(out)
    assert (torn["status"], whole["status"]) == ("failed", "completed")
    assert "torn.png" in torn["error"]
    (tmp_path / "torn.png").write_bytes(photo.read_bytes())
    succeed(batch(manifest, model, out))
    assert hash_file(out / "torn.mp4") != ""
    assert records(out)[0]["status"] == "completed"


def test_a_clip_of_the_users_is_refined(model, photo, tmp_path):
    save_clip(tmp_path / "motion.mkv", 9)
    row = {
        "image": photo.name,
        "prompt": "zoom",
        "motion": "motion.mkv",
        "id": "refined",
        "seed": 1,
    }
    succeed(batch(write(tmp_path / "clips.jsonl", [row]), model, tmp_path / "out"))
    assert records(tmp_path / "out")[0]["num_frames"] == 9


@pytest.mark.parametrize("kind", ["folder", "store"])
def test_a_stopped_clip_goes_on_where_it_was(kind, manifest, model, tmp_path):
    """The second maker has nothing of the first but the results' folder."""
    url = str(tmp_path / "out") if kind == "folder" else f"memory://{tmp_path.name}"
    row = read_rows(manifest, {"model": str(model)})[0]
    told = []

    def stop_after_two(_, num_done, num_segments):
        told.append((num_done, num_segments))
        if num_done == 2:
            raise KeyboardInterrupt

    results = ResultFolder(url)
    with results.open():
        with pytest.raises(KeyboardInterrupt):
            ClipMaker(results, Machine(), stop_after_two).make(row)
        assert results.find(row) is None
        record = ClipMaker(ResultFolder(url), Machine(), lambda *_: None).make(row, attempts=2)
        assert results.find(row) is not None
        whole = ResultFolder(str(tmp_path / "whole"))
        with whole.open():
            assert record.sha256 == ClipMaker(whole, Machine(), lambda *_: None).make(row).sha256
    assert told == [(0, 4), (1, 4), (2, 4)]
    assert (record.status, record.attempts) == ("completed", 2)
    assert record.seconds is not None
    assert record.seconds["stage1"] == 0  # it was kept


def test_photos_and_videos_may_be_in_a_store(manifest, model, photo, tmp_path):
    store = fsspec.filesystem("memory")
    store.pipe_file(f"/{tmp_path.name}/in/photo.png", photo.read_bytes())
    rows = [{"image": f"memory://{tmp_path.name}/in/photo.png", "prompt": "zoom", "seed": 7}]
    url = f"memory://{tmp_path.name}/out"
    succeed(batch(write(tmp_path / "clips.jsonl", rows), model, url))
    made = store.cat_file(f"/{tmp_path.name}/out/photo.mp4")
    record = json.loads(store.cat_file(f"/{tmp_path.name}/out/results.jsonl"))
    assert record["num_bytes"] == len(made)
    assert store.ls(f"/{tmp_path.name}/out/work", detail=False) == [
        f"/{tmp_path.name}/out/work/.writable"
    ]


def test_one_batch_at_a_time_uses_a_folder(manifest, model, tmp_path):
    with ResultFolder(str(tmp_path / "out")).open():
        assert "another batch writes to" in error_line(batch(manifest, model, tmp_path / "out"))


def test_a_folder_that_cannot_be_written_is_refused(manifest, model, photo):
    assert "cannot be written" in error_line(batch(manifest, model, photo))
    assert "cannot be reached" in error_line(batch(manifest, model, "nowhere://x"))


def test_generate_takes_several_photos(model, photo, tmp_path):
    other = save_photo(tmp_path / "other.png", SIZE, SIZE * 2)
    more = ["-p", "zoom", "--model", model, "--seed", 7, "-o", tmp_path / "out"]
    succeed(swifti2v("generate", photo, other, *more))
    succeed(generate(model, photo, tmp_path / "alone.mp4"))
    assert hash_file(tmp_path / "out" / "photo.mp4") == hash_file(tmp_path / "alone.mp4")
    assert (tmp_path / "out" / "other.mp4").is_file()
    for option in (("--work-dir", tmp_path / "work"), ("--context-parallel", "ulysses:2")):
        result = swifti2v("generate", photo, other, *more, *option)
        assert result.exit_code == 2
        assert f"{option[0]} goes with one photo" in result.stderr


def test_actors_on_other_machines_look_into_the_folder_of_files(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    for environment in ({}, {VARIABLE: str(tmp_path)}):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        cluster = Cluster(address="auto", cpus_per_actor=1, environment=models_environment())
        expected = {"env_vars": environment} if environment else None
        assert cluster.resources.get("runtime_env") == expected
