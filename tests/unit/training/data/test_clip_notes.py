"""Notes of a training on clips that are changed while they are read."""

import logging
from fractions import Fraction
from pathlib import Path

import pytest

from swifti2v.training.data.buckets import BucketRules
from swifti2v.training.data.clips import DataConfig, ManifestClips, ManifestConfig
from swifti2v.training.data.probes import Probes
from swifti2v.training.nano.material import read_material
from tests.helpers import foreign_clips

UNEVEN = (0, 33, 67, 100, 200, 233, 267, 300)
MS = Fraction(1, 1000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    foreign_clips.save(folder / "a.mkv", 8, rate=30, times=UNEVEN, tick=MS)
    foreign_clips.save(folder / "b.mkv", 8, sound_seconds=2)
    for name in "ab":
        (folder / f"{name}.txt").write_text("counting")
    return folder


def test_a_manifest_says_what_is_done_to_its_clips(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rules = BucketRules(buckets=((5, 64, 96),), fps=30)
    config = DataConfig(manifests=(ManifestConfig(path=str(folder)),), rules=rules)
    for _ in range(2):  # the second time from what was remembered
        caplog.clear()
        with Probes(tmp_path / "probes") as look:
            clips = ManifestClips(config, 1, 0, "stop", look)
        assert {name: placed.num_frames for name, placed in clips.placements.items()} == {
            "0:a.mkv": 10,
            "0:b.mkv": 15,
        }
        (line,) = [record.message for record in caplog.records]
        assert line.startswith("note: 1 x its frame rate varies (a.mkv), a.mkv: a frame is shown")


def test_every_piece_of_every_clip_can_be_read(folder: Path) -> None:
    rules = BucketRules(buckets=((10, 64, 96),), fps=30)
    config = DataConfig(manifests=(ManifestConfig(path=str(folder)),), rules=rules)
    clips = ManifestClips(config, 2, 0, "stop")
    assert [loaded.frames.shape for loaded in clips.examples(2)] == [(10, 64, 96, 3)] * 2


def test_a_folder_of_material_says_it_too(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    material = read_material(folder, height=32, width=48, fps=30)
    assert [len(clip) for clip in material.clips] == [10, 15]
    assert "a.mkv: its frame rate varies" in caplog.text
