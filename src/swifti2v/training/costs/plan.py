"""What a training will take on each rank, predicted from configurations before weights are loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn

from swifti2v.models.loading.architectures import Architecture, find_architecture
from swifti2v.models.loading.sources import ComponentSource, find_model
from swifti2v.models.vae.streaming import scale_factors
from swifti2v.segments import plan_segments
from swifti2v.shapes import LatentShape, PixelShape, ScaleFactors
from swifti2v.training.adapters import AdapterConfig, find_targets
from swifti2v.training.data.buckets import format_bucket
from swifti2v.training.engine.memory import (
    MemoryPrediction,
    ParameterCount,
    TransformerSize,
    count_parameters,
    predict_activations,
    predict_memory,
)
from swifti2v.training.engine.optimizers import OptimizerConfig
from swifti2v.training.engine.run_config import PhaseConfig, RunConfig
from swifti2v.training.engine.work import count_flops
from swifti2v.training.nano.config import NanoConfig, TextEncoderConfig
from swifti2v.training.nano.models import (
    STAGE1_SCALE,
    STAGE2_SCALE,
    make_stage1_transformer,
    make_stage2_transformer,
)
from swifti2v.training.nano.text_encoder import MotionClassifier
from swifti2v.training.relay.training import RelayTraining
from swifti2v.training.stages.config import Stage1FineTuning, Stage2FineTuning
from swifti2v.training.vae.training import VaeTrainingConfig
from swifti2v.training.windows import WindowConfig

FROZEN_BYTES = 2
"""Of a weight that is not trained, on a GPU."""
CLIP_TOKENS = 257
"""Of the photo's embedding, where the transformer takes one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplePlan:
    """The largest samples of a phase."""

    phase: str
    """Its name."""
    what: str
    """For people."""
    tokens: int
    """Of one sample; 0 where they are not counted."""
    flops: float = 0.0
    """Of one sample, see ``count_flops``; 0 where they are not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """What one part of a training takes."""

    part: str
    """What is trained."""
    parameters: ParameterCount
    """Of the model, with its adapter."""
    run: RunConfig
    """Batch and precision."""
    optimizers: Sequence[OptimizerConfig]
    """Of the phases."""
    samples: Sequence[SamplePlan]
    """Of the phases."""
    size: TransformerSize | None = None
    """Decides the activations; None where they are not predicted."""
    num_text_tokens: int = 0
    """Of one sample."""
    frozen_bytes: Mapping[str, int] = field(default_factory=dict)
    """Parts beside the model that every rank holds whole on a GPU."""

    def fits(self, num_ranks: int) -> bool:
        """Whether a step's samples divide over so many ranks."""
        run = self.run
        parts = run.num_micro_batches * num_ranks
        return run.batch_size % parts == 0 and num_ranks % run.num_replicas == 0

    def predict_memory(self, num_ranks: int) -> MemoryPrediction:
        """Bytes on each of so many ranks, in the phase that takes the most."""
        run = self.run
        num_samples = run.batch_size // (run.num_micro_batches * num_ranks)
        activations = None
        if self.size is not None:
            activations = predict_activations(
                self.size,
                num_samples * max(sample.tokens for sample in self.samples),
                num_text_tokens=num_samples * self.num_text_tokens,
                is_checkpointed=run.gradient_checkpointing,
                compute=run.precision,
            )
        predictions = [
            predict_memory(
                self.parameters.total,
                self.parameters.trainable,
                optimizer,
                has_ema=run.ema_decay is not None,
                num_shards=num_ranks // run.num_replicas,
                bytes_per_frozen=FROZEN_BYTES,
                activations=activations,
            )
            for optimizer in self.optimizers
        ]
        return max(predictions, key=lambda prediction: prediction.total)


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
    transformer, models, num_text_tokens = _make_empty(config.model, stage, frozen)
    scale = scale_factors(models[vae], transformer.config["patch_size"][1])
    if isinstance(config, Stage2FineTuning):
        windows, crop, adapter = config.objective.windows, config.crop, None
    else:
        windows, crop, adapter = None, None, config.adapter
    samples = [
        max(
            (_Sample.of(shape, crop, windows, scale) for shape in phase.data.rules.shapes),
            key=lambda sample: sample.tokens,
        )
        for phase in config.phases
    ]
    return _plan_transformer(
        stage,
        transformer,
        _count_trained(transformer, adapter),
        config.run,
        config.phases,
        samples,
        num_text_tokens=num_text_tokens,
        frozen_bytes=_frozen_bytes(models),
    )


def plan_relay(config: RelayTraining) -> list[TrainingPlan]:
    """Predict both LoRAs of a relay, each as if its attention were full.

    Raises:
        LoadingError: See ``plan_stage``.
        ShapeError: A bucket does not fit the model.
    """
    frozen = ["stage2_vae", "text_encoder"]
    transformer, models, num_text_tokens = _make_empty(config.model, "stage2", frozen)
    scale = scale_factors(models["stage2_vae"], transformer.config["patch_size"][1])
    return [
        _plan_transformer(
            recipe,
            transformer,
            _count_trained(transformer, relay.adapter),
            config.run,
            relay.phases,
            [
                max(
                    (_Sample.of(s, relay.crop, None, scale) for s in phase.data.rules.shapes),
                    key=lambda sample: sample.tokens,
                )
                for phase in relay.phases
            ],
            num_text_tokens=num_text_tokens,
            frozen_bytes=_frozen_bytes(models),
        )
        for recipe, relay in config.relays.items()
    ]


def _make_empty(model: str, stage: str, frozen: Sequence[str]) -> tuple[Any, dict[str, Any], int]:
    """A stage's transformer and its frozen parts without memory, and the tokens of a prompt."""
    index, root = find_model(model)
    own = f"{stage}_transformer"
    models: dict[str, Any] = {
        role: find_architecture(role, index.components[role], root).make_empty(role)
        for role in (own, *frozen)
        if role in index.components
    }
    return models.pop(own), models, index.max_text_length


def _frozen_bytes(models: Mapping[str, nn.Module]) -> dict[str, int]:
    return {role: FROZEN_BYTES * count_parameters(model).total for role, model in models.items()}


def plan_vae(config: VaeTrainingConfig) -> TrainingPlan:
    """Predict the training of a VAE, without its activations.

    Raises:
        LoadingError: There is no such model.
    """
    architecture = Architecture(AutoencoderKLWan, config.vae)
    if config.model is not None:
        architecture = find_architecture("vae", ComponentSource(source=config.model), Path())
    vae = architecture.make_empty("vae").requires_grad_(True)
    samples = []
    for phase in config.phases:
        shapes = [_crop(shape, config.crop) for shape in phase.data.rules.shapes]
        largest = max(shapes, key=prod)
        samples.append(SamplePlan(phase=phase.name, what=format_bucket(largest), tokens=0))
    return TrainingPlan(
        part="vae",
        parameters=count_parameters(vae),
        run=config.run,
        optimizers=[phase.optimizer for phase in config.phases],
        samples=samples,
    )


def plan_text_encoder(config: TextEncoderConfig) -> TrainingPlan:
    """Predict the training of nano's text encoder, without its activations."""
    with torch.device("meta"):
        model = MotionClassifier(config)
    what = f"{config.max_tokens} bytes of a prompt"
    return TrainingPlan(
        part="text",
        parameters=count_parameters(model),
        run=config.run,
        optimizers=[phase.optimizer for phase in config.phases],
        samples=[
            SamplePlan(phase=phase.name, what=what, tokens=config.max_tokens)
            for phase in config.phases
        ],
    )


def plan_nano(config: NanoConfig) -> list[TrainingPlan]:
    """Predict the parts of nano's training."""
    width, first, second = config.text.width, config.stage1, config.stage2
    with torch.device("meta"):
        models = (
            make_stage1_transformer(first.size, width),
            make_stage2_transformer(second.size, width),
        )
    largest = (
        max(config.low_sizes(phase.scale), key=lambda size: size.num_pixels)
        for phase in first.phases
    )
    drawn = [
        _Sample(PixelShape(config.num_frames, *size), 1 + max(first.num_drawn_frames), STAGE1_SCALE)
        for size in largest
    ]
    windows = second.objective.windows
    shapes = [PixelShape(max(p.num_frames), second.crop, second.crop) for p in second.phases]
    cut = [_Sample.of(shape, None, windows, STAGE2_SCALE) for shape in shapes]
    return [
        plan_text_encoder(config.text),
        _plan_transformer(
            "stage1",
            models[0],
            count_parameters(models[0]),
            first.run,
            first.phases,
            drawn,
            num_text_tokens=config.max_text_length,
        ),
        _plan_transformer(
            "stage2",
            models[1],
            count_parameters(models[1]),
            second.run,
            second.phases,
            cut,
            num_text_tokens=1,  # its prompt is empty
        ),
    ]


class _Sample(NamedTuple):
    """What a transformer sees of a clip."""

    shape: PixelShape
    num_latent_frames: int
    scale: ScaleFactors

    @classmethod
    def of(
        cls, shape: PixelShape, crop: int | None, windows: WindowConfig | None, scale: ScaleFactors
    ) -> "_Sample":
        """The longest window of a clip, or all of it without ``windows``.

        Raises:
            ShapeError: The clip does not fit the model.
        """
        cropped = _crop(shape, crop)
        latents = LatentShape.from_pixel_shape(cropped, scale, channels=1)
        if windows is None:
            return cls(cropped, latents.num_frames, scale)
        lengths = [
            len(segment.window)
            for size, context in product(windows.segment_sizes, windows.context_sizes)
            for segment in plan_segments(latents.num_frames, size, context)
        ]
        return cls(cropped, max(lengths, default=1), scale)

    @property
    def tokens(self) -> int:
        """Of the frames that are seen."""
        side = self.scale.side
        return self.num_latent_frames * (self.shape.height // side) * (self.shape.width // side)


def _plan_transformer(
    part: str,
    transformer: Any,
    parameters: ParameterCount,
    run: RunConfig,
    phases: Sequence[PhaseConfig],
    samples: Sequence[_Sample],
    *,
    num_text_tokens: int,
    frozen_bytes: Mapping[str, int] | None = None,
) -> TrainingPlan:
    takes_photo = transformer.config.get("image_dim") is not None
    plans = [
        SamplePlan(
            phase=phase.name,
            what=f"{sample.num_latent_frames} latent frames of {format_bucket(sample.shape)}",
            tokens=sample.tokens,
            flops=count_flops(
                transformer.config,
                sample.tokens,
                1,
                parameters,
                num_text_tokens=num_text_tokens,
                num_image_tokens=CLIP_TOKENS if takes_photo else 0,
            ),
        )
        for phase, sample in zip(phases, samples, strict=True)
    ]
    return TrainingPlan(
        part=part,
        parameters=parameters,
        run=run,
        optimizers=[phase.optimizer for phase in phases],
        samples=plans,
        size=TransformerSize.from_config(transformer.config),
        num_text_tokens=num_text_tokens,
        frozen_bytes=frozen_bytes or {},
    )


def _crop(shape: PixelShape, side: int | None) -> PixelShape:
    return shape if side is None else shape._replace(height=side, width=side)


def _count_trained(transformer: nn.Module, adapter: AdapterConfig | None) -> ParameterCount:
    """Parameters of a transformer that is trained whole, or through an adapter."""
    total = count_parameters(transformer).total
    if adapter is None:
        return ParameterCount(total, total)
    trained = 0
    for name in find_targets(transformer, adapter.target_modules):
        num_outputs, *inputs = transformer.get_parameter(f"{name}.weight").shape
        trained += adapter.rank * (prod(inputs) + num_outputs)
        trained += num_outputs if adapter.use_dora else 0
    return ParameterCount(total + trained, trained)
