"""Output of a training's frozen encoders, computed before the training and kept."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path

import torch

from swifti2v.errors import ConfigError, InputError, MediaError
from swifti2v.jobs.devices import choose_device
from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.models.vae.streaming import scale_factors
from swifti2v.shapes import LatentShape, PixelShape
from swifti2v.shards import is_in_shard
from swifti2v.training.cache.fingerprints import make_key
from swifti2v.training.cache.prompt_embeddings import CachedPrompts
from swifti2v.training.cache.tensor_cache import SHARD_BYTES
from swifti2v.training.data.clips import Piece
from swifti2v.training.data.phases import find_clips
from swifti2v.training.engine.draws import Draw
from swifti2v.training.engine.ranks import Ranks
from swifti2v.training.stages.cached_clips import ClipCache, Window
from swifti2v.training.stages.config import Stage1FineTuning, Stage2FineTuning
from swifti2v.training.stages.loading import load_for_training
from swifti2v.training.stages.recipes import find_recipe

OnProgress = Callable[[int, int], None]
"""Told how many prompts and pieces of how many are done."""


@dataclass(frozen=True, slots=True)
class PieceJob:
    """A piece of a clip that steps ask for."""

    phase: int
    """Index of the phase."""
    piece: Piece
    """Piece of a clip."""
    windows: tuple[Window, ...]
    """Latent frames to keep of it, each as an entry; the empty one keeps all."""


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Entries that a shard makes."""

    prompts: tuple[str, ...]
    """All different ones, of whole manifests."""
    jobs: tuple[PieceJob, ...]
    """Each piece once; none where only prompts are asked for."""
    num_bytes: int
    """Bytes of all latents."""

    @property
    def num_entries(self) -> int:
        """Windows of all pieces."""
        return sum(len(job.windows) for job in self.jobs)

    def split(self, num_parts: int) -> list[list["str | PieceJob"]]:
        """Prompts and pieces in batches for ``CacheActor``, at least so many if there are enough.

        A batch of pieces is at most what a file of the cache takes.
        """
        piece_bytes = self.num_bytes / max(1, len(self.jobs))
        most = max(1, int(SHARD_BYTES / max(piece_bytes, 1)))
        lists: tuple[Sequence[str | PieceJob], ...] = (self.prompts, self.jobs)
        batches = []
        for items in lists:
            size = min(most, -(-len(items) // num_parts)) or 1
            batches += [list(items[at : at + size]) for at in range(0, len(items), size)]
        return batches


@dataclass(kw_only=True, slots=True)
class CacheReport:
    """Result of a run for a plan."""

    prompts_made: int = 0
    prompts_kept: int = 0
    entries_made: int = 0
    entries_kept: int = 0
    unreadable: int = 0
    """Pieces that could not be read; others of the bucket stand in for them."""

    def add(self, other: "CacheReport") -> None:
        """Add the counts of another run."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


class CacheMaking:
    """Fills the cache of a training with what its steps will ask for, and nothing else.

    If the ``cache`` of the settings asks for prompts only, only they are made. Shard ``(i, n)`` is
    the i-th of n parts, from 1.

    Raises:
        InputError: The directory is of other models or settings.
    """

    def __init__(
        self,
        config: Stage1FineTuning | Stage2FineTuning,
        directory: Path,
        device: torch.device,
        shard: tuple[int, int] = (1, 1),
    ) -> None:
        self.config, self.shard, recipe = config, shard, find_recipe(config)
        self.pipe = load_for_training(
            config.model, config.generation, recipe.stage, recipe.frozen, device
        )
        run, alone = config.run, Ranks.alone(device)
        clips = find_clips(config.phases, config.num_procedural_clips, run, directory, alone)
        self.prompts = CachedPrompts(directory, self.pipe.components)
        self.latents = recipe.open_latents(config, self.pipe, directory)
        self.sources = [recipe.make_source(config, self.pipe, own, self.latents) for own in clips]
        self.vae: VideoVAE = getattr(self.pipe.components, f"{recipe.stage}_vae")

    def plan(self, max_steps: int | None = None) -> CachePlan:
        """Go through the steps, or the first so many, and note what they draw; nothing is read.

        Raises:
            ConfigError: A phase is limited by minutes.
        """
        prompts = sorted({text for own in self.sources for text in own.cache.clips.prompts})
        prompts.append(self.pipe.config.negative_prompt)  # validation may guide
        found: dict[str, tuple[int, Piece, dict[Window, None]]] = {}
        if self.config.cache is None or self.config.cache.latents:
            for phase, draw in self._draws(max_steps):
                source = self.sources[phase]
                pieces, window = source.ask(draw)
                for piece in pieces:
                    key = source.cache.key(piece)
                    if is_in_shard(key, *self.shard):
                        found.setdefault(key, (phase, piece, {}))[2][window] = None
        jobs = tuple(PieceJob(phase, piece, tuple(own)) for phase, piece, own in found.values())
        own = [text for text in dict.fromkeys(prompts) if is_in_shard(make_key(text), *self.shard)]
        num_bytes = sum(self._count_bytes(job, window) for job in jobs for window in job.windows)
        return CachePlan(tuple(own), jobs, num_bytes)

    def run(self, plan: CachePlan, on_progress: OnProgress | None = None) -> CacheReport:
        """Make what is not there yet; what is finished when it is stopped is kept.

        Raises:
            MediaError: A clip cannot be read and such are not skipped, or a shard not written.
            InputError: None of a bucket's clips can be read.
        """
        report, total = CacheReport(), len(plan.prompts) + len(plan.jobs)
        with self.prompts.cache, self.latents:
            for number, prompt in enumerate(plan.prompts, 1):
                is_new = self.prompts.add(self.pipe.components, prompt)
                report.prompts_made += is_new
                report.prompts_kept += not is_new
                if on_progress is not None:
                    on_progress(number, total)
            for number, job in enumerate(plan.jobs, 1 + len(plan.prompts)):
                self._make(job, report)
                if on_progress is not None:
                    on_progress(number, total)
        return report

    def _draws(self, max_steps: int | None) -> Iterator[tuple[int, Draw]]:
        """Yield every step with its phase, all samples together."""
        run, step = self.config.run, 0
        for number, phase in enumerate(self.config.phases):
            if phase.steps is None:
                raise ConfigError(
                    f"phase {phase.name} is limited by minutes, so it is not known what it draws; "
                    "give steps"
                )
            stop = step + phase.steps
            while step < (stop if max_steps is None else min(stop, max_steps)):
                indices = tuple(range(run.batch_size))
                yield (
                    number,
                    Draw(seed=run.seed, step=step, batch_size=run.batch_size, indices=indices),
                )
                step += 1

    def _make(self, job: PieceJob, report: CacheReport) -> None:
        """Encode a piece, or what stands in for it."""
        source = self.sources[job.phase]
        cache: ClipCache = source.cache
        for piece in cache.clips.candidates(job.piece):
            missing = [window for window in job.windows if not cache.has(piece, window)]
            report.entries_kept += len(job.windows) - len(missing)
            if not missing:
                return
            try:
                clip = cache.clips.read(piece)
            except MediaError as error:
                if cache.clips.bad_samples == "stop":
                    raise
                report.unreadable += 1
                for window in missing:
                    cache.put_unreadable(piece, window, str(error))
                continue
            for window, tensors in source.make(clip, piece, missing).items():
                cache.put(piece, window, tensors)
            report.entries_made += len(missing)
            return
        raise InputError(f"no clip can stand in for {job.piece.name}; see `swifti2v data inspect`")

    def _count_bytes(self, job: PieceJob, window: Window) -> int:
        num_frames = (
            self.sources[job.phase].cache.clips.placements[job.piece.name].bucket.num_frames
        )
        pixels = PixelShape(num_frames, job.piece.crop.height, job.piece.crop.width)
        scale, channels = scale_factors(self.vae, patch=1), int(self.vae.config["z_dim"])
        latents = LatentShape.from_pixel_shape(pixels, scale, channels)
        num_values = prod(latents._replace(num_frames=len(window) or latents.num_frames))
        has_mask = isinstance(self.config, Stage1FineTuning)
        mask = num_values // channels * scale.time if has_mask else 0
        return (2 * num_values + mask) * self.vae.dtype.itemsize


class CacheActor:
    """A process of a cluster that makes prompts and pieces of a cache, with the models loaded once.

    What is there already, also from a process that died, is not made again.
    """

    def __init__(
        self,
        config: Stage1FineTuning | Stage2FineTuning,
        directory: Path,
        device: str | None,
    ) -> None:
        self.making = CacheMaking(config, directory, choose_device(device))

    def __call__(self, items: Sequence[str | PieceJob]) -> CacheReport:
        """Make a batch of ``CachePlan.split``; it is on disk then."""
        return self.making.run(
            CachePlan(
                prompts=tuple(item for item in items if isinstance(item, str)),
                jobs=tuple(item for item in items if isinstance(item, PieceJob)),
                num_bytes=0,
            )
        )
