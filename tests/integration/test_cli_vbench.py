"""``swifti2v vbench`` with a tiny model, a suite of two prompts, and a stand-in for the repository."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

from swifti2v.evaluation.vbench import official
from swifti2v.evaluation.vbench.dimensions import DIMENSIONS
from swifti2v.media import probe_clip, read_metadata
from tests.helpers.command_line import error_line, frames_of, succeed, swifti2v
from tests.helpers.tiny import NUM_FRAMES, SIZE

ALL = list(DIMENSIONS)
SUITE = [
    {
        "prompt_en": prompt,
        "dimension": ["camera_motion"] if "pans" in prompt else ALL[:2] + ALL[3:],
        "image_type": "other",
        "image_name": "photo.png",
    }
    for prompt in ("a cat", "fog", "a camera pans left")
]


@pytest.fixture
def suite(tmp_path):
    """A suite's file; its photos are below ``images/1-1``."""
    (tmp_path / "images/1-1").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images/1-1/photo.png")
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(SUITE))
    return path


def generate(suite: Path, model: Path, output: Path, *more: object) -> Result:
    return swifti2v(
        "vbench", "generate", "--suite", suite, "--images", suite.parent / "images", "--ratio",
        "1-1", "--model", model, "-o", output, "--device", "cpu", *more,
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "videos").iterdir())


@pytest.mark.slow
def test_shards_make_the_whole_suite_and_a_second_run_makes_nothing(tmp_path, suite, model):
    output = tmp_path / "out"
    for shard in ("1/2", "2/2"):
        options = ("--no-camera", "--samples", 2, "--shard", shard)
        succeed(generate(suite, model, output, *options))
    assert names(output) == ["a cat-0.mp4", "a cat-1.mp4", "fog-0.mp4", "fog-1.mp4"]
    video = output / "videos/a cat-0.mp4"
    info = probe_clip(video)
    assert (info.num_frames, info.height, info.width, info.fps) == (NUM_FRAMES, SIZE, SIZE, 16)
    assert json.loads(read_metadata(video)["comment"])["prompt"] == "a cat"
    assert not np.array_equal(frames_of(video), frames_of(output / "videos/a cat-1.mp4"))
    record = json.loads((output / "generation.json").read_text())
    assert record["photo_fit"]["ratio"] == "1-1"
    assert (record["num_samples"], record["has_camera"]) == (2, False)

    times = {path: path.stat().st_mtime_ns for path in (output / "videos").iterdir()}
    (output / "videos/fog-1.mp4").unlink()
    result = succeed(generate(suite, model, output, "--no-camera", "--samples", 2))
    assert [line.split()[-1] for line in result.stderr.splitlines()[1:]] == ["there"] * 3 + ["made"]
    after = {path: path.stat().st_mtime_ns for path in (output / "videos").iterdir()}
    assert sum(times[path] != after[path] for path in times) == 1
    message = error_line(generate(suite, model, output, "--no-camera", "--seed", 3))
    assert "made with other settings: num_samples is 2 there and 1 now; seed is" in message
    del record["sampling_version"]  # as records were before
    (output / "generation.json").write_text(json.dumps(record))
    message = error_line(generate(suite, model, output, "--no-camera", "--samples", 2))
    assert "made with other settings: sampling_version is" in message
    levers = ("--set", "stage2.speed.residual=float32", "--set", "stage1.speed.linear=int8")
    message = error_line(generate(suite, model, output, "--no-camera", "--samples", 2, *levers))
    assert (
        "now; config.stage1.speed.linear is 'plain' there" in message
    )  # loaded so, and refused here


@pytest.mark.slow
def test_a_made_video_carries_its_settings_as_any_other(tmp_path, suite, model):
    output = tmp_path / "out"
    levers = ("--seed", 3, "--set", "stage2.segment_size=2")
    succeed(generate(suite, model, output, "--no-camera", *levers))
    video = output / "videos/fog-0.mp4"

    settings = json.loads(succeed(swifti2v("info", video, "--json")).stdout)
    assert (settings["command"], settings["prompt"], settings["seed"]) == ("generate", "fog", 3)
    assert settings["config"]["stage2"]["segment_size"] == 2
    photo = str(suite.parent / "images/1-1/photo.png")
    assert settings["image"]["path"] == photo

    succeed(swifti2v("generate", "--like", video, "-o", tmp_path / "again.mp4"))
    np.testing.assert_array_equal(frames_of(tmp_path / "again.mp4"), frames_of(video))

    measured = json.loads(succeed(swifti2v("evaluate", video, "--image", photo, "--json")).stdout)
    assert measured["segment_starts"] == [1, 9]
    assert measured["segments_source"] == "from the video's own settings"


def test_lite_measures_the_made_videos(tmp_path, suite, model):
    output = tmp_path / "out"
    succeed(generate(suite, model, output, "--no-camera"))
    arguments = (
        "vbench", "lite", output / "videos", "--suite", suite, "--images", tmp_path / "images",
        "--dimension", "temporal_flickering", "-o", tmp_path / "lite.json", "--ratio",
    )  # fmt: skip
    result = succeed(swifti2v(*arguments, "1-1"))
    name, value, *counts = result.stdout.splitlines()[1].split()
    assert (name, counts) == ("temporal_flickering", ["2", "2"])
    assert 0 < float(value) < 1
    values = json.loads((tmp_path / "lite.json").read_text())
    assert values["kind"] == "vbench-lite"
    assert values["generation"]["seed"] == 0
    assert set(values["dimensions"]["temporal_flickering"]["videos"]) == set(names(output))
    assert "do not belong in an official score" in error_line(
        swifti2v("vbench", "score", tmp_path / "lite.json", "--partial")
    )
    (tmp_path / "images/8-5").symlink_to(tmp_path / "images/1-1")
    assert "made with --ratio 1-1" in error_line(swifti2v(*arguments, "8-5"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--ratio", "16-9"), "use --ratio 1-1"),
        (("--samples", 6), "--samples is 6; VBench takes"),
        (("--shard", "3/2"), "shard '3/2'"),
        (("--images", "nowhere"), "must hold a folder for every ratio"),
        (("--suite", "nowhere.json"), "nowhere.json: No such file"),
        (("--set", "num_frames=18"), "num_frames 18 does not fit"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(tmp_path, suite, model, more, message):
    assert message in error_line(generate(suite, model, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_missing_and_wrong_photos_and_long_prompts_are_refused(tmp_path, suite, model):
    output = tmp_path / "out"
    entry = SUITE[0] | {"prompt_en": "a prompt of more than 24 bytes"}
    suite.write_text(json.dumps([entry]))
    assert "has 31 tokens, the limit is 24" in error_line(generate(suite, model, output))
    (tmp_path / "images/1-1/photo.png").rename(tmp_path / "photo.png")
    assert "1 of 1 photos are missing (photo.png)" in error_line(generate(suite, model, output))
    Image.new("RGB", (80, 60)).save(tmp_path / "images/1-1/photo.png")
    assert "is 80x60, not 1-1" in error_line(generate(suite, model, output))
    assert not output.exists()


STAND_IN = """
import json, pathlib, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
dimension, videos = options["--dimension"], pathlib.Path(options["--videos_path"])
suite = json.loads(pathlib.Path(options["--full_json_dir"]).read_text())
assert pathlib.Path("vbench2_beta_i2v/data/crop", options["--ratio"]).is_dir()
if dimension == "imaging_quality" and not pathlib.Path("repaired").exists():
    sys.exit("imaging_quality: out of memory")
entries = [entry for entry in suite if dimension in entry["dimension"]]
found = [videos / f"{entry['prompt_en']}-0.mp4" for entry in entries]
results = [{"video_path": str(path), "video_results": 0.5} for path in found if path.is_file()]
value = [0.5, {"static": 0.5}, results] if dimension == "camera_motion" else [0.5, results]
output = pathlib.Path(options["--output_path"])
output.mkdir(exist_ok=True)
(output / "results_now_full_info.json").write_text(json.dumps(entries))
(output / "results_now_eval_results.json").write_text(json.dumps({dimension: value}))
"""
"""Takes the arguments of VBench's ``evaluate_i2v.py`` and writes files like its own."""


@pytest.fixture
def installation(tmp_path, suite, monkeypatch):
    """A folder as ``install.sh`` leaves it, with a stand-in for the official code."""
    folder = tmp_path / "vbench"
    repository = folder / "VBench"
    (repository / "vbench2_beta_i2v/data/crop").mkdir(parents=True)
    (repository / "vbench2_beta_i2v/data/crop/1-1").symlink_to(tmp_path / "images/1-1")
    (repository / official.SUITE).write_text(suite.read_text())
    (repository / "evaluate_i2v.py").write_text(STAND_IN)
    (folder / "venv/bin").mkdir(parents=True)
    environment = json.dumps({"torch": "2", "torchvision": "0", "device": "a GPU"})
    python = folder / "venv/bin/python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && echo \'{environment}\' && exit\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", repository]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    monkeypatch.setattr(official, "COMMIT", head.stdout.strip())
    return folder


@pytest.mark.slow
def test_run_measures_a_dimension_at_a_time_and_continues(tmp_path, suite, model, installation):
    succeed(generate(suite, model, tmp_path / "out"))
    videos, results = tmp_path / "out/videos", tmp_path / "results"
    command = ("vbench", "run", videos, "--vbench", installation, "-o", results, "--ratio", "1-1")
    failed = swifti2v(*command)
    assert failed.exit_code == 1
    assert "VBench failed on imaging_quality (imaging_quality: out of memory)" in failed.stderr
    partial = succeed(swifti2v("vbench", "score", results, "--partial"))
    assert "Quality, PARTIAL: without imaging_quality: " in partial.stdout
    assert "1 dimensions are missing (imaging_quality)" in error_line(
        swifti2v("vbench", "score", results)
    )
    first = results / "i2v_subject_eval_results.json"
    before = first.stat().st_mtime_ns
    (installation / "VBench/repaired").touch()
    succeed(swifti2v(*command))
    assert first.stat().st_mtime_ns == before
    scores = json.loads(succeed(swifti2v("vbench", "score", results, "--json")).stdout)
    assert scores["is_partial"] is False
    assert scores["results"]["i2v_subject"] == {"value": 0.5, "num_videos": 2, "num_prompts": 2}
    assert scores["total"] == pytest.approx(
        (scores["quality"]["value"] + scores["i2v"]["value"]) / 2
    )
    record = json.loads((results / "run.json").read_text())
    assert record["environment"]["device"] == "a GPU"
    assert record["generation"]["photo_fit"]["ratio"] == "1-1"


def test_run_refuses_other_files_and_another_commit(tmp_path, installation, monkeypatch):
    videos = tmp_path / "videos"
    videos.mkdir()
    command = ("vbench", "run", videos, "--vbench", installation, "-o", tmp_path / "results")
    measured = (*command, "--ratio", "1-1", "--dimension")
    for prompt in ("a cat", "fog"):
        (videos / f"{prompt}-0.mp4").touch()
    (videos / "notes.txt").touch()
    assert "holds 1 other files (notes.txt)" in error_line(swifti2v(*measured, "i2v_subject"))
    assert "'sharpness' is unknown" in error_line(swifti2v(*measured, "sharpness"))
    assert "1 of 1 videos are missing" in error_line(swifti2v(*measured, "camera_motion"))
    monkeypatch.setattr(official, "COMMIT", "0" * 40)
    assert f"not {'0' * 40}" in error_line(swifti2v(*measured, "i2v_subject"))
    assert not (tmp_path / "results").exists()


def test_setup_says_what_comes_next(tmp_path):
    result = succeed(swifti2v("vbench", "setup", tmp_path / "vbench"))
    assert result.stdout.strip() == f"bash {tmp_path / 'vbench/install.sh'}"
    assert "non-commercial" in result.stderr
