"""Settings of manifests at their far end: which clips the steps of a training draw."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from swifti2v.training.data.buckets import BucketRules
from swifti2v.training.data.clips import DataConfig, ManifestClips, ManifestConfig
from swifti2v.training.engine.draws import Draw
from tests.helpers.training_clips import save_counting_clip

RULES = BucketRules(buckets=((5, 32, 48),))
BATCH = 4
STEPS = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in "abcd":
        save_counting_clip(folder / "media" / f"{name}.mkv", 12)
    return folder


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps({"prompt": "x", **row}) + "\n" for row in rows))
    return path


def read(*manifests: ManifestConfig, **more: Any) -> ManifestClips:
    data = DataConfig(manifests=manifests, rules=RULES, **more)
    return ManifestClips(data, BATCH, 0, "stop")


def pieces(clips: ManifestClips, num_steps: int = STEPS) -> list[tuple[str, int]]:
    """Name and seed of all that is drawn."""
    indices = tuple(range(BATCH))
    return [
        (piece.name, piece.seed)
        for step in range(num_steps)
        for piece in clips.pieces(Draw(seed=0, step=step, batch_size=BATCH, indices=indices))
    ]


def shares(clips: ManifestClips) -> dict[str, float]:
    drawn = Counter(name for name, _ in pieces(clips))
    return {name: count / drawn.total() for name, count in drawn.items()}


def test_weights_of_rows_and_of_manifests_multiply(folder):
    first = write(folder / "first.jsonl", {"video": "a.mkv", "weight": 2}, {"video": "b.mkv"})
    second = write(folder / "second.jsonl", {"video": "c.mkv"})
    root = str(folder / "media")
    clips = read(
        ManifestConfig(path=str(first), root=root),
        ManifestConfig(path=str(second), root=root, weight=5.0),
    )
    assert shares(clips) == pytest.approx(
        {"0:a.mkv": 2 / 8, "0:b.mkv": 1 / 8, "1:c.mkv": 5 / 8}, abs=0.02
    )


def test_one_split_is_read(folder):
    rows = [
        {"video": f"{name}.mkv", "split": split} for name, split in zip("abcd", "xyxy", strict=True)
    ]
    path = write(folder / "splits.jsonl", *rows)
    own = ManifestConfig(path=str(path), root=str(folder / "media"), split="y")
    assert set(shares(read(own))) == {"0:b.mkv", "0:d.mkv"}


@pytest.mark.parametrize("num_pieces", [None, 3])
def test_so_many_pieces_are_taken_from_a_clip(folder, num_pieces):
    path = write(folder / "pieces.jsonl", {"video": "a.mkv"})
    own = ManifestConfig(path=str(path), root=str(folder / "media"))
    drawn = pieces(read(own, num_pieces=num_pieces))
    assert len(set(drawn)) == (num_pieces or len(drawn))
