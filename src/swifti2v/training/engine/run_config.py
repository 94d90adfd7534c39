"""Settings that every training has, whatever it trains."""

from dataclasses import field
from typing import Literal

from swifti2v.config import settings
from swifti2v.errors import ConfigError
from swifti2v.training.engine.optimizers import OptimizerConfig


@settings
class RunConfig:
    """Settings of a training run."""

    seed: int = 0
    """Seed of weights and of all draws."""
    batch_size: int = 8
    """Samples of a step, on all ranks together."""
    num_micro_batches: int = 1
    """Pieces that a rank's samples of a step are computed in, one after the other."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Number type of the computation; trained weights stay float32 unless the optimizer says
    otherwise."""
    gradient_checkpointing: bool = False
    """Compute each block's activations twice instead of keeping them."""
    compiles: bool = False
    """``torch.compile`` the model: a minute for each shape of batch, then faster steps."""
    ema_decay: float | None = 0.999
    """Limit of the moving average of the weights, kept in float32; none has no average."""
    checkpoint_steps: int | None = None
    """Steps between two checkpoints."""
    checkpoint_minutes: float | None = 5.0
    """Minutes of training between two checkpoints; one is always written at the end of a phase."""
    async_checkpoints: bool = True
    """Go on while a checkpoint is written, from a copy in host memory."""
    num_checkpoints: int = 2
    """Newest ones kept."""
    validation_steps: int | None = None
    """Steps between two validations; the first is at step 0. None validates at neither."""
    num_workers: int = 0
    """Processes that read and prepare samples ahead; 0 does it between the steps."""
    num_replicas: int = 1
    """Copies of the model; each is divided over the ranks left (FSDP2). The number of ranks: DDP."""
    gradient_sync: Literal["step", "micro_batch"] = "step"
    """Ranks add their gradients once a step, each keeping whole ones until then; or after every
    micro-batch, each keeping its share alone: less memory, more traffic."""
    timeout_minutes: float = 30.0
    """Time that a rank waits for another one in a step before the training stops."""
    bad_samples: Literal["stop", "skip"] = "stop"
    """A sample that cannot be read stops the training, or is replaced by another and counted."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Trackers besides ``metrics.jsonl``, which is always written."""

    @property
    def delays_gradients(self) -> bool:
        """Whether ranks keep whole gradients until the last micro-batch."""
        return self.num_micro_batches > 1 and self.gradient_sync == "step"

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_micro_batches", "num_checkpoints", "num_replicas"):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("checkpoint_steps", "checkpoint_minutes", "validation_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"run.{name} is {value}; it must be above 0, or null")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"run.ema_decay is {self.ema_decay}; it must be in [0, 1), or null")
        if not self.timeout_minutes > 0:
            raise ConfigError(f"run.timeout_minutes is {self.timeout_minutes}; it must be above 0")
        for name in ("num_workers", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"run.{name} is {getattr(self, name)}; it must be at least 0")


@settings
class PhaseConfig:
    """One part of a curriculum; the parts follow one another."""

    name: str = "main"
    """Said in reports and metrics."""
    steps: int | None = None
    """Optimizer steps; or give ``minutes``."""
    minutes: float | None = None
    """Time to train, over all resumed runs; or give ``steps``. Only steps repeat bit by bit."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Built anew for each phase."""

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ConfigError(
                f"phase {self.name}: give minutes or steps, not {self.minutes} and {self.steps}"
            )
        budget = self.minutes if self.steps is None else self.steps
        if budget is None or not budget > 0:
            raise ConfigError(f"phase {self.name}: a budget of {budget} must be above 0")

    def progress(self, step: int, seconds: float) -> float:
        """Part of the budget that ``step`` finished steps in ``seconds`` used up."""
        if self.steps is not None:
            return step / self.steps
        assert self.minutes is not None
        return seconds / 60 / self.minutes
