"""Buckets: which size and length each sample is trained at, and why some fit none."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

from swifti2v.config import settings
from swifti2v.errors import ConfigError, InputError, MediaError
from swifti2v.media import load_image, probe_clip
from swifti2v.media.timing import count_resampled, exact_rate
from swifti2v.shapes import PixelShape
from swifti2v.training.data.samples import MediaFile, Reject, Remark, Sample, local_media

FPS_TOLERANCE = 0.02
"""Share by which stated and found frame rate may differ: 23.976 and 24 are taken for the same."""
END_TOLERANCE = 0.1
"""Seconds by which a stated end may lie behind the clip's."""
_CHUNK = 256  # samples handed to the threads at once


@settings
class BucketRules:
    """The buckets, and which samples may go into them."""

    buckets: tuple[tuple[int, int, int], ...] = ((81, 1408, 2560),)
    """``(num_frames, height, width)`` each; ``num_frames`` 1 is for images, and only for them."""
    fps: float = 16.0
    """Frames a second that clips are resampled to."""
    max_crop_share: float = 0.25
    """Largest part of a sample's width or height to cut off to reach the bucket's aspect."""

    def __post_init__(self) -> None:
        if not self.buckets or len(set(self.buckets)) < len(self.buckets):
            raise ConfigError(
                f"buckets {list(self.buckets)} must hold each bucket once, at least one"
            )
        if bad := [bucket for bucket in self.buckets if min(bucket) < 1]:
            raise ConfigError(f"bucket {bad[0]} is empty; frames, height and width are at least 1")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ConfigError(f"fps is {self.fps}; it must be above 0")
        if not 0 <= self.max_crop_share < 1:
            raise ConfigError(f"max_crop_share is {self.max_crop_share}; it must be in [0, 1)")

    @property
    def shapes(self) -> tuple[PixelShape, ...]:
        """The buckets by name of their sides."""
        return tuple(PixelShape(*bucket) for bucket in self.buckets)


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaFacts:
    """Facts about a sample's files."""

    height: int
    """Pixels, upright."""
    width: int
    """Pixels, upright."""
    num_frames: int = 1
    """Frames that reading all of it at ``fps`` gives; 1 for an image."""
    fps: float | None = None
    """Frames a second that it is read at; None for an image."""
    notes: tuple[str, ...] = ()
    """Changes made while it is read: ``cause: detail``."""
    reference: "MediaFacts | None" = None
    """Facts about the sample's reference clip."""


@dataclass(frozen=True, slots=True)
class BucketedSample:
    """A sample in its bucket."""

    sample: Sample
    """Sample in the bucket."""
    bucket: PixelShape
    """Bucket that takes it."""
    num_frames: int
    """Frames to choose from, resampled; at least the bucket's."""
    facts: MediaFacts
    """About its files."""

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """Changes made to its clip while it is read."""
        return tuple(Remark(self.sample.id, note) for note in self.facts.notes)


@dataclass(frozen=True, slots=True)
class Assignment:
    """All samples: placed or refused."""

    rules: BucketRules
    """Rules of the placements."""
    placements: tuple[BucketedSample, ...]
    """Placed samples in their order."""
    rejects: tuple[Reject, ...]
    """Refused samples in their order."""

    def by_bucket(self) -> dict[PixelShape, tuple[BucketedSample, ...]]:
        """The placements of each bucket, in the order of the rules; some may be empty."""
        groups: dict[PixelShape, list[BucketedSample]] = {shape: [] for shape in self.rules.shapes}
        for placement in self.placements:
            groups[placement.bucket].append(placement)
        return {shape: tuple(group) for shape, group in groups.items()}


def parse_bucket(text: str) -> tuple[int, int, int]:
    """Read ``FRAMESxHEIGHTxWIDTH``, such as ``81x1408x2560``.

    Raises:
        InputError: ``text`` is not of this form.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip())
    if match is None:
        raise InputError(f"bucket {text!r} is not FRAMESxHEIGHTxWIDTH, such as 81x1408x2560")
    num_frames, height, width = (int(number) for number in match.groups())
    return num_frames, height, width


def format_bucket(bucket: PixelShape) -> str:
    """``FRAMESxHEIGHTxWIDTH``; ``parse_bucket`` reads it back."""
    return "x".join(str(side) for side in bucket)


def probe(sample: Sample) -> MediaFacts:
    """Look into a sample's files (``probe_clip``, ``load_image``).

    Raises:
        MediaError: A file cannot be used; the message names the sample.
    """
    with local_media(sample) as path:
        if sample.kind == "image":
            image = load_image(path)
            return MediaFacts(height=image.height, width=image.width)
        info = probe_clip(path)
    reference = None
    if sample.reference is not None:
        reference = probe(
            Sample(
                id=f"{sample.id} (reference)",
                media=MediaFile(sample.reference),
                kind="video",
                prompt=sample.prompt,
            )
        )
    return MediaFacts(
        height=info.height,
        width=info.width,
        num_frames=info.num_frames,
        fps=info.fps,
        notes=info.notes,
        reference=reference,
    )


def plan_range(num_frames: int, source_fps: float, fps: float, sample: Sample) -> range:
    """Frames of the clip resampled to ``fps`` that lie in the part of it to use; may be empty.

    Frame k starts k / fps seconds after the first frame. A ``start`` or ``end`` between two frames
    leaves out the earlier one.
    """
    first, stop = _first_frame_at(sample.start, fps), count_resampled(num_frames, source_fps, fps)
    if sample.end is not None:
        stop = min(stop, _first_frame_at(sample.end, fps))
    return range(first, max(first, stop))


def plan_usable(sample: Sample, facts: MediaFacts, fps: float) -> range:
    """See ``plan_range``; ends with the sample's reference, and is frame 0 of an image."""
    if facts.fps is None:
        return range(1)
    usable = plan_range(facts.num_frames, facts.fps, fps, sample)
    if facts.reference is None or facts.reference.fps is None:
        return usable
    return usable[: count_resampled(facts.reference.num_frames, facts.reference.fps, fps)]


def _first_frame_at(seconds: float, fps: float) -> int:
    # A decimal number of seconds is taken as such: 0.7 s at 10 fps is frame 7, not 8.
    return math.ceil(Fraction(seconds).limit_denominator(10**6) * exact_rate(fps))


def plan_bucket(sample: Sample, facts: MediaFacts, rules: BucketRules) -> BucketedSample | Reject:
    """The bucket that a sample is trained in, or why it is trained in none.

    Of the buckets that it fills without being enlarged and with enough frames, it is the one of the
    nearest aspect; then the one with the largest area; then the longest.
    """
    if (problem := _find_disagreement(sample, facts)) is not None:
        return Reject(sample.id, problem)
    num_frames = len(plan_usable(sample, facts, rules.fps))
    fitting = [b for b in rules.shapes if (b.num_frames == 1) == (sample.kind == "image")]
    if not fitting:
        needed = "of 1 frame, such as 1x1408x2560" if sample.kind == "image" else "of more frames"
        return Reject(sample.id, f"no bucket for {sample.kind}s: add one {needed}")
    near = [b for b in fitting if _crop_share(b, facts) <= rules.max_crop_share]
    if not near:
        return Reject(sample.id, _explain_aspect(fitting, facts, rules))
    filled = [b for b in near if b.height <= facts.height and b.width <= facts.width]
    if not filled:
        return Reject(sample.id, _explain_size(near, facts))
    met = [b for b in filled if b.num_frames <= num_frames]
    if not met:
        return Reject(sample.id, _explain_length(filled, num_frames, rules))
    best = min(met, key=lambda b: (_crop_share(b, facts), -b.height * b.width, -b.num_frames))
    return BucketedSample(sample, best, num_frames, facts)


def assign_buckets(
    samples: Sequence[Sample],
    rules: BucketRules,
    *,
    look: Callable[[Sample], MediaFacts] = probe,
    num_threads: int = 4,
    on_progress: Callable[[int], None] | None = None,
) -> Assignment:
    """Look into all samples, several at once in threads, and place each one."""
    results: list[BucketedSample | Reject] = []
    with ThreadPoolExecutor(num_threads) as executor:
        for chunk in in_chunks(samples):
            results += executor.map(lambda sample: _place(sample, rules, look), chunk)
            if on_progress is not None:
                on_progress(len(results))
    return Assignment(
        rules,
        tuple(result for result in results if isinstance(result, BucketedSample)),
        tuple(result for result in results if isinstance(result, Reject)),
    )


def in_chunks(samples: Sequence[Sample]) -> Iterator[tuple[Sample, ...]]:
    """Yield as many samples at a time as are handed to threads or processes at once."""
    rest = iter(samples)
    while chunk := tuple(islice(rest, _CHUNK)):
        yield chunk


def _place(
    sample: Sample, rules: BucketRules, look: Callable[[Sample], MediaFacts]
) -> BucketedSample | Reject:
    try:
        return plan_bucket(sample, look(sample), rules)
    except MediaError as error:
        return Reject(sample.id, f"cannot be read: {error}")


def _find_disagreement(sample: Sample, facts: MediaFacts) -> str | None:
    """A stated number that the file contradicts: it may be the wrong file."""
    for name, stated, found in (
        ("width", sample.width, facts.width),
        ("height", sample.height, facts.height),
    ):
        if stated not in (None, found):
            return f"not as stated: {name} {stated}, but the file has {found}"
    if facts.fps is None:
        return None
    if sample.fps is not None and abs(sample.fps / facts.fps - 1) > FPS_TOLERANCE:
        return f"not as stated: fps {sample.fps:g}, but the file has {facts.fps:g}"
    seconds = facts.num_frames / facts.fps
    if sample.end is not None and sample.end > seconds + END_TOLERANCE:
        return f"not as stated: end {sample.end:g} s, but the file ends at {seconds:.2f} s"
    return None


def _crop_share(bucket: PixelShape, facts: MediaFacts) -> Fraction:
    """Part of the width or of the height that is lost when a sample covers the bucket."""
    sides = (facts.width * bucket.height, facts.height * bucket.width)
    return 1 - Fraction(min(sides), max(sides))


def _explain_aspect(buckets: Sequence[PixelShape], facts: MediaFacts, rules: BucketRules) -> str:
    nearest = min(buckets, key=lambda bucket: (_crop_share(bucket, facts), bucket))
    share = float(_crop_share(nearest, facts))
    return (
        f"aspect: {facts.width}x{facts.height} px would lose {share:.1%} of a side in the nearest "
        f"bucket, {format_bucket(nearest)}; at most {rules.max_crop_share:.1%} may be lost"
    )


def _explain_size(buckets: Sequence[PixelShape], facts: MediaFacts) -> str:
    smallest = min(buckets, key=lambda bucket: (bucket.height * bucket.width, bucket))
    return (
        f"too small: it is {facts.width}x{facts.height} px; the smallest bucket of its aspect, "
        f"{format_bucket(smallest)}, needs {smallest.width}x{smallest.height}"
    )


def _explain_length(buckets: Sequence[PixelShape], num_frames: int, rules: BucketRules) -> str:
    shortest = min(buckets, key=lambda bucket: (bucket.num_frames, bucket))
    return (
        f"too short: it has {num_frames} frames at {rules.fps:g} fps; the shortest bucket that "
        f"it could fill, {format_bucket(shortest)}, needs {shortest.num_frames}"
    )
