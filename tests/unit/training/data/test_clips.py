"""Clips of manifests as the steps of a training draw, read and cut them."""

import json
import logging
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from swifti2v.errors import ConfigError, InputError, MediaError
from swifti2v.shapes import Crop
from swifti2v.training.data.buckets import BucketRules
from swifti2v.training.data.clips import DataConfig, ManifestClips, ManifestConfig, Piece
from swifti2v.training.engine.draws import Draw, draws_of_step, split_batch
from tests.helpers.training_clips import numbers, save_counting_clip, save_damaged_clip

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


def read(
    *manifests: ManifestConfig,
    rules: BucketRules = RULES,
    bad_samples: Literal["stop", "skip"] = "stop",
    **more: Any,
) -> ManifestClips:
    data = DataConfig(manifests=manifests, rules=rules, **more)
    return ManifestClips(data, BATCH, 0, bad_samples)


def listed(folder: Path, name: str, *rows: dict[str, Any]) -> ManifestConfig:
    """A manifest of clips in ``media``."""
    return ManifestConfig(path=str(write(folder / name, *rows)), root=str(folder / "media"))


def draw(step: int = 0) -> Draw:
    return Draw(seed=0, step=step, batch_size=BATCH, indices=tuple(range(BATCH)))


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


@pytest.fixture(scope="module")
def four(folder: Path) -> ManifestConfig:
    rows = ({"video": f"{name}.mkv", "prompt": f"clip {name}"} for name in "abcd")
    return listed(folder, "four.jsonl", *rows)


def test_what_a_step_trains_on_comes_from_its_number_alone(four):
    one, other = read(four), read(four)
    in_order = [one.pieces(draw(step), side=16) for step in range(20)]
    backwards = [other.pieces(draw(step), side=16) for step in reversed(range(20))]
    assert in_order == backwards[::-1]
    assert len({tuple(piece.name for piece in step) for step in in_order}) > 1


def test_ranks_and_micro_batches_divide_a_step_and_change_nothing(four):
    clips = read(four)
    divided = split_batch(BATCH, num_micro_batches=2, world_size=2)
    parts = [
        piece
        for rank in range(2)
        for own in draws_of_step(0, 3, divided, rank)
        for piece in clips.pieces(own, side=16)
    ]
    assert sorted(parts, key=repr) == sorted(clips.pieces(draw(3), side=16), key=repr)


def test_all_pieces_of_a_step_are_of_its_bucket(folder):
    rules = BucketRules(buckets=((5, 32, 48), (9, 16, 16)))
    save_counting_clip(folder / "media" / "square.mkv", 12, height=16, width=16)
    rows = [{"video": f"{name}.mkv"} for name in ("a", "b", "square")]
    clips = read(listed(folder, "two.jsonl", *rows), rules=rules)
    seen = set()
    for step in range(30):
        bucket = clips.bucket(step)
        found = clips.pieces(draw(step))
        assert {clips.placements[piece.name].bucket for piece in found} == {bucket}
        assert {piece.crop for piece in found} == {Crop(0, 0, bucket.height, bucket.width)}
        seen.add(bucket)
    assert len(seen) == 2


@pytest.mark.parametrize("num_pieces", [None, 2])
def test_a_square_lies_within_the_frame_on_its_grid(four, num_pieces):
    clips = read(four, num_pieces=num_pieces)
    found = {piece for step in range(30) for piece in clips.pieces(draw(step), side=16, step=8)}
    crops = {piece.crop for piece in found}
    assert all((crop.height, crop.width) == (16, 16) for crop in crops)
    corners = {(crop.top, crop.left) for crop in crops}
    assert corners <= {(top, left) for top in (0, 8, 16) for left in (0, 8, 16, 24, 32)}
    # With pieces of their own clips come with the same square each time.
    assert len(found) == 8 if num_pieces == 2 else len(found) > 8
    with pytest.raises(ConfigError, match="crop 40 is larger than the clips, 48x32"):
        clips.pieces(draw(), side=40)


@pytest.mark.slow
def test_a_piece_is_read_at_its_buckets_size_and_the_same_every_time(four):
    clips = read(four)
    starts = set()
    for piece in {
        piece.seed: piece for step in range(8) for piece in clips.pieces(draw(step))
    }.values():
        clip, again = clips.read(piece), clips.read(piece)
        assert clip.frames.shape == (5, 32, 48, 3)
        np.testing.assert_array_equal(clip.frames, again.frames)
        assert clip.reference is None
        assert f"0:{clip.id}" == piece.name
        assert clip.prompt == f"clip {Path(clip.id).stem}"
        shown = numbers(clip.frames)
        assert all(after - before == 1 for before, after in pairwise(shown))
        starts.add(shown[0])
    assert len(starts) > 1  # the seed says where the piece begins
    assert clips.prompts == {f"clip {name}" for name in "abcd"}


def test_a_clip_with_its_small_version_is_read_as_a_pair(folder):
    save_counting_clip(folder / "media" / "a-small.mkv", 12, height=8, width=12)
    row = {"video": "a.mkv", "reference": "a-small.mkv"}
    clips = read(listed(folder, "pair.jsonl", row))
    clip = clips.read(clips.pieces(draw())[0])
    assert clip.reference is not None
    assert clip.reference.shape == (5, 8, 12, 3)
    assert numbers(clip.reference) == numbers(clip.frames)


def test_examples_are_the_first_clips_whole_and_the_same_every_time(four):
    clips, other = read(four), read(four)
    examples = clips.examples(3)
    assert [clip.id for clip in examples] == ["a.mkv", "b.mkv", "c.mkv"]
    assert all(clip.frames.shape == (5, 32, 48, 3) for clip in examples)
    for clip, again in zip(examples, other.examples(3), strict=True):
        np.testing.assert_array_equal(clip.frames, again.frames)
    assert len(clips.examples(9)) == 4


def test_every_other_clip_of_the_bucket_can_stand_in(four):
    clips = read(four)
    (piece, *_) = clips.pieces(draw(), side=16)
    found = list(clips.candidates(piece))
    assert found[0] == piece
    assert sorted(other.name for other in found) == sorted(clips.placements)
    assert {(other.seed, other.crop) for other in found} == {(piece.seed, piece.crop)}


@pytest.fixture(scope="module")
def one_damaged(folder: Path) -> ManifestConfig:
    save_damaged_clip(folder / "media" / "broken.mov")
    rows = ({"video": name} for name in ("a.mkv", "broken.mov"))
    return listed(folder, "damaged.jsonl", *rows)


def test_a_clip_that_cannot_be_read_stops_or_is_stood_in_for(one_damaged, caplog):
    whole = Crop(0, 0, 32, 48)
    # A late start, behind the place where it breaks off.
    wanted = [Piece("0:broken.mov", seed, whole) for seed in range(20)]
    stopping = read(one_damaged)
    broken = [piece for piece in wanted if not is_readable(stopping, piece)]
    assert broken
    with pytest.raises(MediaError, match=r"broken\.mov"):
        stopping.take(broken[:1], stopping.read)

    skipping = read(one_damaged, bad_samples="skip")
    fine = Piece("0:a.mkv", 0, whole)
    with caplog.at_level(logging.WARNING):
        taken, num_replaced = skipping.take([broken[0], fine, broken[-1]], skipping.read)
    assert [clip.id for clip in taken] == ["a.mkv"] * 3
    assert num_replaced == 2
    assert caplog.text.count("the next clip takes its place") == 2


def is_readable(clips: ManifestClips, piece: Piece) -> bool:
    try:
        clips.read(piece)
    except MediaError:
        return False
    return True


def test_a_bucket_of_which_nothing_can_be_read_is_an_error(four):
    clips = read(four, bad_samples="skip")

    def fail(piece: Piece) -> None:
        raise MediaError(f"{piece.name} is gone")

    with pytest.raises(InputError, match="no clip of bucket 5x32x48 can be read"):
        clips.take(clips.pieces(draw()), fail)


def test_clips_that_are_left_out_are_counted_by_cause(folder, caplog):
    save_counting_clip(folder / "media" / "short.mkv", 3)
    rows = [{"video": name} for name in ("a.mkv", "short.mkv")]
    with caplog.at_level(logging.INFO, logger="swifti2v"):
        read(listed(folder, "short.jsonl", *rows))
    assert "bucket 5x32x48: 1 samples" in caplog.text
    assert "left out: 1 x too short (short.mkv)" in caplog.text
    with pytest.raises(InputError, match=r"0 of 1 samples can be trained on: 1 x too short"):
        read(listed(folder, "none.jsonl", rows[1]))
    with pytest.raises(InputError, match="0 of 0 samples"):
        read()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_above_zero_is_refused(weight):
    with pytest.raises(ConfigError, match=r"list\.csv: weight is .*; it must be above 0"):
        ManifestConfig(path="list.csv", weight=weight)


def test_a_clip_has_at_least_one_piece():
    with pytest.raises(ConfigError, match=r"data\.num_pieces is 0; it must be at least 1"):
        DataConfig(num_pieces=0)
