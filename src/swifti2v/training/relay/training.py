"""Relay LoRA: a resolution learned from images alone, apart from what images are not.

``W1 = W0 + B1 A1`` learns low-resolution images, as videos of one frame; ``W1 + B2 A2`` learns
high-resolution ones. ``W0 + B2 A2`` samples: what turns a video model into one of images stays in
the first LoRA and is dropped, what turns a small model into a large one is kept.

Source:
    ViBe, arXiv:2603.23326 (relay LoRA).
"""

from collections.abc import Mapping
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from swifti2v.config import AttentionConfig, settings, to_dict
from swifti2v.errors import ConfigError
from swifti2v.models.attention import GclfAttention
from swifti2v.models.loading.components import Components
from swifti2v.models.lora.merge import merge_lora
from swifti2v.models.lora.provenance import (
    RECIPE,
    RELAY1,
    RELAY2,
    STEPS,
    hash_base,
    require_first,
    save_trained_lora,
)
from swifti2v.models.vae.streaming import scale_factors
from swifti2v.models.weights.files import read_metadata
from swifti2v.shapes import LatentShape, PixelShape
from swifti2v.training.adapters import AdapterConfig, adapter_state_dict, add_adapter
from swifti2v.training.cache.prompt_embeddings import embed_prompts
from swifti2v.training.costs.feeding import FeedWishes
from swifti2v.training.costs.plan import EmptyStage, TrainingPlan, crop_shape
from swifti2v.training.data.phases import ClipsPhase, find_clips
from swifti2v.training.data.record import require_same_clips
from swifti2v.training.engine.ranks import gather_weights
from swifti2v.training.engine.run_config import RunConfig
from swifti2v.training.engine.session import Session, train_task
from swifti2v.training.engine.trackers import Tracker
from swifti2v.training.relay.degradations import degrade_latents
from swifti2v.training.relay.image_task import ImageObjective, ImageTask
from swifti2v.training.stages.clip_sources import ClipCrops
from swifti2v.training.stages.loading import load_for_training


@settings
class RelayConfig:
    """One of the two LoRAs."""

    phases: tuple[ClipsPhase, ...]
    """Images: their buckets have one frame."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """The LoRA."""
    objective: ImageObjective = field(default_factory=ImageObjective)
    """Loss and noise levels."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Attention of sampling at this size."""
    crop: int | None = None
    """Side of a random square to train on instead of whole images."""

    def __post_init__(self) -> None:
        for num_frames, height, width in self.buckets:
            if num_frames != 1:
                raise ConfigError(
                    f"bucket {num_frames}x{height}x{width} is one of clips; a relay takes images, "
                    f"such as 1x{height}x{width}"
                )
            if self.crop is not None and self.crop > min(height, width):
                raise ConfigError(
                    f"crop {self.crop} is larger than the bucket {width}x{height}; take a smaller "
                    "one"
                )

    @property
    def buckets(self) -> list[PixelShape]:
        """Buckets of all phases."""
        return [shape for phase in self.phases for shape in phase.data.rules.shapes]


@settings
class RelayTraining:
    """Settings of ``swifti2v train relay``."""

    model: str = "nano"
    """Model whose Stage II without its own LoRAs is W0, see
    ``SwiftI2VPipeline.from_pretrained``."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Changes to the model's settings."""
    num_procedural_images: int = 8
    """Images of each bucket, where no manifest is given."""
    first: RelayConfig | None = None
    """Low-resolution images; none leaves it out."""
    first_lora: str | None = None
    """File of a first LoRA that was trained before, instead of ``first``."""
    second: RelayConfig | None = None
    """High-resolution images, on what the first LoRA is fused into; none stops before it."""
    run: RunConfig = field(default_factory=RunConfig)
    """Batch, precision, checkpoints; of both."""

    def __post_init__(self) -> None:
        if self.first is None and self.second is None:
            raise ConfigError("neither first nor second is set; a relay trains at least one LoRA")
        if self.first is not None and self.first_lora is not None:
            raise ConfigError(
                f"first_lora is {self.first_lora}, but first would be trained; leave one of them out"
            )
        if self.first is not None and self.first.adapter.use_dora:
            raise ConfigError(
                "first.adapter.use_dora is true; the first LoRA is fused as W0 + B A, so only the "
                "second can be a DoRA"
            )
        if self.run.validation_steps is not None:
            raise ConfigError(
                f"run.validation_steps is {self.run.validation_steps}, but a relay measures nothing "
                "on its way; leave it out, and compare clips with 'swifti2v upscale --lora'"
            )

    @property
    def relays(self) -> dict[str, RelayConfig]:
        """Relays to train, in order, by their recipe."""
        both = {RELAY1: self.first, RELAY2: self.second}
        return {recipe: relay for recipe, relay in both.items() if relay is not None}


def train_relay(config: RelayTraining, session: Session) -> Path:
    """Train the first LoRA, fuse it, and train the second one on top.

    Each has its checkpoints in a directory of its own, ``relay1`` and ``relay2``, and each begins
    with the model as it is on disk and, for the second, the first one's file: stopped anywhere and
    continued, a relay ends as if it had not been stopped.

    Returns:
        ``relay2.safetensors``, or ``relay1.safetensors`` where that is all; where it was stopped
        before there is one, the run's directory.

    Raises:
        SwiftI2VError: See ``Trainer.run``; bad files and sizes before a step is done.
    """
    directory, steps_before = session.directory, 0
    written = directory
    lora1 = None if config.first_lora is None else Path(config.first_lora)
    try:
        for recipe in config.relays:
            file = directory / f"{recipe}.safetensors"
            if recipe == RELAY2 or not file.is_file():
                limit = session.max_steps
                left = None if limit is None else max(0, limit - steps_before)
                trackers = tuple(_Later(tracker, steps_before) for tracker in session.trackers)
                own = replace(
                    session, directory=directory / recipe, trackers=trackers, max_steps=left
                )
                if left == 0 or not _train_one(config, recipe, lora1, own, file):
                    return written
                session.ranks.wait()
            written = lora1 = file
            steps_before += int(read_metadata(file)[STEPS])
        return written
    finally:
        for tracker in session.trackers:
            tracker.close()


def _train_one(
    config: RelayTraining, recipe: str, lora1: Path | None, session: Session, file: Path
) -> bool:
    """Train a LoRA as far as it is asked for; write it unless it is an unfinished first one."""
    relay, run, ranks = config.relays[recipe], config.run, session.ranks
    clips = find_clips(relay.phases, config.num_procedural_images, run, session.directory, ranks)
    require_same_clips(clips, session)
    roles = ("stage2_transformer", "stage2_vae", "text_encoder")
    pipe = load_for_training(config.model, config.generation, "stage2", roles, ranks.device)
    parts, transformer = pipe.components, pipe.components.stage2_transformer
    stage2 = replace(pipe.config.stage2, attention=relay.attention)
    require_sizes(relay, parts)
    base_hash = hash_base(transformer)
    if lora1 is not None and recipe == RELAY2:
        require_first(transformer, lora1)
        merge_lora(transformer, lora1)
    add_adapter(transformer, relay.adapter)
    task = ImageTask(
        transformer,
        parts.stage2_vae,
        tuple(ClipCrops(own, relay.crop) for own in clips),
        relay.objective,
        replace(pipe.config, stage2=stage2),
        partial(embed_prompts, parts),
    )
    trainer = train_task(task, run, relay.phases, session)
    if recipe == RELAY1 and trainer.phase < len(relay.phases):
        return False
    state = gather_weights(adapter_state_dict(transformer))
    if ranks.is_first:
        save_trained_lora(
            state,
            file,
            alpha=relay.adapter.resolved_alpha,
            base=config.model,
            base_hash=base_hash,
            settings=to_dict(config),
            metadata={RECIPE: recipe, STEPS: str(trainer.step)},
        )
    return True


def require_sizes(relay: RelayConfig, parts: Components) -> None:
    """Refuse images that the model, its attention or the loss cannot take.

    Raises:
        ShapeError: The images are refused.
    """
    patch = int(parts.stage2_transformer.config["patch_size"][1])
    scale = scale_factors(parts.stage2_vae, patch)
    objective = relay.objective
    for bucket in relay.buckets:
        latents = LatentShape.from_pixel_shape(crop_shape(bucket, relay.crop), scale, channels=1)
        if relay.attention.kind == "gclf":
            GclfAttention(relay.attention, latents.height // patch, latents.width // patch)
        if objective.loss == "hfato" and objective.degradation is not None:
            cells = torch.zeros(1, 1, 1, latents.height, latents.width)
            degrade_latents(cells, objective.degradation, torch.Generator())


class _Later:
    """A tracker that goes on counting where the relay before left off; it is closed by its owner."""

    def __init__(self, tracker: Tracker, first_step: int) -> None:
        self.tracker, self.first_step = tracker, first_step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Tracker``."""
        self.tracker.log(self.first_step + step, metrics)

    def log_image(self, step: int, name: str, path: Path) -> None:
        """See ``Tracker``."""
        self.tracker.log_image(self.first_step + step, name, path)

    def close(self) -> None:
        """Leave it open."""


def plan_relay(config: RelayTraining) -> list[TrainingPlan]:
    """Predict both LoRAs of a relay, each as if its attention were full.

    Raises:
        LoadingError: See ``plan_stage``.
        ShapeError: A bucket does not fit the model.
    """
    stage = EmptyStage(config.model, "stage2", ["stage2_vae", "text_encoder"])
    return [
        stage.plan(
            recipe,
            config.run,
            relay.phases,
            relay.adapter,
            FeedWishes(crop=relay.crop, pixel_bytes=12),
        )
        for recipe, relay in config.relays.items()
    ]
