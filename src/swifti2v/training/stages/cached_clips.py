"""A manifest's clips as Stage I and Stage II take them, encoded before the training."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swifti2v.errors import MediaError
from swifti2v.models.fingerprints import fingerprint_model
from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.segments import Segment
from swifti2v.training.cache.fingerprints import hash_source, make_key
from swifti2v.training.cache.prompt_embeddings import REMEDY
from swifti2v.training.cache.tensor_cache import Entry, TensorCache
from swifti2v.training.data.buckets import format_bucket
from swifti2v.training.data.clips import ManifestClips, Piece
from swifti2v.training.data.decoding import draw_first
from swifti2v.training.engine.draws import Draw
from swifti2v.training.stages.batches import Stage1Latents, Stage2Latents
from swifti2v.training.stages.clip_sources import Stage1Clips, Stage2Clips

CODE = 2
"""Raised when the same clip and VAE give something else than before."""
Window = tuple[int, ...]
"""Latent frames of an entry; none means all."""


def open_latents(directory: Path, stage: str, vae: VideoVAE, **others: Any) -> TensorCache:
    """The cache of a stage's latents, below the directory of all caches of a training.

    Args:
        directory: Of all caches.
        stage: ``stage1`` or ``stage2``.
        vae: What encodes.
        others: Settings and models that decide the latents as well, as plain values.

    Raises:
        InputError: The directory is of another VAE or of other settings.
    """
    model: Any = vae  # untyped in diffusers
    fingerprint = {"kind": stage, "vae": fingerprint_model(model), "code": CODE, **others}
    return TensorCache(directory / stage, fingerprint)


class ClipCache:
    """Latents of pieces of clips. An entry knows the files it was made from.

    A piece that could not be read has an entry too, so that training skips what was skipped.

    Args:
        clips: Of a manifest.
        cache: From ``open_latents``.
    """

    def __init__(self, clips: ManifestClips, cache: TensorCache) -> None:
        self.clips, self.cache = clips, cache
        self._hashes: dict[str, dict[str, Any]] = {}

    def key(self, piece: Piece, window: Window = ()) -> str:
        """Name of an entry: which clip, which part of it, which latent frames."""
        placement = self.clips.placements[piece.name]
        sample, fps = placement.sample, self.clips.fps
        reference = "" if sample.reference is None else sample.reference.name
        parts = (*placement.bucket, *piece.crop, *window)
        return make_key(sample.id, reference, fps, self._first(piece), *parts)

    def has(self, piece: Piece, window: Window = ()) -> bool:
        """Whether tensors are there, made from the files as they are now."""
        return self.cache.record(self.key(piece, window)) == self._origin(piece)

    def read(self, piece: Piece, window: Window = ()) -> Entry:
        """An entry, with tensors in float32.

        Raises:
            MediaError: The piece could not be read when the cache was made.
            InputError: It is not there, or the files have changed since.
        """
        name = f"{self._describe(piece)}, latent frames {', '.join(map(str, window)) or 'all'}"
        entry = self.cache.require(self.key(piece, window), name, self._origin(piece), REMEDY)
        if (reason := entry.record.get("unreadable")) is not None:
            raise MediaError(str(reason))
        return Entry(entry.record, {k: tensor.float() for k, tensor in entry.tensors.items()})

    def put(self, piece: Piece, window: Window, tensors: Mapping[str, Tensor]) -> None:
        """Add an entry, without a batch dimension."""
        self.cache.put(self.key(piece, window), tensors, self._origin(piece))

    def put_unreadable(self, piece: Piece, window: Window, reason: str) -> None:
        """Add that a piece cannot be read."""
        record = {**self._origin(piece), "unreadable": reason}
        self.cache.put(self.key(piece, window), {}, record)

    def _first(self, piece: Piece) -> int:
        placement, rng = self.clips.placements[piece.name], np.random.default_rng(piece.seed)
        sample, bucket = placement.sample, placement.bucket
        return draw_first(sample, bucket, self.clips.fps, rng, placement.facts)

    def _origin(self, piece: Piece) -> dict[str, Any]:
        """Hashes of the files that a piece is from, as they were when first asked for."""
        if piece.name not in self._hashes:
            placement = self.clips.placements[piece.name]
            reference = placement.sample.reference
            self._hashes[piece.name] = {
                "source": _hash(placement.sample.open),
                "reference": None if reference is None else _hash(lambda: reference),
                "size": list(placement.bucket),
            }
        return self._hashes[piece.name]

    def _describe(self, piece: Piece) -> str:
        bucket, crop = self.clips.placements[piece.name].bucket, piece.crop
        part = f"bucket {format_bucket(bucket)} from frame {self._first(piece)}"
        where = f"{crop.width}x{crop.height} px at {crop.left},{crop.top}"
        return f"{self.clips.placements[piece.name].sample.id} ({part}, {where})"


def _hash(open_: Any) -> str | None:
    """Of a file that a function gives the path or the content of; None where it is gone."""
    try:
        source = open_()
        if isinstance(source, Path):
            return hash_source(source)
        with source:
            return hash_source(source)
    except (OSError, MediaError):
        return None


class CachedStage1Clips:
    """``Stage1Clips``, encoded before.

    Args:
        source: Says which pieces.
        cache: Has them.
    """

    def __init__(self, source: Stage1Clips, cache: ClipCache) -> None:
        self.source, self.cache = source, cache

    def load(self, draw: Draw) -> Stage1Latents:
        """See ``Stage1Source``."""
        clips = self.source.clips
        found, num_replaced = clips.take(clips.pieces(draw), partial(_read, self.cache, window=()))
        tensors = _stack([entry for _, entry in found])
        return Stage1Latents(
            ids=tuple(clips.placements[name].sample.id for name, _ in found),
            num_replaced=num_replaced,
            latents=tensors["latents"],
            condition=tensors["condition"],
            image_embeds=tensors.get("image_embeds"),
            prompts=tuple(clips.placements[name].sample.prompt for name, _ in found),
        )


class CachedStage2Clips:
    """``Stage2Clips``, encoded before.

    Args:
        source: Says which pieces.
        cache: Has them, in windows.
    """

    def __init__(self, source: Stage2Clips, cache: ClipCache) -> None:
        self.source, self.cache = source, cache

    def num_frames(self, draw: Draw, rng: np.random.Generator) -> int:
        """See ``Stage2Source``."""
        return self.source.num_frames(draw, rng)

    def load(self, draw: Draw, segment: Segment, num_latent_frames: int) -> Stage2Latents:
        """See ``Stage2Source``."""
        del num_latent_frames  # that of the bucket
        clips = self.source.clips
        read = partial(_read, self.cache, window=segment.window)
        found, num_replaced = clips.take(self.source.pieces(draw), read)
        tensors = _stack([entry for _, entry in found])
        return Stage2Latents(
            ids=tuple(clips.placements[name].sample.id for name, _ in found),
            num_replaced=num_replaced,
            segment=segment,
            latents=tensors["latents"],
            reference=tensors["reference"],
            prompts=tuple(clips.placements[name].sample.prompt for name, _ in found),
        )


def _read(cache: ClipCache, piece: Piece, window: Window) -> tuple[str, Entry]:
    return piece.name, cache.read(piece, window)


def _stack(entries: Sequence[Entry]) -> dict[str, Tensor]:
    return {
        name: torch.stack([entry.tensors[name] for entry in entries]) for name in entries[0].tensors
    }
