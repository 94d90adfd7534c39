"""Clips of a manifest for Stage I and Stage II, encoded before the training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swifti2v.errors import MediaError
from swifti2v.models.fingerprints import fingerprint_model
from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.pipelines.course import even_course
from swifti2v.training.cache.fingerprints import hash_source, make_key
from swifti2v.training.cache.prompt_embeddings import REMEDY
from swifti2v.training.cache.tensor_cache import CachedTensors, TensorCache
from swifti2v.training.data.buckets import format_bucket
from swifti2v.training.data.clips import LoadedClip, ManifestClips, Piece
from swifti2v.training.data.decoding import draw_first
from swifti2v.training.data.samples import Sample
from swifti2v.training.engine.draws import Draw
from swifti2v.training.stages.batches import Stage1Latents, Stage2Latents
from swifti2v.training.stages.clip_sources import Stage1Clips, Stage2Clips
from swifti2v.training.stages.encoded_clips import EncodedPixels, EncodedStage1

CODE = 3
"""Version of the code; raised when the same clip and VAE give other latents than before."""
Window = tuple[int, ...]
"""Latent frames of an entry; an empty tuple means all."""


def open_latents(directory: Path, stage: str, vae: VideoVAE, **others: Any) -> TensorCache:
    """The cache of a stage's latents, below the directory of all caches of a training.

    What decides the latents besides the VAE comes in ``others``, as plain values.

    Raises:
        InputError: The directory is of another VAE or of other settings.
    """
    model: Any = vae  # untyped in diffusers
    fingerprint = {"kind": stage, "vae": fingerprint_model(model), "code": CODE, **others}
    return TensorCache(directory / stage, fingerprint)


class ClipCache:
    """Latents of pieces of clips. An entry knows the files it was made from.

    A piece that could not be read has an entry too, so that training skips it as well.
    """

    def __init__(self, clips: ManifestClips, cache: TensorCache) -> None:
        self.clips, self.cache = clips, cache
        self._hashes: dict[str, dict[str, Any]] = {}

    def key(self, piece: Piece, window: Window = ()) -> str:
        """Name of an entry, from its clip, the part of it and its latent frames."""
        placement = self.clips.placements[piece.name]
        sample, fps = placement.sample, self.clips.fps
        reference = "" if sample.reference is None else sample.reference.name
        parts = (*placement.bucket, *piece.crop, *window)
        return make_key(sample.id, reference, fps, self._first(piece), *parts)

    def has(self, piece: Piece, window: Window = ()) -> bool:
        """Whether the cache holds tensors of the present files."""
        return self.cache.record(self.key(piece, window)) == self._origin(piece)

    def read(self, piece: Piece, window: Window = ()) -> CachedTensors:
        """An entry, with tensors in float32.

        Raises:
            MediaError: The piece could not be read when the cache was made.
            InputError: The entry is missing, or the files have changed since.
        """
        name = f"{self._describe(piece)}, latent frames {', '.join(map(str, window)) or 'all'}"
        entry = self.cache.require(self.key(piece, window), name, self._origin(piece), REMEDY)
        if (reason := entry.record.get("unreadable")) is not None:
            raise MediaError(str(reason))
        return CachedTensors(
            entry.record, {k: tensor.float() for k, tensor in entry.tensors.items()}
        )

    def take(
        self, pieces: Sequence[Piece], window: Window
    ) -> tuple[list[Sample], int, dict[str, Tensor]]:
        """Samples, how many were replaced, and the tensors of all, as ``ManifestClips.take`` does."""

        def read(piece: Piece) -> tuple[Sample, dict[str, Tensor]]:
            return self.clips.placements[piece.name].sample, self.read(piece, window).tensors

        found, num_replaced = self.clips.take(pieces, read)
        names = found[0][1]
        tensors = {name: torch.stack([own[name] for _, own in found]) for name in names}
        return [sample for sample, _ in found], num_replaced, tensors

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
        """Hashes of the files of a piece at their first use."""
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
    """Hash of a file whose path or content a function gives; None if it is gone."""
    try:
        source = open_()
        if isinstance(source, Path):
            return hash_source(source)
        with source:
            return hash_source(source)
    except (OSError, MediaError):
        return None


class CachedStage1:
    """Clips of Stage I that are encoded before the training: a ``Stage1Source``."""

    def __init__(self, clips: Stage1Clips, encoder: EncodedStage1, cache: ClipCache) -> None:
        self.clips, self.encoder, self.cache = clips, encoder, cache

    def ask(self, draw: Draw) -> tuple[list[Piece], Window]:
        """Pieces of clips of a micro-batch, and which of their latent frames are kept: all."""
        return self.clips.clips.pieces(draw), ()

    def make(
        self, clip: LoadedClip, piece: Piece, windows: Sequence[Window]
    ) -> dict[Window, dict[str, Tensor]]:
        """Entries of a piece, without a batch dimension, in the VAE's own precision."""
        del piece, windows  # all of the clip
        dtype = self.encoder.pipeline.vae.dtype
        latents, condition, embeds = self.encoder.encode(self.clips.batch([clip]))
        tensors = {"latents": latents[0].to(dtype), "condition": condition[0].to(dtype)}
        return {(): tensors if embeds is None else {**tensors, "image_embeds": embeds[0]}}

    def load(self, draw: Draw) -> Stage1Latents:
        """See ``Stage1Source``."""
        samples, num_replaced, tensors = self.cache.take(*self.ask(draw))
        return Stage1Latents(
            ids=tuple(sample.id for sample in samples),
            num_replaced=num_replaced,
            prompts=tuple(sample.prompt for sample in samples),
            course=even_course(self.clips.clips.bucket(draw.step).num_frames),
            encoded=(tensors["latents"], tensors["condition"], tensors.get("image_embeds")),
        )

    def encode(self, batch: Stage1Latents) -> tuple[Tensor, Tensor, Tensor | None]:
        """See ``Stage1Source``."""
        latents, condition, embeds = batch.encoded
        device = self.encoder.pipeline.vae.device
        embeds = None if embeds is None else embeds.to(device)
        return latents.to(device), condition.to(device), embeds


class CachedStage2:
    """Windows of clips that are encoded before the training: a ``Stage2Source``."""

    def __init__(self, clips: Stage2Clips, encoder: EncodedPixels, cache: ClipCache) -> None:
        self.clips, self.encoder, self.cache = clips, encoder, cache

    def ask(self, draw: Draw) -> tuple[list[Piece], Window]:
        """Pieces of clips of a micro-batch, and which of their latent frames are kept.

        Pieces that come again, each time with another window, are kept whole.
        """
        pieces, segment = self.clips.ask(draw)
        return pieces, segment.window if self.clips.clips.num_pieces is None else ()

    def make(
        self, clip: LoadedClip, piece: Piece, windows: Sequence[Window]
    ) -> dict[Window, dict[str, Tensor]]:
        """Entries of a piece, without a batch dimension, in the VAE's own precision."""
        vae = self.encoder.vae
        whole = self.clips.all_frames(piece)
        covered = self.clips.cover([frame for window in windows for frame in window or whole])
        video, small = self.clips.cut(clip, piece, covered)
        pair = self.encoder.encode_pair(
            torch.from_numpy(video), None if small is None else torch.from_numpy(small)
        )
        latents, reference = (own[0].to(vae.dtype) for own in pair)
        places = {own: [covered.index(frame) for frame in own or whole] for own in windows}
        return {
            window: {"latents": latents[:, at], "reference": reference[:, at]}
            for window, at in places.items()
        }

    def load(self, draw: Draw) -> Stage2Latents:
        """See ``Stage2Source``."""
        pieces, window = self.ask(draw)
        samples, num_replaced, tensors = self.cache.take(pieces, window)
        segment = self.clips.segment(draw)
        if window == ():
            tensors = {name: own[:, :, list(segment.window)] for name, own in tensors.items()}
        return Stage2Latents(
            ids=tuple(sample.id for sample in samples),
            num_replaced=num_replaced,
            prompts=tuple(sample.prompt for sample in samples),
            segment=segment,
            encoded=(tensors["latents"], tensors["reference"]),
        )

    def encode(self, batch: Stage2Latents) -> tuple[Tensor, Tensor]:
        """See ``Stage2Source``."""
        latents, reference = (own.to(self.encoder.vae.device) for own in batch.encoded)
        return latents, reference
