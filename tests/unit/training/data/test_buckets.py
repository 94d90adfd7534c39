"""Bucket of a sample."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.config import parse_config, to_dict
from swifti2v.errors import ConfigError, InputError, MediaError
from swifti2v.media import iter_frames
from swifti2v.shapes import PixelShape
from swifti2v.training.data.buckets import (
    Assignment,
    BucketedSample,
    BucketRules,
    MediaFacts,
    assign_buckets,
    format_bucket,
    parse_bucket,
    plan_bucket,
    plan_range,
    plan_usable,
    probe,
)
from swifti2v.training.data.samples import Reject
from tests.helpers.training_clips import sample_of, save_counting_clip, save_picture

CLIP, PICTURE = sample_of(Path("a.mp4")), sample_of(Path("a.png"))
sides = st.integers(1, 40)  # few, so that limits are met exactly
shapes = st.tuples(st.integers(1, 40), sides, sides)
rates = st.sampled_from([8, 12, 23.976, 24, 25, 29.97, 30, 50, 59.94, 60])
clips = st.builds(MediaFacts, height=sides, width=sides, num_frames=st.integers(1, 150), fps=rates)
rule_sets = st.builds(
    BucketRules,
    buckets=st.lists(shapes, min_size=1, max_size=6, unique=True).map(tuple),
    fps=st.sampled_from([12.0, 16.0, 24.0]),
    max_crop_share=st.floats(0, 0.99),
)


def crop_share(bucket: PixelShape, facts: MediaFacts) -> Fraction:
    aspect, wanted = Fraction(facts.width, facts.height), Fraction(bucket.width, bucket.height)
    return 1 - min(aspect / wanted, wanted / aspect)


@given(facts=clips, rules=rule_sets)
def test_a_clip_goes_to_the_nearest_bucket_that_it_fills(
    facts: MediaFacts, rules: BucketRules
) -> None:
    num_frames = len(plan_usable(CLIP, facts, rules.fps))
    fitting = [
        b
        for b in rules.shapes
        if 1 < b.num_frames <= num_frames
        and b.height <= facts.height
        and b.width <= facts.width
        and crop_share(b, facts) <= rules.max_crop_share
    ]
    result = plan_bucket(CLIP, facts, rules)
    if not fitting:
        assert isinstance(result, Reject)
        assert result.id == CLIP.id
        causes = ("no bucket for videos", "aspect", "too small", "too short")
        assert result.cause in causes
        return
    assert isinstance(result, BucketedSample)
    assert (result.num_frames, result.bucket in fitting) == (num_frames, True)
    assert crop_share(result.bucket, facts) == min(crop_share(b, facts) for b in fitting)


@given(facts=clips, rules=rule_sets, order=st.randoms(use_true_random=False))
def test_the_order_of_buckets_does_not_matter(facts, rules, order):
    shuffled = list(rules.buckets)
    order.shuffle(shuffled)
    other = BucketRules(buckets=tuple(shuffled), fps=rules.fps, max_crop_share=rules.max_crop_share)
    assert plan_bucket(CLIP, facts, rules) == plan_bucket(CLIP, facts, other)


@given(facts=st.builds(MediaFacts, height=sides, width=sides), rules=rule_sets)
def test_a_picture_goes_only_to_buckets_of_one_frame(facts: MediaFacts, rules: BucketRules) -> None:
    result = plan_bucket(PICTURE, facts, rules)
    if isinstance(result, BucketedSample):
        assert result.bucket.num_frames == 1
    elif all(bucket.num_frames > 1 for bucket in rules.shapes):
        assert result.reason.startswith("no bucket for images: add one of 1 frame")


@given(
    num_frames=st.integers(1, 500),
    source_fps=rates,
    fps=rates,
    start=st.integers(0, 3000),
    length=st.none() | st.integers(1, 3000),
)
def test_usable_frames_are_those_that_start_within_the_part(
    num_frames: int, source_fps: float, fps: float, start: int, length: int | None
) -> None:
    end = None if length is None else (start + length) / 100
    sample = sample_of(Path("a.mp4"), start=start / 100, end=end)
    usable = plan_range(num_frames, source_fps, fps, sample)
    rate = Fraction(fps).limit_denominator(1001)
    seconds = num_frames / Fraction(source_fps).limit_denominator(1001)
    stop = seconds if length is None else min(seconds, Fraction(start + length, 100))
    times = [k / rate for k in range(math.ceil(seconds * rate) + 2)]
    expected = [k for k, time in enumerate(times) if Fraction(start, 100) <= time < stop]
    assert list(usable) == expected


@pytest.mark.parametrize("source", [8, 16, 24, 29.97])
@pytest.mark.parametrize("fps", [12, 16])
def test_the_count_is_that_of_resampling(tmp_path: Path, source: float, fps: float) -> None:
    path = save_counting_clip(tmp_path / "a.mp4", 23, fps=source)
    facts = probe(sample_of(path))
    assert (facts.height, facts.width, facts.num_frames) == (32, 48, 23)
    usable = plan_usable(sample_of(path), facts, fps)
    assert list(usable) == list(range(len(list(iter_frames(path, fps)))))


def test_a_decimal_start_falls_on_its_frame() -> None:
    assert plan_range(100, 10, 10, sample_of(Path("a.mp4"), start=0.7, end=2.3)) == range(7, 23)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ((200, 300, 100, 16), "too small: it is 300x200 px; the smallest bucket of its aspect, "
         "9x320x480, needs 480x320"),
        ((640, 960, 8, 16), "too short: it has 8 frames at 16 fps; the shortest bucket that it "
         "could fill, 9x320x480, needs 9"),
        ((640, 640, 100, 16), "aspect: 640x640 px would lose 33.3% of a side in the nearest "
         "bucket, 9x320x480; at most 25.0% may be lost"),
        ((320, 480, 100, 100), "too short: it has 16 frames at 16 fps; the shortest bucket that "
         "it could fill, 33x320x480, needs 33"),
    ],
)  # fmt: skip
def test_a_reject_says_what_there_is_and_what_is_needed(facts, reason):
    height, width, num_frames, fps = facts
    found = MediaFacts(height=height, width=width, num_frames=num_frames, fps=fps)
    buckets = ((33, 320, 480),) if fps == 100 else ((9, 320, 480), (17, 640, 960))
    result = plan_bucket(CLIP, found, BucketRules(buckets=buckets))
    assert result == Reject(CLIP.id, reason)


@pytest.mark.parametrize(("height", "width"), [(319, 960), (640, 479)])
def test_neither_side_is_enlarged(height: int, width: int) -> None:
    facts = MediaFacts(height=height, width=width, num_frames=99, fps=16)
    result = plan_bucket(CLIP, facts, BucketRules(buckets=((9, 320, 480),), max_crop_share=0.6))
    assert isinstance(result, Reject)
    assert result.cause == "too small"


def test_the_largest_bucket_of_an_aspect_wins_then_the_longest() -> None:
    facts = MediaFacts(height=704, width=1280, num_frames=81, fps=16)
    rules = BucketRules(buckets=((81, 352, 640), (49, 704, 1280), (81, 704, 1280)))
    result = plan_bucket(CLIP, facts, rules)
    assert isinstance(result, BucketedSample)
    assert result.bucket == (81, 704, 1280)


@pytest.mark.parametrize(
    ("stated", "detail"),
    [
        ({"width": 50}, "width 50, but the file has 48"),
        ({"height": 30}, "height 30, but the file has 32"),
        ({"fps": 25}, "fps 25, but the file has 16"),
        ({"end": 3.0}, "end 3 s, but the file ends at 2.00 s"),
    ],
)
def test_a_file_that_is_not_as_stated_is_refused(stated, detail):
    facts = MediaFacts(height=32, width=48, num_frames=32, fps=16)
    rules = BucketRules(buckets=((9, 32, 48),))
    result = plan_bucket(sample_of(Path("a.mp4"), **stated), facts, rules)
    assert result == Reject("a.mp4", f"not as stated: {detail}")
    agreeing = sample_of(Path("a.mp4"), width=48, height=32, fps=16.1, end=2.05)
    assert isinstance(plan_bucket(agreeing, facts, rules), BucketedSample)


def test_a_short_reference_limits_the_sample(tmp_path: Path) -> None:
    clip = save_counting_clip(tmp_path / "a.mp4", 40)
    reference = save_counting_clip(tmp_path / "small.mkv", 9, height=8, width=12)
    sample = sample_of(clip, reference=reference, start=1.0)
    facts = probe(sample)
    assert facts.reference == MediaFacts(height=8, width=12, num_frames=9, fps=16)
    assert plan_usable(sample, facts, 16) == range(16, 25)
    assert isinstance(
        plan_bucket(sample, facts, BucketRules(buckets=((9, 32, 48),))), BucketedSample
    )
    result = plan_bucket(sample, facts, BucketRules(buckets=((13, 32, 48),)))
    assert isinstance(result, Reject)
    assert result.cause == "too short"


def test_samples_are_placed_or_refused_in_order(tmp_path: Path) -> None:
    paths = [save_counting_clip(tmp_path / f"{i}.mkv", 9 + i) for i in range(3)]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    picture = save_picture(tmp_path / "p.png")
    samples = [sample_of(path) for path in (paths[0], broken, picture, *paths[1:])]
    rules = BucketRules(buckets=((10, 32, 48), (1, 32, 48), (81, 32, 48)))
    done: list[int] = []
    result = assign_buckets(samples, rules, num_threads=3, on_progress=done.append)
    assert isinstance(result, Assignment)
    assert done == [5]
    assert [(p.sample.id, p.num_frames) for p in result.placements] == [
        ("p.png", 1), ("1.mkv", 10), ("2.mkv", 11),
    ]  # fmt: skip
    assert [(r.id, r.cause) for r in result.rejects] == [
        ("0.mkv", "too short"), ("broken.mp4", "cannot be read"),
    ]  # fmt: skip
    assert {shape.num_frames: len(group) for shape, group in result.by_bucket().items()} == {
        10: 2, 1: 1, 81: 0,
    }  # fmt: skip


def test_a_file_that_cannot_be_read_names_the_sample(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"sample x: .*none\.mp4 does not exist"):
        probe(sample_of(tmp_path / "none.mp4", id="x"))


@given(shapes)
def test_a_bucket_survives_the_round_trip(bucket: tuple[int, int, int]) -> None:
    assert parse_bucket(format_bucket(PixelShape(*bucket))) == bucket


@pytest.mark.parametrize("text", ["", "81", "81x704", "81x704x1280x3", "-1x2x3", "axbxc"])
def test_a_text_that_is_no_bucket_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="FRAMESxHEIGHTxWIDTH"):
        parse_bucket(text)


def test_rules_are_a_config() -> None:
    rules = BucketRules(buckets=((81, 704, 1280), (1, 704, 1280)), max_crop_share=0.1)
    values = {"buckets": [[81, 704, 1280], [1, 704, 1280]], "max_crop_share": 0.1}
    assert parse_config(BucketRules, values, "x") == rules
    assert parse_config(BucketRules, to_dict(rules), "x") == rules


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"buckets": []}, "at least one"),
        ({"buckets": [[9, 32, 48], [9, 32, 48]]}, "each bucket once"),
        ({"buckets": [[9, 0, 48]]}, "is empty"),
        ({"fps": 0}, "fps is 0"),
        ({"max_crop_share": 1}, "max_crop_share is 1"),
        ({"size": 3}, "size"),
    ],
)
def test_rules_that_cannot_be_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(BucketRules, values, "x")
