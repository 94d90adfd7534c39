"""Clips of manifests as training takes them: which ones a step holds, read and cut to their bucket."""

import hashlib
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from swifti2v.config import settings
from swifti2v.errors import ConfigError, InputError, MediaError
from swifti2v.media import Frames
from swifti2v.shapes import Crop, PixelShape
from swifti2v.training.data.batch_plan import BatchPlan
from swifti2v.training.data.buckets import (
    BucketedSample,
    BucketRules,
    MediaFacts,
    assign_buckets,
    format_bucket,
    probe,
)
from swifti2v.training.data.crops import draw_crop
from swifti2v.training.data.decoding import decode_clip, decode_pair
from swifti2v.training.data.readers import read_manifest
from swifti2v.training.data.samples import Manifest, Reject, Remark, Sample
from swifti2v.training.engine.draws import Draw

logger = logging.getLogger(__name__)

T = TypeVar("T")
NUM_SHOWN = 3
"""Rejects of one cause that are named."""


@settings
class ManifestConfig:
    """One list of clips."""

    path: str
    """See ``read_manifest``."""
    root: str | None = None
    """Folder from which its paths start; by default the manifest's."""
    split: str | None = None
    """Read only this part of it."""
    weight: float = 1.0
    """Weight of its clips in the draw, beside those of other manifests."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(f"{self.path}: weight is {self.weight}; it must be above 0")


@settings
class DataConfig:
    """All clips of a phase."""

    manifests: tuple[ManifestConfig, ...] = ()
    """Manifests of real clips and of stage-transition samples; an empty list trains on procedural
    clips."""
    rules: BucketRules = field(default_factory=BucketRules)
    """Sizes, lengths and the frame rate."""
    num_pieces: int | None = None
    """Different pieces that are taken from a clip; none takes another one each time it comes."""

    def __post_init__(self) -> None:
        if self.num_pieces is not None and self.num_pieces < 1:
            raise ConfigError(f"data.num_pieces is {self.num_pieces}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a clip that a step trains on, before anything is read."""

    name: str
    """Name of the placement."""
    seed: int
    """Seed of the first frame."""
    crop: Crop
    """Crop within the frames of the bucket."""


@dataclass(frozen=True, slots=True)
class LoadedClip:
    """A piece of a clip of its bucket's size and length."""

    id: str
    """Id of its sample."""
    frames: Frames
    """``[T, H, W, 3]``."""
    reference: Frames | None
    """``[T, h, w, 3]`` that Stage I made of it; None for a real clip alone."""
    prompt: str
    """Prompt that describes it."""


def list_samples(source: ManifestConfig) -> Manifest:
    """Read a manifest, see ``read_manifest``."""
    return read_manifest(source.path, root=source.root and Path(source.root), split=source.split)


class ManifestClips:
    """The clips of a phase; a step's come from the step's number and the seed alone.

    ``look`` tells about a sample's files; ``listed`` are the manifests if they were read before.

    Raises:
        InputError: No clip can be used; the message counts the reasons.
    """

    def __init__(
        self,
        config: DataConfig,
        batch_size: int,
        seed: int,
        bad_samples: Literal["stop", "skip"],
        look: Callable[[Sample], MediaFacts] = probe,
        listed: Sequence[Manifest] | None = None,
    ) -> None:
        self.fps, self.bad_samples = config.rules.fps, bad_samples
        self.num_pieces = config.num_pieces
        self.placements: dict[str, BucketedSample] = {}
        members: dict[PixelShape, dict[str, float]] = {}
        rejects: list[Reject] = []
        manifests = map(list_samples, config.manifests) if listed is None else listed
        for number, (source, manifest) in enumerate(zip(config.manifests, manifests, strict=True)):
            assignment = assign_buckets(manifest.samples, config.rules, look=look)
            rejects += [*manifest.rejects, *assignment.rejects]
            for placement in assignment.placements:
                name = f"{number}:{placement.sample.id}"
                self.placements[name] = placement
                weights = members.setdefault(placement.bucket, {})
                weights[name] = placement.sample.weight * source.weight
        _report(self.placements, members, rejects)
        self.plan = BatchPlan(members, batch_size=batch_size, seed=seed)
        self._names = {shape: sorted(names) for shape, names in members.items()}

    def bucket(self, step: int) -> PixelShape:
        """Length and size of all clips of a step."""
        return self.plan.batch(step)[0]

    def pieces(self, draw: Draw, side: int | None = None, step: int = 1) -> list[Piece]:
        """Choose the pieces of a micro-batch: whole frames, or random squares of a side.

        The corner of a square lies on multiples of ``step``.

        Raises:
            ConfigError: The square is larger than the frames.
        """
        bucket, samples = self.plan.batch(draw.step)
        size, found = (bucket.height, bucket.width), []
        for index, rng in zip(draw.indices, draw.samples(), strict=True):
            name, seed = samples[index]
            if self.num_pieces is not None:
                seed = _hash_seed(name, seed % self.num_pieces)
                rng = np.random.default_rng((seed, 1))
            found.append(Piece(name, seed, draw_crop(size, side, step, rng)))
        return found

    def take(self, pieces: Sequence[Piece], read: Callable[[Piece], T]) -> tuple[list[T], int]:
        """Read pieces, and tell how many are stood in for as they cannot be read.

        Raises:
            MediaError: A clip cannot be read, unless such are skipped.
            InputError: None of a bucket's clips can be read.
        """
        taken, num_replaced = [], 0
        for piece in pieces:
            for offset, candidate in enumerate(self.candidates(piece)):
                try:
                    taken.append(read(candidate))
                    break
                except MediaError as error:
                    if self.bad_samples == "stop":
                        raise
                    logger.warning("%s; the next clip takes its place", error)
                    num_replaced += offset == 0
            else:
                bucket = self.placements[piece.name].bucket
                raise InputError(f"no clip of bucket {format_bucket(bucket)} can be read")
        return taken, num_replaced

    def candidates(self, piece: Piece) -> Iterator[Piece]:
        """The piece, then those of the bucket's other clips that stand in for it, in order."""
        names = self._names[self.placements[piece.name].bucket]
        first = bisect_left(names, piece.name)
        return (replace(piece, name=names[(first + i) % len(names)]) for i in range(len(names)))

    def read(self, piece: Piece, num_frames: int | None = None) -> LoadedClip:
        """The frames of a piece, uncropped.

        Args:
            piece: Where they are.
            num_frames: Number of them from the first one on; None takes as many as the bucket has.

        Raises:
            MediaError: They cannot be read.
        """
        placement = self.placements[piece.name]
        sample, rng = placement.sample, np.random.default_rng(piece.seed)
        options = (sample, placement.bucket, self.fps, rng)
        if sample.reference is None:
            frames = decode_clip(*options, facts=placement.facts, num_frames=num_frames)
            reference = None
        else:
            frames, reference = decode_pair(*options, facts=placement.facts, num_frames=num_frames)
        return LoadedClip(sample.id, frames, reference, sample.prompt)

    def examples(self, count: int) -> list[LoadedClip]:
        """Pieces of the first clips of the first bucket, the same every time."""
        bucket = min(self._names)
        whole = Crop(0, 0, bucket.height, bucket.width)
        return [self.read(Piece(name, 0, whole)) for name in self._names[bucket][:count]]

    @property
    def prompts(self) -> set[str]:
        """Prompts of all clips."""
        return {placement.sample.prompt for placement in self.placements.values()}


def _hash_seed(name: str, number: int) -> int:
    """A seed for a clip's piece of a number, 63 bits."""
    digest = hashlib.sha256(f"{number} {name}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _report(
    placements: dict[str, BucketedSample],
    members: dict[PixelShape, dict[str, float]],
    rejects: Sequence[Reject],
) -> None:
    lines = _by_cause(rejects)
    if not placements:
        raise InputError(
            f"0 of {len(rejects)} samples can be trained on: {'; '.join(lines) or 'none listed'}"
        )
    for shape, names in members.items():
        logger.info("bucket %s: %d samples", format_bucket(shape), len(names))
    for line in lines:
        logger.warning("left out: %s", line)
    for line in _by_cause([remark for placed in placements.values() for remark in placed.remarks]):
        logger.warning("note: %s", line)


def _by_cause(remarks: Sequence[Remark]) -> list[str]:
    """A line for each cause, with the first samples it is true of."""
    groups: dict[str, list[Remark]] = {}
    for remark in remarks:
        groups.setdefault(remark.cause, []).append(remark)
    return [
        f"{len(group)} x {cause} ({', '.join(r.id for r in group[:NUM_SHOWN])}){_detail(group[0])}"
        for cause, group in groups.items()
    ]


def _detail(remark: Remark) -> str:
    detail = remark.reason.removeprefix(remark.cause).removeprefix(": ")
    return f", {remark.id}: {detail}" if detail else ""
