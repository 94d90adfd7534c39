"""Clips of manifests as training takes them: which ones a step holds, read and cut to their bucket."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from swifti2v.errors import ConfigError, InputError, MediaError
from swifti2v.shapes import PixelShape
from swifti2v.training.batch_plan import BatchPlan
from swifti2v.training.buckets import BucketRules, Placement, assign_buckets, format_bucket
from swifti2v.training.decoding import decode_clip, decode_pair
from swifti2v.training.draws import Draw
from swifti2v.training.manifest import Reject
from swifti2v.training.manifest_readers import read_manifest

logger = logging.getLogger(__name__)

Frames = NDArray[np.uint8]
"""``[T, H, W, 3]`` RGB."""
NUM_SHOWN = 3
"""Rejects of one cause that are named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestConfig:
    """One list of clips."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: str
    """See ``read_manifest``."""
    root: str | None = None
    """What its paths start from; the manifest's folder if not given."""
    split: str | None = None
    """Read only this part of it."""
    weight: float = 1.0
    """How often its clips are drawn, beside those of other manifests."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(f"{self.path}: weight is {self.weight}; it must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """All clips of a phase."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    manifests: tuple[ManifestConfig, ...] = ()
    """Of real clips and of stage-transition samples; none trains on procedural clips."""
    rules: BucketRules = field(default_factory=BucketRules)
    """Sizes, lengths and the frame rate."""


@dataclass(frozen=True, slots=True)
class LoadedClip:
    """A piece of a clip of its bucket's size and length."""

    id: str
    """Of its sample."""
    frames: Frames
    """``[T, H, W, 3]``."""
    reference: Frames | None
    """``[T, h, w, 3]`` that Stage I made of it; None for a real clip alone."""
    prompt: str
    """What it shows."""


class ManifestClips:
    """The clips of a phase; a step's come from the step's number alone.

    Args:
        config: Manifests and buckets.
        batch_size: Samples of a step, on all ranks.
        seed: Of order and pieces.
        bad_samples: What to do about a clip that cannot be read.

    Raises:
        InputError: No clip can be used; the message counts the reasons.
    """

    def __init__(
        self, config: DataConfig, batch_size: int, seed: int, bad_samples: Literal["stop", "skip"]
    ) -> None:
        self.fps, self.bad_samples = config.rules.fps, bad_samples
        self.placements: dict[str, Placement] = {}
        members: dict[PixelShape, dict[str, float]] = {}
        rejects: list[Reject] = []
        for number, source in enumerate(config.manifests):
            manifest = read_manifest(
                source.path, root=source.root and Path(source.root), split=source.split
            )
            assignment = assign_buckets(manifest.samples, config.rules)
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
        return self.plan.batch(step).bucket

    def load(self, draw: Draw) -> tuple[list[LoadedClip], int]:
        """The clips of a micro-batch, and how many of them stand in for unreadable ones.

        Raises:
            MediaError: A clip cannot be read, unless such are skipped.
        """
        batch = self.plan.batch(draw.step).take(draw.indices)
        clips, num_replaced = [], 0
        for name, seed in zip(batch.ids, batch.seeds, strict=True):
            names = self._names[batch.bucket]
            for offset in range(len(names)):
                chosen = names[(names.index(name) + offset) % len(names)]
                try:
                    clips.append(self._load_one(chosen, seed))
                    break
                except MediaError as error:
                    if self.bad_samples == "stop":
                        raise
                    logger.warning("%s; the next clip takes its place", error)
                    num_replaced += offset == 0
            else:
                raise InputError(f"no clip of bucket {format_bucket(batch.bucket)} can be read")
        return clips, num_replaced

    def examples(self, count: int) -> list[LoadedClip]:
        """Pieces of the first clips of the first bucket, the same every time."""
        bucket = min(self._names)
        return [self._load_one(name, 0) for name in self._names[bucket][:count]]

    def _load_one(self, name: str, seed: int) -> LoadedClip:
        placement = self.placements[name]
        sample, rng = placement.sample, np.random.default_rng(seed)
        if sample.reference is None:
            frames = decode_clip(sample, placement.bucket, self.fps, rng, facts=placement.facts)
            return LoadedClip(sample.id, frames, None, sample.prompt)
        pair = decode_pair(sample, placement.bucket, self.fps, rng, facts=placement.facts)
        return LoadedClip(sample.id, pair.frames, pair.reference, sample.prompt)


def with_procedural(config: DataConfig, path: str) -> DataConfig:
    """The same settings, on the manifest of procedural clips where none is given."""
    if config.manifests:
        return config
    return replace(config, manifests=(ManifestConfig(path=path),))


def _report(
    placements: dict[str, Placement],
    members: dict[PixelShape, dict[str, float]],
    rejects: Sequence[Reject],
) -> None:
    by_cause: dict[str, list[Reject]] = {}
    for reject in rejects:
        by_cause.setdefault(reject.cause, []).append(reject)
    lines = [
        f"{len(group)} x {cause} ({', '.join(r.id for r in group[:NUM_SHOWN])})"
        for cause, group in by_cause.items()
    ]
    if not placements:
        raise InputError(
            f"none of {len(rejects)} samples can be trained on: {'; '.join(lines) or 'none listed'}"
        )
    for shape, names in members.items():
        logger.info("bucket %s: %d samples", format_bucket(shape), len(names))
    for line in lines:
        logger.warning("left out: %s", line)
