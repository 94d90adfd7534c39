"""The training loop, one for everything that is trained: phases, averages, checkpoints, metrics.

A run directory holds ``config.yaml``, ``metrics.jsonl`` (one object a step), ``checkpoints/`` and
what validations wrote. All draws depend on the seed and the step alone (``training.draws``), so a
stopped run goes on as if it had not been stopped, and the number of ranks changes it by no more
than the order of sums.
"""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.utils.data import DataLoader, Dataset

from swifti2v.errors import (
    ConfigError,
    LoadingError,
    NumericalError,
    OutOfMemoryError,
    StorageError,
)
from swifti2v.training.checkpoints import (
    find_latest,
    load_tensors,
    read_state,
    save_checkpoint,
)
from swifti2v.training.draws import Draw, draws_of_step, split_batch
from swifti2v.training.optimizers import (
    build_optimizer,
    scale_learning_rate,
    set_learning_rate,
)
from swifti2v.training.ranks import Ranks, divide_model
from swifti2v.training.run_config import PhaseConfig, RunConfig
from swifti2v.training.trackers import MetricsFile, Tracker

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Batch(Protocol):
    """What a task loads for a micro-batch; it may cross processes."""

    ids: Sequence[str]
    """Names of the samples, for messages."""
    num_replaced: int
    """Samples that could not be read and were replaced."""


BatchT = TypeVar("BatchT", bound=Batch)


class Task(Protocol[BatchT]):
    """What is trained."""

    @property
    def model(self) -> nn.Module:
        """Whole; what has ``requires_grad`` is trained."""

    def enter_phase(self, phase: int) -> None:
        """Take the data and the objective of a phase; called before it and when it is resumed."""

    def load_batch(self, draw: Draw) -> BatchT:
        """Read a micro-batch; runs in a worker process where there are some."""

    def loss(self, batch: BatchT, draw: Draw) -> Tensor:
        """``[b]`` loss of each sample, on the model's device."""

    def validate(self, directory: Path) -> Mapping[str, float]:
        """Measure the model as it is now; files go to ``directory``, on the first rank only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One line of ``metrics.jsonl``."""

    step: int
    """From 1, over all phases."""
    phase: str
    """Its name."""
    loss: float
    """Mean over the step's samples."""
    lr: float
    """Learning rate of the step."""
    grad_norm: float
    """Before clipping."""
    seconds: float
    """Of training so far, over all resumed runs."""
    samples_per_second: float
    """Of this step, over all ranks."""
    num_replaced: int
    """Samples of this step, on the first rank, that could not be read."""
    peak_device_bytes: int
    """Most GPU memory held so far on the first rank; 0 on a CPU."""


OnStep = Callable[[StepMetrics], None]
"""Called after each step on the first rank; raising in it stops, after a checkpoint."""


class Trainer:
    """Trains a task.

    Args:
        task: What to train.
        config: How.
        phases: One after the other.
        directory: Of the run.
        ranks: Who takes part.
        trackers: Besides ``metrics.jsonl``.
    """

    def __init__(
        self,
        task: Task[Any],
        config: RunConfig,
        phases: Sequence[PhaseConfig],
        directory: Path,
        ranks: Ranks,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.task, self.config, self.phases = task, config, phases
        self.directory, self.ranks, self.trackers = directory, ranks, trackers
        try:
            self._parts = split_batch(config.batch_size, config.num_micro_batches, ranks.world_size)
        except ValueError as error:
            raise ConfigError(f"run: {error}; change batch_size or num_micro_batches") from None
        self.model = task.model
        self.phase, self.phase_step, self.phase_seconds = 0, 0, 0.0
        self.step, self.seconds = 0, 0.0
        self._saved = (-1, 0.0)  # step and seconds of the last checkpoint
        self._validated = -1
        self._is_whole = True  # False while a step changes weights
        _require_same_weights(phases)
        if phases[0].optimizer.weights == "bfloat16_stochastic":
            _cast_trained(self.model, torch.bfloat16)
        if config.gradient_checkpointing:
            enable: Any = getattr(self.model, "enable_gradient_checkpointing", None)
            if enable is None:
                raise ConfigError(
                    f"{type(self.model).__name__} has no gradient checkpointing; turn it off"
                )
            enable()
        dtype = DTYPES[config.precision]
        if config.compiles:
            self.model.compile(dynamic=False)
        divide_model(self.model, ranks, compute_dtype=None if dtype == torch.float32 else dtype)
        self.average = _copy_weights(self.model) if config.ema_decay is not None else {}
        self.optimizer = self._build_optimizer()

    def run(
        self, *, resume: bool = False, max_steps: int | None = None, on_step: OnStep | None = None
    ) -> None:
        """Train until the phases, or ``max_steps`` steps in all, are done.

        Args:
            resume: Continue the directory's latest checkpoint; begin where there is none.
            max_steps: Stop earlier, with a checkpoint.
            on_step: See ``OnStep``.

        Raises:
            NumericalError: The loss or its gradient is NaN or infinite; the last checkpoint is good.
            LoadingError: The checkpoint is damaged or of other settings.
            StorageError: A checkpoint cannot be written.
            OutOfMemoryError: With what to change.
        """
        if resume and (latest := find_latest(self.directory / "checkpoints")) is not None:
            self._load(latest)
        lines = MetricsFile(self.directory / "metrics.jsonl") if self.ranks.is_first else None
        if lines is not None:
            lines.cut(self.step)
        try:
            while self.phase < len(self.phases) and not self._is_over(max_steps):
                self._run_phase(max_steps, lines, on_step)
        finally:
            for tracker in (lines, *self.trackers):
                if tracker is not None:
                    tracker.close()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the model has the averaged weights, where there is an average."""
        if not self.average:
            yield
            return
        own = _copy_weights(self.model, dtype=None)
        _load_weights(self.model, self.average)
        try:
            yield
        finally:
            _load_weights(self.model, own)

    def take_average(self) -> None:
        """Give the model the averaged weights for good, in eval mode."""
        if self.average:
            _load_weights(self.model, self.average)
        self.model.eval()

    def _run_phase(
        self, max_steps: int | None, lines: MetricsFile | None, on_step: OnStep | None
    ) -> None:
        phase = self.phases[self.phase]
        self.task.enter_phase(self.phase)
        self._validate(lines)
        self.model.train()
        batches = iter(self._loader(max_steps))
        try:
            while not self._is_over(max_steps) and self._progress() < 1:
                metrics = self._advance(batches, phase)
                if lines is not None:
                    self._report(metrics, lines, on_step)
                self._validate(lines)
                if self._is_checkpoint_due():
                    self._save()
            if self._progress() >= 1:
                self._next_phase()
        except (OutOfMemoryError, StorageError):
            raise
        except BaseException as error:
            # Other ranks may be well: they would not come to a checkpoint together.
            is_shared = self.ranks.mesh is None or isinstance(error, NumericalError)
            if is_shared and self._is_whole:
                self._save()
            raise
        self._save()

    def _advance(
        self, batches: Iterator[list[tuple[Draw, Any]]], phase: PhaseConfig
    ) -> StepMetrics:
        start = time.perf_counter()
        micro_batches = next(batches)
        config = phase.optimizer
        rate = scale_learning_rate(config, self.phase_step, self._progress())
        set_learning_rate(self.optimizer, rate)
        torch.manual_seed(hash((self.config.seed, self.step, self.ranks.rank)))  # dropout
        ids = [name for _, batch in micro_batches for name in batch.ids]
        try:
            loss, norm = self._compute_gradient(micro_batches, config.max_grad_norm)
        except torch.OutOfMemoryError:
            raise OutOfMemoryError(
                f"out of memory at step {self.step + 1} (samples {', '.join(ids)}); raise "
                "run.num_micro_batches, set run.gradient_checkpointing, or take smaller sizes"
            ) from None
        self._require_finite(loss, norm, ids)
        self._is_whole = False
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.phase_step = self.step + 1, self.phase_step + 1
        self._update_average()
        self._is_whole = True
        seconds = time.perf_counter() - start
        self.seconds, self.phase_seconds = self.seconds + seconds, self.phase_seconds + seconds
        is_cuda = self.ranks.device.type == "cuda"
        return StepMetrics(
            step=self.step,
            phase=phase.name,
            loss=loss,
            lr=rate,
            grad_norm=norm,
            seconds=round(self.seconds, 3),
            samples_per_second=round(self.config.batch_size / seconds, 4),
            num_replaced=sum(batch.num_replaced for _, batch in micro_batches),
            peak_device_bytes=torch.cuda.max_memory_allocated() if is_cuda else 0,
        )

    def _compute_gradient(
        self, micro_batches: list[tuple[Draw, Any]], max_norm: float
    ) -> tuple[float, float]:
        """Mean loss over all ranks, and norm of its gradient before clipping."""
        total = torch.zeros((), device=self.ranks.device)
        num_samples = sum(len(draw.indices) for draw, _ in micro_batches)
        self.optimizer.zero_grad()  # of a step that was not finished
        for draw, batch in micro_batches:
            with compute_in(self.config.precision, self.ranks.device):
                losses = self.task.loss(batch, draw)
            share = losses.float().sum() / num_samples
            share.backward()  # type: ignore[no-untyped-call]
            total += share.detach()
        norm: Any = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return float(self.ranks.mean(total)), float(norm)

    def _require_finite(self, loss: float, norm: float, ids: Sequence[str]) -> None:
        for name, value in (("loss", loss), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                raise NumericalError(
                    f"the {name} is {value} at step {self.step + 1} (samples {', '.join(ids)}); "
                    "lower learning_rate, or look at these samples, and continue with --resume"
                )

    @torch.no_grad()
    def _update_average(self) -> None:
        limit = self.config.ema_decay
        if limit is None:
            return
        # Rises from 2/11, so that the average forgets the start as fast as it can.
        decay = min(limit, (1 + self.step) / (10 + self.step))
        for name, value in _trained(self.model):
            self.average[name].lerp_(value.float(), 1 - decay)

    def _next_phase(self) -> None:
        self.phase, self.phase_step, self.phase_seconds = self.phase + 1, 0, 0.0
        if self.phase < len(self.phases):
            self.optimizer = self._build_optimizer()

    def _build_optimizer(self) -> torch.optim.Optimizer:
        trained = _trained(self.model)
        if not trained:
            raise ConfigError("no weight of the model is to be trained; check what is frozen")
        return build_optimizer(trained, self.phases[self.phase].optimizer, seed=self.config.seed)

    def _loader(self, max_steps: int | None) -> Iterator[list[tuple[Draw, Any]]]:
        steps = _Steps(self.task, self.config.seed, self._parts, self.ranks.rank)
        limit = 2**40 if max_steps is None else max_steps
        phase = self.phases[self.phase]
        if phase.steps is not None:
            limit = min(limit, self.step - self.phase_step + phase.steps)
        loader: Any = DataLoader(
            steps,
            batch_size=None,
            sampler=range(self.step, limit),
            num_workers=self.config.num_workers,
            prefetch_factor=2 if self.config.num_workers else None,
        )
        return iter(loader)

    def _progress(self) -> float:
        phase = self.phases[self.phase]
        used = phase.progress(self.phase_step, self.phase_seconds)
        # All ranks must stop at the same step, whatever their clocks say.
        return float(self.ranks.mean(torch.tensor(used, device=self.ranks.device)))

    def _is_over(self, max_steps: int | None) -> bool:
        return max_steps is not None and self.step >= max_steps

    def _report(self, metrics: StepMetrics, lines: MetricsFile, on_step: OnStep | None) -> None:
        values = asdict(metrics)
        del values["step"]
        lines.log(metrics.step, values)
        for tracker in self.trackers:
            tracker.log(metrics.step, {k: v for k, v in values.items() if not isinstance(v, str)})
        if on_step is not None:
            on_step(metrics)

    def _validate(self, lines: MetricsFile | None) -> None:
        every = self.config.validation_steps
        if every is None or self.step % every or self._validated == self.step:
            return
        directory = self.directory / "validation" / f"step-{self.step:08d}"
        directory.mkdir(parents=True, exist_ok=True)
        self.model.eval()
        with self.averaged(), torch.no_grad():
            metrics = self.task.validate(directory)
        self.model.train()
        if lines is not None:
            values = {f"validation/{name}": value for name, value in metrics.items()}
            self._log_validation(metrics)
            for tracker in self.trackers:
                tracker.log(self.step, values)
                for path in sorted(directory.glob("*.png")):
                    tracker.log_image(self.step, path.stem, path)
        self._validated = self.step

    def _log_validation(self, metrics: Mapping[str, float]) -> None:
        own = MetricsFile(self.directory / "validation.jsonl")
        try:
            own.cut(self.step - 1)  # a killed run may have been further
            own.log(self.step, metrics)
        finally:
            own.close()

    def _is_checkpoint_due(self) -> bool:
        config, (_, seconds) = self.config, self._saved
        if config.checkpoint_steps is not None:
            return self.step % config.checkpoint_steps == 0
        if config.checkpoint_minutes is None:
            return False
        elapsed = torch.tensor(self.seconds - seconds, device=self.ranks.device)
        return float(self.ranks.mean(elapsed)) >= 60 * config.checkpoint_minutes

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "phase": self.phase,
            "phase_step": self.phase_step,
            "phase_seconds": self.phase_seconds,
            "validated": self._validated,
            "world_size": self.ranks.world_size,
            "batch_size": self.config.batch_size,
        }

    def _tensors(self) -> dict[str, Any]:
        # What is frozen comes from where the model was loaded, not from checkpoints.
        options = StateDictOptions(ignore_frozen_params=True)
        is_new = not self.optimizer.state
        self.optimizer.zero_grad()  # a new optimizer's state is made only where there is none
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        if is_new:  # it was made by a step of size 0, which must not count
            for state in self.optimizer.state.values():
                state["step"].zero_()
        return {"model": model, "optimizer": optimizer, "average": self.average}

    def _save(self) -> None:
        if self._saved[0] == self.step:
            return
        save_checkpoint(
            self.directory / "checkpoints",
            self.step,
            self._tensors(),
            self._state(),
            self.ranks,
            self.config.num_checkpoints,
        )
        self._saved = (self.step, self.seconds)

    def _load(self, path: Path) -> None:
        state = read_state(path)
        if state["batch_size"] != self.config.batch_size or state["phase"] > len(self.phases):
            raise LoadingError(
                f"{path} is of a run with batch_size {state['batch_size']} in phase "
                f"{state['phase'] + 1}; this one has {self.config.batch_size} and "
                f"{len(self.phases)} phases: continue with the settings it was begun with"
            )
        self.phase = state["phase"]
        if self.phase < len(self.phases):
            self.optimizer = self._build_optimizer()
        tensors = self._tensors()
        load_tensors(path, tensors, self.ranks)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
        self.average = tensors["average"]
        self.step, self.seconds = state["step"], state["seconds"]
        self.phase_step, self.phase_seconds = state["phase_step"], state["phase_seconds"]
        self._saved = (self.step, self.seconds)
        self._validated = state["validated"]
        logger.info("continuing at step %d", self.step)


class _Steps(Dataset[list[tuple[Draw, Any]]]):
    """Micro-batches of one rank, by step; a data loader reads them ahead."""

    def __init__(self, task: Task[Any], seed: int, parts: list[list[list[int]]], rank: int) -> None:
        self.task, self.seed, self.parts, self.rank = task, seed, parts, rank

    def __getitem__(self, step: int) -> list[tuple[Draw, Any]]:
        draws = draws_of_step(self.seed, step, self.parts, self.rank)
        return [(draw, self.task.load_batch(draw)) for draw in draws]


@contextmanager
def compute_in(precision: str, device: torch.device) -> Iterator[None]:
    """Autocast to a precision; ``float32`` changes nothing.

    Args:
        precision: A key of ``DTYPES``.
        device: Where the block computes.
    """
    dtype = DTYPES[precision]
    with (
        warnings.catch_warnings(),
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
    ):
        # RMSNorm keeps its weights in float32; that it is not fused is known.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield


def _require_same_weights(phases: Sequence[PhaseConfig]) -> None:
    kinds = sorted({phase.optimizer.weights for phase in phases})
    if len(kinds) > 1:
        raise ConfigError(
            f"phases have optimizer.weights {', '.join(kinds)}; they must be the same in all phases"
        )


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, value) for name, value in model.named_parameters() if value.requires_grad]


def _cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    for _, value in _trained(model):
        value.data = value.data.to(dtype)


def _copy_weights(model: nn.Module, dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
    return {name: value.detach().to(dtype, copy=True) for name, value in _trained(model)}


@torch.no_grad()
def _load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, value in _trained(model):
        value.copy_(weights[name])
