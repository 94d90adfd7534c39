"""Training of either stage on manifests of clips, from a loaded model to weights on disk."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from PIL import Image
from torch import Tensor, nn

from swifti2v.config import GenerationConfig, parse_config, to_dict
from swifti2v.errors import InputError
from swifti2v.media import video_to_frames
from swifti2v.models.fingerprints import fingerprint_encoder
from swifti2v.models.image_encoder import describe_picture, encode_image
from swifti2v.models.loading.components import Components, load_components
from swifti2v.models.lora.export import save_lora
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.streaming import scale_factors
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.training.adapters import (
    AdapterConfig,
    adapter_state_dict,
    add_adapter,
    hash_base,
)
from swifti2v.training.cache.prompt_embeddings import REMEDY, CachedPrompts, embed_prompts
from swifti2v.training.cache.tensor_cache import TensorCache
from swifti2v.training.costs.plan import (
    ClipSample,
    TrainingPlan,
    count_frozen_bytes,
    count_trained,
    make_empty_models,
    plan_transformer,
)
from swifti2v.training.data.clips import ManifestClips
from swifti2v.training.data.phases import find_clips
from swifti2v.training.engine.ranks import Ranks, gather_weights, save_model
from swifti2v.training.engine.run_log import OnStep
from swifti2v.training.engine.task import Task
from swifti2v.training.engine.trackers import Tracker
from swifti2v.training.engine.trainer import Trainer
from swifti2v.training.stages.cached_clips import (
    CachedStage1Clips,
    CachedStage2Clips,
    ClipCache,
    open_latents,
)
from swifti2v.training.stages.clip_sources import Stage1Clips, Stage2Clips
from swifti2v.training.stages.config import Stage1FineTuning, Stage2FineTuning
from swifti2v.training.stages.stage1 import Stage1Task
from swifti2v.training.stages.stage2 import EncodePrompts, Stage2Task
from swifti2v.training.stages.validation import validate_stage1, validate_stage2


def make_task(
    config: Stage1FineTuning | Stage2FineTuning,
    pipe: SwiftI2VPipeline,
    clips: Sequence[ManifestClips],
    encode_prompts: EncodePrompts,
    *,
    latents: TensorCache | None = None,
    validate: Callable[[Path], Mapping[str, float]] | None = None,
) -> Stage1Task | Stage2Task:
    """What is trained, with the samples of each phase.

    Args:
        config: Settings.
        pipe: Its transformer of this stage is trained; the other parts are frozen.
        clips: Of each phase.
        encode_prompts: ``b`` prompts to embeddings.
        latents: From ``open_stage_latents``; None encodes frames in each step.
        validate: See ``Task``.
    """
    parts, settings = pipe.components, pipe.config
    if isinstance(config, Stage2FineTuning):
        windows = [
            Stage2Clips(
                own,
                parts.stage2_vae,
                settings.stage1.downscale,
                config.crop,
                settings.stage2,
            )
            for own in clips
        ]
        return Stage2Task(
            parts.stage2_transformer,
            parts.stage2_vae,
            tuple(_cached(CachedStage2Clips, own, latents) for own in windows),
            config.objective,
            settings.stage2,
            encode_prompts,
            validate,
        )
    time_factor = int(parts.stage1_vae.config["scale_factor_temporal"])
    return Stage1Task(
        parts.stage1_transformer,
        parts.stage1_vae,
        tuple(_cached(CachedStage1Clips, Stage1Clips(own, time_factor), latents) for own in clips),
        config.objective,
        settings.stage1,
        encode_prompts,
        None if parts.image_encoder is None else partial(embed_photos, parts),
        validate,
    )


def _cached(kind: Any, source: Stage1Clips | Stage2Clips, latents: TensorCache | None) -> Any:
    return source if latents is None else kind(source, ClipCache(source.clips, latents))


def open_stage_latents(
    config: Stage1FineTuning | Stage2FineTuning, pipe: SwiftI2VPipeline, directory: Path
) -> TensorCache:
    """The cache of the latents that a training of a stage takes.

    Raises:
        InputError: It is of another VAE, or of other settings.
    """
    parts, settings = pipe.components, pipe.config
    if isinstance(config, Stage2FineTuning):
        stage2 = settings.stage2
        return open_latents(
            directory,
            "stage2",
            parts.stage2_vae,
            downscale=settings.stage1.downscale,
            crop=config.crop,
            reference_start=stage2.reference_start,
            reference_detail=stage2.reference_detail,
            upsampling=stage2.upsampling,
        )
    clip = None
    if parts.image_encoder is not None and parts.image_processor is not None:
        weights = fingerprint_encoder(parts.image_encoder)
        clip = {"weights": weights, **describe_picture(parts.image_processor)}
    condition = settings.stage1.condition
    return open_latents(
        directory, "stage1", parts.stage1_vae, condition=condition, image_encoder=clip
    )


@torch.no_grad()
def embed_photos(parts: Components, photos: Tensor) -> Tensor:
    """``[b, L, D]`` of CLIP for photos ``[b, 3, 1, h, w]``."""
    encoder, processor = parts.image_encoder, parts.image_processor
    assert encoder is not None
    assert processor is not None
    images = [Image.fromarray(video_to_frames(photo[None])[0]) for photo in photos]
    with torch.autocast(encoder.device.type, enabled=False):
        return torch.cat([encode_image(encoder, processor, image) for image in images])


class FineTuning:
    """One training run of a stage.

    Args:
        config: Settings.
        directory: Of the run.
        ranks: Who takes part.
    """

    def __init__(
        self, config: Stage1FineTuning | Stage2FineTuning, directory: Path, ranks: Ranks
    ) -> None:
        self.config, self.directory, self.ranks = config, directory, ranks
        # Frozen parts need no more than 16 bits on a GPU; what is trained becomes float32 again.
        dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        self.is_stage2 = isinstance(config, Stage2FineTuning)
        self.components, defaults = load_components(
            # A LoRA belongs on the many-step base; the few-step one is added when sampling.
            config.model,
            dtype,
            torch.device("cpu"),
            merges_own_loras=self.is_stage2,
            stages=("stage2",) if self.is_stage2 else ("stage1",),  # the other one is not run
        )
        self.pipe = SwiftI2VPipeline(
            self.components, parse_config(GenerationConfig, defaults, config.model)
        )
        self.pipe.config = self.pipe.configure(**config.generation)
        self.pipe.encoder.truncate_prompt = True
        cache = None if config.cache is None else Path(config.cache.directory)
        if cache is not None and not cache.is_dir():
            raise InputError(f"cache.directory {cache} does not exist; {REMEDY}")
        self.clips = find_clips(
            config.phases, config.num_procedural_clips, config.run, cache or directory, ranks
        )
        encode_prompts: EncodePrompts = partial(embed_prompts, self.components)
        latents = None
        if config.cache is not None and cache is not None:
            encode_prompts = self._read_prompts(cache)
            if config.cache.latents:
                latents = open_stage_latents(config, self.pipe, cache)
        self.transformer = self._prepare_transformer()
        self.task: Task[Any] = make_task(
            config,
            self.pipe,
            self.clips,
            encode_prompts,
            latents=latents,
            validate=self._validate,
        )

    def run(
        self,
        *,
        resume: bool,
        max_steps: int | None,
        trackers: Sequence[Tracker] = (),
        on_step: OnStep | None = None,
    ) -> Path:
        """Train, then write the averaged weights.

        Returns:
            What was written: a transformer's directory, or a LoRA's file.
        """
        run = self.config.run
        trainer = Trainer(self.task, run, self.config.phases, self.directory, self.ranks, trackers)
        trainer.run(resume=resume, max_steps=max_steps, on_step=on_step)
        trainer.take_average()
        return self._export()

    def _prepare_transformer(self) -> nn.Module:
        """The one that is trained, and the parts it needs, on this rank's device."""
        parts, device = self.components, self.ranks.device
        own: nn.Module = parts.stage2_transformer if self.is_stage2 else parts.stage1_transformer
        needed = [own, parts.stage2_vae if self.is_stage2 else parts.stage1_vae]
        if self.config.cache is None:
            needed.append(parts.text_encoder)
        if parts.image_encoder is not None:
            needed.append(parts.image_encoder)
        for part in needed:
            part.to(device)
        parts.device = device
        if isinstance(self.config, Stage1FineTuning) and self.config.adapter is not None:
            self.base_hash = hash_base(own)
            add_adapter(parts.stage1_transformer, self.config.adapter)
            return own
        return own.float().requires_grad_(True)

    def _read_prompts(self, directory: Path) -> EncodePrompts:
        """Take all prompts from a cache, and free the text encoder's memory."""
        prompts = CachedPrompts(directory, self.components)
        prompts.require_all(prompt for clips in self.clips for prompt in clips.prompts)
        torch.nn.Module.to(self.components.text_encoder, "meta")
        self.pipe.encoder.cache = prompts
        return lambda texts: prompts(texts).to(self.ranks.device)

    def _validate(self, directory: Path) -> Mapping[str, float]:
        own = self.config.validation
        measure = validate_stage2 if self.is_stage2 else validate_stage1
        return measure(self.pipe, self.clips[0].examples(own.num_clips), directory, own.seed)

    def _export(self) -> Path:
        config = self.config
        if isinstance(config, Stage1FineTuning) and config.adapter is not None:
            state = gather_weights(adapter_state_dict(self.transformer))
            path = self.directory / "lora.safetensors"
            if self.ranks.is_first:
                self._save_lora(state, config.adapter, path)
            return path
        path = self.directory / "transformer"
        kind = SegmentTransformer3DModel if self.is_stage2 else WanTransformer3DModel
        save_model(kind, self.transformer, path, self.ranks)
        return path

    def _save_lora(self, state: Mapping[str, Tensor], adapter: AdapterConfig, path: Path) -> None:
        """In the keys of diffusers, and beside it in those of ComfyUI."""
        metadata = {
            "swifti2v_base": self.config.model,
            "swifti2v_base_sha256": self.base_hash,
            "swifti2v_config": json.dumps(to_dict(self.config)),
        }
        beside = path.with_name(f"{path.stem}_comfyui.safetensors")
        save_lora(state, path, "peft", alpha=adapter.resolved_alpha, metadata=metadata)
        if not adapter.use_dora:  # ComfyUI's keys have no place for magnitudes
            save_lora(state, beside, "original", alpha=adapter.resolved_alpha, metadata=metadata)


def plan_stage(config: Stage1FineTuning | Stage2FineTuning) -> TrainingPlan:
    """Predict the training of a stage from the configurations of its components.

    Args:
        config: Settings.

    Raises:
        LoadingError: A component's configuration is not on this machine, not known and cannot be
            downloaded.
        ShapeError: A bucket does not fit the model.
    """
    stage = "stage2" if isinstance(config, Stage2FineTuning) else "stage1"
    vae = f"{stage}_vae"
    # With a cache the text encoder is not run.
    frozen = [vae, *(["text_encoder"] if config.cache is None else [])]
    frozen += ["image_encoder"] if stage == "stage1" else []
    transformer, models, num_text_tokens = make_empty_models(config.model, stage, frozen)
    scale = scale_factors(models[vae], transformer.config["patch_size"][1])
    if isinstance(config, Stage2FineTuning):
        windows, crop, adapter = config.objective.windows, config.crop, None
    else:
        windows, crop, adapter = None, None, config.adapter
    samples = [
        max(
            (ClipSample.of(shape, crop, windows, scale) for shape in phase.data.rules.shapes),
            key=lambda sample: sample.tokens,
        )
        for phase in config.phases
    ]
    return plan_transformer(
        stage,
        transformer,
        count_trained(transformer, adapter),
        config.run,
        config.phases,
        samples,
        num_text_tokens=num_text_tokens,
        frozen_bytes=count_frozen_bytes(models),
    )
