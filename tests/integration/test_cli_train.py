"""``swifti2v train nano`` at a tiny size: trains, continues, refuses."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.command_line import (
    error_line,
    generate,
    save_clip,
    save_photo,
    succeed,
    swifti2v,
)

SETTINGS: dict[str, Any] = {
    "num_frames": 9,
    "height": 64,
    "width": 64,
    "max_text_length": 40,
    "num_procedural_clips": 2,
    "text": {"width": 32, "num_layers": 1, "run": {"batch_size": 2}},
    "stage1": {
        "size": {"num_heads": 2, "num_layers": 2},
        "num_drawn_frames": {1: 1.0},
    },
    "stage2": {
        "size": {"num_heads": 2, "num_layers": 1},
        "run": {"batch_size": 2},
        "crop": 32,
        "redraw": {"num_clips": 1},
        "phases": [
            {"name": "clips", "steps": 2, "num_frames": {9: 1.0}},
            {"name": "transition", "steps": 2, "num_frames": {9: 1.0}, "mix": {"transition": 1.0}},
        ],
    },
}

PARTS = ("text", "stage1", "stage2")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


def train(config: Path, output: Path, *more: object) -> Any:
    return swifti2v("train", "nano", "--config", config, "--output-dir", output, *more)


@pytest.mark.slow
def test_it_trains_a_model_that_generates_and_continues(config, tmp_path):
    output = tmp_path / "out"
    result = succeed(train(config, output, "--steps", 1, "--device", "cpu"))
    assert result.stdout.strip() == str(output / "model")
    for part in PARTS:
        assert f"{part}: step 1, " in result.stderr
        assert "learning rate" in result.stderr
        assert (output / "training" / part / "metrics.jsonl").exists()
    photo = save_photo(tmp_path / "photo.png", 64, 64)
    succeed(generate(output / "model", photo, tmp_path / "video.mp4"))

    assert "not empty" in error_line(train(config, output, "--steps", 1))
    other = error_line(train(config, output, "--steps", 2, "--resume"))
    assert "made with other settings" in other
    assert all(f"{part}.phases.0.steps is 1 there and 2 now" in other for part in PARTS)
    again = succeed(train(config, output, "--steps", 1, "--resume"))
    assert again.stdout == result.stdout
    assert "step" not in again.stderr


@pytest.mark.slow
def test_it_trains_on_a_folder(config, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    save_clip(data / "clip.mkv", 9, 64, 64)
    save_photo(data / "photo.png", 100, 80)
    fps = ("--set", "fps=8")
    output = tmp_path / "out"
    succeed(train(config, output, "--steps", 1, "--device", "cpu", "--data", data, *fps))
    assert (output / "model" / "model_index.json").exists()
    again = ("--steps", 1, "--device", "cpu", "--data", data, *fps, "--resume")
    (data / "photo.png").rename(data / "other.png")
    changes = "1 sample gone (photo.png); 1 sample new (other.png)"
    assert f"has changed since its start: {changes}" in error_line(train(config, output, *again))
    allowed = succeed(train(config, output, *again, "--allow-changed-data"))
    assert f"continuing on changed data: {changes}" in allowed.stderr
    succeed(train(config, output, *again))
    (data / "clip.mkv").unlink()
    save_clip(data / "clip.mkv", 6, 64, 64)
    short = train(config, tmp_path / "short", "--steps", 1, "--data", data, *fps)
    assert "has 6 frames; at least one must have 9" in error_line(short)
    assert not (tmp_path / "short").exists()


def test_a_dry_run_prints_the_settings(config, tmp_path):
    output = tmp_path / "out"
    result = succeed(train(config, output, "--minutes", 10, "--set", "fps=24", "--dry-run"))
    values = yaml.safe_load(result.stdout)
    assert values["fps"] == 24
    assert values["stage2"]["phases"][0]["minutes"] == pytest.approx(2.5)
    assert values["stage2"]["phases"][0]["steps"] is None
    assert values["stage1"]["size"]["num_layers"] == 2
    assert not output.exists()


def test_the_shipped_configuration_is_complete():
    path = Path(__file__).parents[2] / "src/swifti2v/configs/nano.yaml"
    result = succeed(
        swifti2v("train", "nano", "--config", path, "--output-dir", "unused", "--dry-run")
    )
    assert yaml.safe_load(result.stdout)["stage2"]["crop"] == 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--minutes", 1, "--steps", 1), "give --minutes or --steps"),
        (("--set", "stage2.crop=100"), "crop is 100"),
        (("--set", "colour=1"), "colour"),
        (("--steps", 1, "--device", "abacus"), "device 'abacus' is unknown"),
        (("--data", "nowhere"), "data folder nowhere is not a folder"),
        (("--set", "held_out=[a]"), "held_out names a, but there is no data folder"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(config, tmp_path, options, message):
    output = tmp_path / "out"
    assert message in error_line(train(config, output, *options))
    assert not (output / "training").exists()


def test_lengths_that_no_clip_has_are_refused_before_any_work(config, tmp_path):
    phases = [{"name": "long", "steps": 1, "num_frames": {33: 1.0}}]
    config.write_text(yaml.safe_dump({**SETTINGS, "stage2": {"crop": 32, "phases": phases}}))
    output = tmp_path / "out"
    assert "the longest clip has 9 frames" in error_line(train(config, output))
    assert not (output / "training").exists()
