"""The training loop, one for everything that is trained: phases, averages, checkpoints, metrics.

A run directory holds ``config.yaml``, ``metrics.jsonl`` (one object a step), ``checkpoints/`` and
what validations wrote. All draws depend on the seed and the step alone (``training.draws``), so a
stopped run goes on as if it had not been stopped. The number of ranks and of micro-batches changes
the order of sums, and in bfloat16 how many parts of a gradient are rounded before they are added.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from swifti2v.errors import (
    ConfigError,
    LoadingError,
    NumericalError,
    OutOfMemoryError,
    StorageError,
)
from swifti2v.training.engine.averages import MovingAverage, cast_trained, trained_weights
from swifti2v.training.engine.checkpoints import (
    CheckpointWriter,
    find_latest,
    load_tensors,
    read_state,
)
from swifti2v.training.engine.draws import Draw, split_batch
from swifti2v.training.engine.noise_histogram import SigmaHistogram
from swifti2v.training.engine.optimizers import (
    build_optimizer,
    scale_learning_rate,
    set_learning_rate,
)
from swifti2v.training.engine.precision import DTYPES, compute_in
from swifti2v.training.engine.ranks import Ranks, divide_model
from swifti2v.training.engine.run_config import PhaseConfig, RunConfig
from swifti2v.training.engine.run_log import OnStep, RunLog, StepMetrics
from swifti2v.training.engine.task import NoiseTask, StepFeed, Task, read_ahead
from swifti2v.training.engine.trackers import Tracker
from swifti2v.training.engine.work import WorkMeter, find_peak

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a task, one phase after the other; trackers come besides ``metrics.jsonl``."""

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
            raise ConfigError(
                f"run: {error}; change batch_size, num_micro_batches or the number of ranks"
            ) from None
        self.model = task.model
        self.phase, self.phase_step, self.phase_seconds = 0, 0, 0.0
        self.step, self.seconds = 0, 0.0
        self._checkpoints = CheckpointWriter(
            directory / "checkpoints",
            ranks,
            config.num_checkpoints,
            is_async=config.async_checkpoints,
        )
        self._saved = (-1, 0.0)  # step and seconds of the last checkpoint
        self._validated = -1
        self._is_whole = True  # False while a step changes weights
        self._max_steps: int | None = None
        self.noise_levels = SigmaHistogram()
        _require_same_weights(phases)
        if phases[0].optimizer.weights == "bfloat16_stochastic":
            cast_trained(self.model, torch.bfloat16)
        if config.gradient_checkpointing:
            enable: Any = getattr(self.model, "enable_gradient_checkpointing", None)
            if enable is None:
                raise ConfigError(
                    f"{type(self.model).__name__} has no gradient checkpointing; turn it off"
                )
            enable()
        if config.compiles:
            self.model.compile(dynamic=False)
        divide_model(self.model, ranks)
        self.average = MovingAverage(self.model, config.ema_decay)
        self.optimizer = self._build_optimizer()
        self._meter = WorkMeter(self.model)

    def run(
        self, *, resume: bool = False, max_steps: int | None = None, on_step: OnStep | None = None
    ) -> None:
        """Train until the phases, or ``max_steps`` steps in all, are done.

        Args:
            resume: Continue the directory's latest checkpoint; without one the training begins.
            max_steps: Stop earlier, with a checkpoint.
            on_step: See ``OnStep``.

        Raises:
            NumericalError: The loss or its gradient is NaN or infinite; the last checkpoint is good.
            LoadingError: The checkpoint is damaged or belongs to other settings.
            StorageError: A checkpoint cannot be written.
            OutOfMemoryError: The step does not fit; the message says what to change.
        """
        if resume and (latest := find_latest(self.directory / "checkpoints")) is not None:
            self._load(latest)
        self._max_steps = max_steps
        first, trackers = self.ranks.is_first, self.trackers
        log = RunLog(self.directory, self.step, is_first=first, trackers=trackers)
        try:
            while self.phase < len(self.phases) and not self._is_over():
                self._run_phase(log, on_step)
            self._checkpoints.finish()
        except BaseException:
            self._checkpoints.give_up()
            raise
        finally:
            log.close()

    def take_average(self) -> None:
        """Give the model the averaged weights for good, in eval mode."""
        self.average.take()
        self.model.eval()

    def _run_phase(self, log: RunLog, on_step: OnStep | None) -> None:
        phase = self.phases[self.phase]
        self.task.enter_phase(self.phase)
        self._validate(log)
        self.model.train()
        batches = self._read_batches()
        try:
            while not self._is_over() and self._progress() < 1:
                metrics = self._advance(StepFeed(batches, len(self._parts)), phase)
                log.log_step(metrics)
                if on_step is not None and self.ranks.is_first:
                    on_step(metrics)
                self._validate(log)
                self._checkpoints.poll()
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
        self._log_noise_levels(log)

    def _advance(self, feed: StepFeed, phase: PhaseConfig) -> StepMetrics:
        start = time.perf_counter()
        config = phase.optimizer
        rate = scale_learning_rate(config, self.phase_step, self._progress())
        set_learning_rate(self.optimizer, rate)
        torch.manual_seed(hash((self.config.seed, self.step, self.ranks.rank)))  # dropout
        try:
            with self._meter.measure() as work:
                loss, norm = self._compute_gradient(feed, config.max_grad_norm)
        except torch.OutOfMemoryError:
            raise OutOfMemoryError(
                f"out of memory at step {self.step + 1} (samples {', '.join(feed.ids)}); raise "
                "run.num_micro_batches, set run.gradient_checkpointing, or take smaller sizes"
            ) from None
        self._require_finite(loss, norm, feed.ids)
        self._is_whole = False
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._count_noise_levels()
        self.step, self.phase_step = self.step + 1, self.phase_step + 1
        self.average.update(self.step)
        self._is_whole = True
        seconds = time.perf_counter() - start - feed.wait_seconds
        self.seconds, self.phase_seconds = self.seconds + seconds, self.phase_seconds + seconds
        is_cuda = self.ranks.device.type == "cuda"
        peak = find_peak(self.ranks.device, DTYPES[self.config.precision]) if work.flops else 0.0
        return StepMetrics(
            step=self.step,
            phase=phase.name,
            loss=loss,
            lr=rate,
            grad_norm=norm,
            seconds=round(self.seconds, 3),
            step_seconds=round(seconds, 6),
            seconds_left=round(self._seconds_left(), 3),
            samples_per_second=float(f"{self.config.batch_size / seconds:.6g}"),
            tokens_per_second=float(f"{work.tokens * self.ranks.world_size / seconds:.6g}"),
            flops=work.flops * self.ranks.world_size,
            mfu=round(work.flops / seconds / peak, 4) if peak else 0.0,
            num_replaced=feed.num_replaced,
            wait_seconds=round(feed.wait_seconds, 6),
            peak_device_bytes=torch.cuda.max_memory_allocated() if is_cuda else 0,
        )

    def _compute_gradient(self, feed: StepFeed, max_norm: float) -> tuple[float, float]:
        """Mean loss over all ranks, and norm of its gradient before clipping."""
        total = torch.zeros((), device=self.ranks.device)
        num_samples = self.config.batch_size // self.ranks.world_size
        self.optimizer.zero_grad()  # of a step that was not finished
        model: Any = self.model
        for number, (draw, batch) in enumerate(feed, 1):
            if isinstance(model, FSDPModule) and self.config.delays_gradients:
                model.set_requires_gradient_sync(number == len(self._parts))
            with compute_in(self.config.precision, self.ranks.device):
                losses = self.task.loss(batch, draw)
            share = losses.float().sum() / num_samples
            share.backward()  # type: ignore[no-untyped-call]
            total += share.detach()
            del batch
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

    def _count_noise_levels(self) -> None:
        """Count the noise levels of all ranks, which follow from the step."""
        if isinstance(self.task, NoiseTask):
            size = self.config.batch_size
            whole = Draw(
                seed=self.config.seed, step=self.step, batch_size=size, indices=tuple(range(size))
            )
            self.noise_levels.add(self.task.draw_sigma(whole))

    def _log_noise_levels(self, log: RunLog) -> None:
        if isinstance(self.task, NoiseTask):
            log.log_noise_levels(self.step, self.noise_levels)

    def _next_phase(self) -> None:
        self.phase, self.phase_step, self.phase_seconds = self.phase + 1, 0, 0.0
        if self.phase < len(self.phases):
            self.optimizer = self._build_optimizer()

    def _build_optimizer(self) -> torch.optim.Optimizer:
        trained = trained_weights(self.model)
        if not trained:
            raise ConfigError("no weight of the model can be trained; check the frozen parts")
        return build_optimizer(trained, self.phases[self.phase].optimizer, seed=self.config.seed)

    def _read_batches(self) -> Iterator[tuple[Draw, Any]]:
        limit = 2**40 if self._max_steps is None else self._max_steps
        phase = self.phases[self.phase]
        if phase.steps is not None:
            limit = min(limit, self.step - self.phase_step + phase.steps)
        return read_ahead(
            self.task,
            self.config.seed,
            self._parts,
            self.ranks.rank,
            range(self.step, limit),
            self.config.num_workers,
        )

    def _progress(self) -> float:
        phase = self.phases[self.phase]
        used = phase.progress(self.phase_step, self.phase_seconds)
        # All ranks must stop at the same step, whatever their clocks say.
        return float(self.ranks.mean(torch.tensor(used, device=self.ranks.device)))

    def _seconds_left(self) -> float:
        pace, left = self.phase_seconds / self.phase_step, 0.0
        for number, phase in enumerate(self.phases[self.phase :]):
            if phase.minutes is not None:
                left += 60 * phase.minutes - (0 if number else self.phase_seconds)
            elif phase.steps is not None:
                left += pace * (phase.steps - (0 if number else self.phase_step))
        if self._max_steps is not None:
            left = min(left, pace * (self._max_steps - self.step))
        return max(0.0, left)

    def _is_over(self) -> bool:
        return self._max_steps is not None and self.step >= self._max_steps

    def _validate(self, log: RunLog) -> None:
        every = self.config.validation_steps
        if every is None or self.step % every or self._validated == self.step:
            return
        directory = self.directory / "validation" / f"step-{self.step:08d}"
        directory.mkdir(parents=True, exist_ok=True)
        self.model.eval()
        with TemporaryDirectory() as aside, self.average.applied(), torch.no_grad():
            # A divided model needs all ranks; the files of one are enough.
            metrics = self.task.validate(directory if self.ranks.is_first else Path(aside))
        self.model.train()
        log.log_validation(self.step, metrics, directory)
        self._log_noise_levels(log)
        self._validated = self.step

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
            "noise_levels": self.noise_levels.counts.tolist(),
        }

    def _tensors(self) -> dict[str, Any]:
        # What is frozen comes from where the model was loaded, not from checkpoints.
        options = StateDictOptions(ignore_frozen_params=True)
        is_new = not self.optimizer.state
        self.optimizer.zero_grad()  # a new optimizer makes its state only if it has none
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        if is_new:  # it was made by a step of size 0, which must not count
            for state in self.optimizer.state.values():
                state["step"].zero_()
        return {"model": model, "optimizer": optimizer, "average": self.average.weights}

    def _save(self) -> None:
        if self._saved[0] == self.step:
            return
        self._checkpoints.save(self.step, self._tensors(), self._state())
        self._saved = (self.step, self.seconds)

    def _load(self, path: Path) -> None:
        state = read_state(path)
        if missing := sorted(self._state().keys() - state.keys()):
            raise LoadingError(
                f"{path} lacks {', '.join(missing)}: another version wrote it; choose another "
                "output directory"
            )
        if state["batch_size"] != self.config.batch_size or state["phase"] > len(self.phases):
            raise LoadingError(
                f"{path} is of a run with batch_size {state['batch_size']} in phase "
                f"{state['phase'] + 1}; this one has {self.config.batch_size} and "
                f"{len(self.phases)} phases: continue with the settings of its start"
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
        self.average.weights = tensors["average"]
        self.noise_levels.load_state_dict({"counts": torch.tensor(state["noise_levels"])})
        self.step, self.seconds = state["step"], state["seconds"]
        self.phase_step, self.phase_seconds = state["phase_step"], state["phase_seconds"]
        self._saved = (self.step, self.seconds)
        self._validated = state["validated"]
        logger.info("continuing at step %d", self.step)


def _require_same_weights(phases: Sequence[PhaseConfig]) -> None:
    kinds = sorted({phase.optimizer.weights for phase in phases})
    if len(kinds) > 1:
        raise ConfigError(
            f"phases have optimizer.weights {', '.join(kinds)}; they must be the same in all phases"
        )
