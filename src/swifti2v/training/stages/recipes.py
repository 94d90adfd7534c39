"""A recipe for the training of each stage: models, samples, task and validation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn

from swifti2v.config import StageName
from swifti2v.models.fingerprints import fingerprint_encoder
from swifti2v.models.image_encoder import describe_picture
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.training.cache.tensor_cache import TensorCache
from swifti2v.training.data.clips import LoadedClip, ManifestClips
from swifti2v.training.stages.batches import EncodePrompts
from swifti2v.training.stages.cached_clips import (
    CachedStage1,
    CachedStage2,
    ClipCache,
    open_latents,
)
from swifti2v.training.stages.clip_sources import Stage1Clips, Stage2Clips
from swifti2v.training.stages.config import FineTuningConfig, Stage1FineTuning, Stage2FineTuning
from swifti2v.training.stages.encoded_clips import EncodedPixels, EncodedStage1, photo_encoder
from swifti2v.training.stages.latent_task import Validate
from swifti2v.training.stages.stage1 import Stage1Task
from swifti2v.training.stages.stage2 import Stage2Task
from swifti2v.training.stages.validation import validate_stage1, validate_stage2


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Training of a stage on manifests of clips."""

    stage: StageName
    """Stage that is trained."""
    frozen: tuple[str, ...]
    """Components that encode, by role."""
    pixel_bytes: int
    """Bytes of a pixel of the frames that workers hand over."""
    kind: type[nn.Module]
    """Class as which the trained transformer is written."""
    merges_own_loras: bool
    """Whether training starts from the model with its own LoRAs."""
    open_latents: Callable[[Any, SwiftI2VPipeline, Path], TensorCache]
    """Function that opens the stage's latents below the directory of all caches of a training."""
    make_source: Callable[[Any, SwiftI2VPipeline, ManifestClips, TensorCache | None], Any]
    """Function that makes the source of a phase; without latents, frames are encoded in each
    step."""
    make_task: Callable[[Any, SwiftI2VPipeline, tuple[Any, ...], EncodePrompts, Validate], Any]
    """Function that makes the task, which trains the pipeline's transformer on the phases'
    sources."""
    validate: Callable[[SwiftI2VPipeline, list[LoadedClip], Path, int], Mapping[str, float]]
    """Function that measures the pipeline on clips."""


def find_recipe(config: FineTuningConfig) -> Recipe:
    """Recipe of the stage that settings are of; its functions take them first."""
    return RECIPES[type(config)]


def _open_stage1(_: Stage1FineTuning, pipe: SwiftI2VPipeline, directory: Path) -> TensorCache:
    parts, clip = pipe.components, None
    if parts.image_encoder is not None and parts.image_processor is not None:
        weights = fingerprint_encoder(parts.image_encoder)
        clip = {"weights": weights, **describe_picture(parts.image_processor)}
    condition = pipe.config.stage1.condition
    return open_latents(
        directory, "stage1", parts.stage1_vae, condition=condition, image_encoder=clip
    )


def _make_stage1_source(
    _: Stage1FineTuning, pipe: SwiftI2VPipeline, clips: ManifestClips, latents: TensorCache | None
) -> EncodedStage1 | CachedStage1:
    frames, photos = Stage1Clips(clips), photo_encoder(pipe.components)
    encoded = EncodedStage1(frames, pipe.stage1, pipe.config.stage1, photos)
    return encoded if latents is None else CachedStage1(frames, encoded, ClipCache(clips, latents))


def _make_stage1_task(
    config: Stage1FineTuning,
    pipe: SwiftI2VPipeline,
    sources: tuple[Any, ...],
    encode_prompts: EncodePrompts,
    validate: Validate,
) -> Stage1Task:
    objective, stage1 = config.objective, pipe.config.stage1
    return Stage1Task(pipe.stage1, sources, objective, stage1, encode_prompts, validate)


def _open_stage2(config: Stage2FineTuning, pipe: SwiftI2VPipeline, directory: Path) -> TensorCache:
    stage2 = pipe.config.stage2
    return open_latents(
        directory,
        "stage2",
        pipe.components.stage2_vae,
        downscale=pipe.config.stage1.downscale,
        crop=config.crop,
        reference_start=stage2.reference_start,
        reference_detail=stage2.reference_detail,
        upsampling=stage2.upsampling,
    )


def _make_stage2_source(
    config: Stage2FineTuning,
    pipe: SwiftI2VPipeline,
    clips: ManifestClips,
    latents: TensorCache | None,
) -> EncodedPixels | CachedStage2:
    vae, settings = pipe.components.stage2_vae, pipe.config
    frames = Stage2Clips(
        clips, config.windows, vae, settings.stage1.downscale, config.crop, settings.stage2
    )
    encoded = EncodedPixels(frames, vae)
    return encoded if latents is None else CachedStage2(frames, encoded, ClipCache(clips, latents))


def _make_stage2_task(
    config: Stage2FineTuning,
    pipe: SwiftI2VPipeline,
    sources: tuple[Any, ...],
    encode_prompts: EncodePrompts,
    validate: Validate,
) -> Stage2Task:
    transformer, vae = pipe.components.stage2_transformer, pipe.components.stage2_vae
    own = config.objective, pipe.config.stage2
    return Stage2Task(transformer, vae, sources, *own, encode_prompts, validate)


RECIPES: dict[type[FineTuningConfig], Recipe] = {
    Stage1FineTuning: Recipe(
        stage="stage1",
        frozen=("stage1_vae", "text_encoder", "image_encoder"),
        pixel_bytes=12,  # float32
        kind=WanTransformer3DModel,
        merges_own_loras=False,
        open_latents=_open_stage1,
        make_source=_make_stage1_source,
        make_task=_make_stage1_task,
        validate=validate_stage1,
    ),
    Stage2FineTuning: Recipe(
        stage="stage2",
        frozen=("stage2_vae", "text_encoder"),
        pixel_bytes=3,
        kind=SegmentTransformer3DModel,
        merges_own_loras=True,
        open_latents=_open_stage2,
        make_source=_make_stage2_source,
        make_task=_make_stage2_task,
        validate=validate_stage2,
    ),
}
