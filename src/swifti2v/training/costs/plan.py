"""Costs of a training on each rank, predicted from configurations before weights are loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any, NamedTuple

from torch import nn

from swifti2v.models.loading.architectures import find_architecture
from swifti2v.models.loading.sources import find_model
from swifti2v.models.vae.streaming import scale_factors
from swifti2v.segments import plan_segments
from swifti2v.shapes import LatentShape, PixelShape, ScaleFactors
from swifti2v.training.adapters import AdapterConfig, find_targets
from swifti2v.training.costs.feeding import FeedPlan, FeedWishes, plan_feed
from swifti2v.training.data.buckets import format_bucket
from swifti2v.training.data.phases import ClipsPhase
from swifti2v.training.engine.memory import (
    ActivationSizes,
    MemoryPrediction,
    ParameterCount,
    count_parameters,
    predict_activations,
    predict_memory,
)
from swifti2v.training.engine.optimizers import OptimizerConfig
from swifti2v.training.engine.run_config import PhaseConfig, RunConfig
from swifti2v.training.engine.work import count_flops
from swifti2v.training.windows import WindowConfig
from swifti2v.units import GB

FROZEN_BYTES = 2
"""Bytes of a frozen weight on a GPU."""
PROCESS_BYTES, WORKER_BYTES = 2 * GB, GB // 5
"""Host memory of a rank's libraries (CUDA's part is a guess), and of a worker besides frames."""
CLIP_TOKENS = 257
"""Tokens of the photo's embedding, for transformers that take one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplePlan:
    """The largest samples of a phase."""

    phase: str
    """Name of the phase."""
    what: str
    """Description for people."""
    tokens: int
    """Tokens of one sample; 0 where they are not counted."""
    flops: float = 0.0
    """FLOP of one sample, see ``count_flops``; 0 where they are not counted."""
    num_steps: int | None = None
    """Steps of the phase; None where it is limited by minutes."""
    feed: FeedPlan | None = None
    """Costs of reading and encoding; None where they are not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """Bytes of host memory of one rank."""

    loading: int
    """While the weights are read, before they are on the GPU."""
    processes: int
    """Libraries of the rank and of its workers."""
    samples: int
    """Frames that workers read, and batches that wait."""
    checkpoint: int
    """Copy of what is saved, while it is written."""

    @property
    def total(self) -> int:
        """The most at one time."""
        return max(self.loading, self.processes + self.samples + self.checkpoint)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """Costs of one part of a training."""

    part: str
    """Name of the part."""
    parameters: ParameterCount
    """Parameters of the model, with its adapter."""
    run: RunConfig
    """Batch and precision."""
    optimizers: Sequence[OptimizerConfig]
    """Optimizers of the phases."""
    samples: Sequence[SamplePlan]
    """Samples of the phases."""
    size: ActivationSizes | None = None
    """Decides the activations; None where they are not predicted."""
    num_text_tokens: int = 0
    """Text tokens of one sample."""
    frozen_bytes: Mapping[str, int] = field(default_factory=dict)
    """Parts beside the model that every rank holds whole on a GPU."""

    @property
    def feeds(self) -> list[FeedPlan]:
        """Costs of reading and encoding, where they are counted."""
        return [sample.feed for sample in self.samples if sample.feed is not None]

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint on disk, of all ranks together."""
        return self.predict_memory(self.run.num_replicas).checkpoint

    def predict_device(self, num_ranks: int) -> float:
        """Bytes on each GPU with the frozen parts; a batch is encoded before activations are kept."""
        memory = self.predict_memory(num_ranks)
        encoding = max((feed.encode_bytes for feed in self.feeds), default=0)
        beside = sum(self.frozen_bytes.values()) + max(0, encoding - memory.activations)
        return memory.total + beside

    def predict_host(self, num_ranks: int) -> HostMemory:
        """Host memory of each of so many ranks."""
        run = self.run
        num_samples = run.batch_size // (run.num_micro_batches * num_ranks)
        waiting = num_samples * max((feed.host_bytes for feed in self.feeds), default=0)
        piece = max((feed.piece_bytes for feed in self.feeds), default=0)
        weights = FROZEN_BYTES * self.parameters.total + sum(self.frozen_bytes.values())
        return HostMemory(
            loading=PROCESS_BYTES + weights,
            processes=PROCESS_BYTES + run.num_workers * WORKER_BYTES,
            samples=(run.num_workers + 1) * waiting + max(run.num_workers, 1) * piece,
            checkpoint=self.predict_memory(num_ranks).checkpoint if run.async_checkpoints else 0,
        )

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
                keeps_whole_gradients=run.delays_gradients and num_ranks > 1,
                activations=activations,
            )
            for optimizer in self.optimizers
        ]
        return max(predictions, key=lambda prediction: prediction.total)


class ClipSample(NamedTuple):
    """Part of a clip that a transformer sees."""

    shape: PixelShape
    """Size of the clip, cropped."""
    num_latent_frames: int
    """Latent frames that are seen."""
    scale: ScaleFactors
    """Pixels of a cell and of a token."""
    feed: FeedPlan | None = None
    """Costs of reading and encoding it; None where they are not counted."""

    @classmethod
    def of(
        cls, shape: PixelShape, crop: int | None, windows: WindowConfig | None, scale: ScaleFactors
    ) -> "ClipSample":
        """The longest window of a clip, or all of it without ``windows``.

        Raises:
            ShapeError: The clip does not fit the model.
        """
        cropped = crop_shape(shape, crop)
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
        """Tokens of the frames that the transformer sees."""
        side = self.scale.side
        return self.num_latent_frames * (self.shape.height // side) * (self.shape.width // side)


class EmptyStage:
    """A stage's transformer and its frozen parts without memory, to predict trainings from.

    Raises:
        LoadingError: The configuration of a component cannot be found.
    """

    def __init__(self, model: str, stage: str, frozen: Sequence[str]) -> None:
        index, root = find_model(model)
        own = f"{stage}_transformer"
        models: dict[str, Any] = {
            role: find_architecture(role, index.components[role], root).make_empty(role)
            for role in (own, *frozen)
            if role in index.components
        }
        self.transformer, self.num_text_tokens = models.pop(own), index.max_text_length
        self.vae = models[f"{stage}_vae"]
        self.scale = scale_factors(models[f"{stage}_vae"], self.transformer.config["patch_size"][1])
        self.frozen_bytes = {
            role: FROZEN_BYTES * count_parameters(part).total for role, part in models.items()
        }

    def plan(
        self,
        part: str,
        run: RunConfig,
        phases: Sequence[ClipsPhase],
        adapter: AdapterConfig | None,
        wishes: FeedWishes,
    ) -> TrainingPlan:
        """Predict a training of the transformer on the longest windows of its clips, or all of them.

        Raises:
            ShapeError: A bucket does not fit the model.
        """
        samples = []
        for phase in phases:
            shapes = phase.data.rules.shapes
            found = [ClipSample.of(s, wishes.crop, wishes.windows, self.scale) for s in shapes]
            number = max(range(len(found)), key=lambda place: found[place].tokens)
            own = wishes._replace(keeps_pieces=phase.data.num_pieces is not None)
            feed = plan_feed(shapes[number], self.vae, self.scale, own)
            samples.append(found[number]._replace(feed=feed))
        return plan_transformer(
            part,
            self.transformer,
            count_trained(self.transformer, adapter),
            run,
            phases,
            samples,
            num_text_tokens=self.num_text_tokens,
            frozen_bytes=self.frozen_bytes,
        )


def plan_transformer(
    part: str,
    transformer: Any,
    parameters: ParameterCount,
    run: RunConfig,
    phases: Sequence[PhaseConfig],
    samples: Sequence[ClipSample],
    *,
    num_text_tokens: int,
    frozen_bytes: Mapping[str, int] | None = None,
) -> TrainingPlan:
    """Predict the training of a transformer from the largest sample of each phase."""
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
            num_steps=phase.steps,
            feed=sample.feed,
        )
        for phase, sample in zip(phases, samples, strict=True)
    ]
    return TrainingPlan(
        part=part,
        parameters=parameters,
        run=run,
        optimizers=[phase.optimizer for phase in phases],
        samples=plans,
        size=ActivationSizes.from_config(transformer.config),
        num_text_tokens=num_text_tokens,
        frozen_bytes=frozen_bytes or {},
    )


def crop_shape(shape: PixelShape, side: int | None) -> PixelShape:
    """A shape cut to squares; None cuts nothing."""
    return shape if side is None else shape._replace(height=side, width=side)


def count_trained(transformer: nn.Module, adapter: AdapterConfig | None) -> ParameterCount:
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
