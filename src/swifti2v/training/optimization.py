"""The training loop: budget, learning rate, moving average, metrics, checkpoints and resuming."""

import json
import logging
import math
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from swifti2v.errors import ConfigError, LoadingError, NumericalError

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "checkpoint.pt"
METRICS_NAME = "metrics.jsonl"
State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizationConfig:
    """How one model is trained."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    minutes: float | None = None
    """Time to train, over all resumed runs; or give ``steps``."""
    steps: int | None = None
    """Optimizer steps; or give ``minutes``."""
    learning_rate: float = 1e-3
    """Peak, reached after ``warmup_steps``."""
    warmup_steps: int = 50
    """Steps of linear rise."""
    decay: Literal["cosine_tail", "cosine", "linear"] = "cosine_tail"
    """Constant for the first half of the budget, then a cosine down to 3%; the same cosine over the
    whole budget; or linear to 0."""
    weight_decay: float = 0.01
    """On matrices and kernels; none on biases, norms and modulation tables."""
    betas: tuple[float, float] = (0.9, 0.97)
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to it."""
    ema_decay: float | None = 0.999
    """Limit of the moving average of the weights; None keeps the last weights instead."""
    checkpoint_minutes: float = 4.0
    """Between two checkpoints."""

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ConfigError(f"give minutes or steps, not {self.minutes} and {self.steps}")
        budget = self.minutes if self.steps is None else self.steps
        if budget is None or not budget > 0:
            raise ConfigError(
                f"a budget of {budget} minutes or steps cannot be; it must be above 0"
            )
        if not self.learning_rate > 0 or self.warmup_steps < 1:
            raise ConfigError(
                f"learning_rate {self.learning_rate} and warmup_steps {self.warmup_steps} must be "
                "above 0"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay is {self.ema_decay}; it must be in [0, 1) or null")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One line of ``metrics.jsonl``."""

    step: int
    """From 1."""
    seconds: float
    """Of training so far, over all resumed runs."""
    loss: float
    """Of this step's batch."""
    learning_rate: float
    """Of this step."""
    grad_norm: float
    """Before clipping."""


OnStep = Callable[[StepMetrics], None]
"""Called after each step; raising in it stops the training, which keeps what it has."""


class Randomness:
    """All random sources of a training, on the CPU so that a device does not change them.

    Args:
        seed: Of both.
    """

    def __init__(self, seed: int) -> None:
        self.numpy = np.random.default_rng(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def normal_like(self, tensor: Tensor) -> Tensor:
        """Standard normal of a tensor's shape, on its device."""
        return torch.randn(tensor.shape, generator=self.torch).to(tensor.device)

    def choose(self, values: Tensor, count: int) -> Tensor:
        """``count`` of ``values``, each drawn evenly, on its device."""
        return values[
            torch.from_numpy(self.numpy.integers(len(values), size=count)).to(values.device)
        ]

    def state_dict(self) -> dict[str, Any]:
        """All that a continued training needs to draw the same numbers."""
        state = json.dumps(self.numpy.bit_generator.state)
        return {"numpy": state, "torch": self.torch.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the source of ``state`` would have."""
        self.numpy.bit_generator.state = json.loads(state["numpy"])
        self.torch.set_state(state["torch"])


def has_checkpoint(directory: Path) -> bool:
    """Whether ``optimize`` would continue a training in this directory."""
    return (directory / CHECKPOINT_NAME).is_file()


def optimize(
    model: nn.Module,
    loss: Callable[[], Tensor],
    config: OptimizationConfig,
    randomness: Randomness,
    directory: Path,
    on_step: OnStep | None = None,
) -> None:
    """Train a model until its budget is used; it ends with the averaged weights, in eval mode.

    A checkpoint in ``directory`` is continued from; with a budget in steps the result is that of
    a run without the stop, up to rounding. The directory then holds ``checkpoint.pt``, replaced in one go every few
    minutes and at the end, and ``metrics.jsonl``, one object a step.

    Args:
        model: Changed in place.
        loss: Draws a batch and returns its loss, a scalar.
        config: Settings.
        randomness: What ``loss`` draws from; kept in the checkpoints.
        directory: Made if it is not there.
        on_step: Called after each step; raising in it stops, after a checkpoint.

    Raises:
        NumericalError: The loss or its gradient is NaN or infinite; the checkpoint is good.
        LoadingError: The checkpoint is damaged or of another model.
    """
    directory.mkdir(parents=True, exist_ok=True)
    run = _Run(model, config, randomness)
    path = directory / CHECKPOINT_NAME
    if path.is_file():
        run.load(path)
    _cut_metrics(directory / METRICS_NAME, run.step)
    model.train()
    saved_at = run.seconds
    with (directory / METRICS_NAME).open("a", encoding="utf-8") as lines:
        try:
            while run.progress() < 1:
                metrics = run.advance(loss)
                lines.write(json.dumps(asdict(metrics)) + "\n")
                lines.flush()
                if on_step is not None:
                    on_step(metrics)
                if run.seconds - saved_at >= 60 * config.checkpoint_minutes:
                    run.save(path)
                    saved_at = run.seconds
        finally:
            run.save(path)
    model.load_state_dict(run.average)
    model.eval()


def scale_learning_rate(config: OptimizationConfig, step: int, progress: float) -> float:
    """Learning rate of a step.

    Args:
        config: Settings.
        step: From 0.
        progress: Part of the budget that is used, in [0, 1].
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps)
    if config.decay == "linear":
        return config.learning_rate * warmup * (1 - progress)
    start = 0.5 if config.decay == "cosine_tail" else 0.0
    if progress < start:
        return config.learning_rate * warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - start) / (1 - start)))
    return config.learning_rate * warmup * (0.03 + 0.97 * cosine)


class _Run:
    """State of a training: everything a checkpoint holds."""

    def __init__(
        self, model: nn.Module, config: OptimizationConfig, randomness: Randomness
    ) -> None:
        self.model, self.config, self.randomness = model, config, randomness
        self.step, self.seconds = 0, 0.0
        # A stop within a step saves nothing half done: not the weights, and none of its draws.
        self._is_whole = True
        self._random_state = randomness.state_dict()
        self.average: State = {k: v.detach().clone() for k, v in model.state_dict().items()}
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        is_decayed = {name: p.ndim > 1 and "table" not in name for name, p in named}
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for name, p in named if is_decayed[name]],
                    "weight_decay": config.weight_decay,
                },
                {"params": [p for name, p in named if not is_decayed[name]], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=config.betas,
        )

    def progress(self) -> float:
        """Part of the budget that is used."""
        if self.config.steps is not None:
            return self.step / self.config.steps
        assert self.config.minutes is not None
        return self.seconds / 60 / self.config.minutes

    def advance(self, loss: Callable[[], Tensor]) -> StepMetrics:
        """One step."""
        start = time.perf_counter()
        rate = scale_learning_rate(self.config, self.step, self.progress())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        value = loss()
        self._require_finite("loss", value)
        self.optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self._require_finite("norm of the gradient", norm)
        self._is_whole = False
        self.optimizer.step()
        self.step += 1
        self._update_average()
        self._random_state = self.randomness.state_dict()
        self.seconds += time.perf_counter() - start
        self._is_whole = True
        return StepMetrics(
            step=self.step,
            seconds=round(self.seconds, 3),
            loss=value.item(),
            learning_rate=rate,
            grad_norm=float(norm),
        )

    def _require_finite(self, name: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise NumericalError(
                f"the {name} is {value.item()} at step {self.step + 1}; lower learning_rate "
                f"({self.config.learning_rate}) and train again"
            )

    @torch.no_grad()
    def _update_average(self) -> None:
        limit = self.config.ema_decay
        # Rises from 2/11, so that the average forgets the start as fast as it can.
        decay = 0.0 if limit is None else min(limit, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)

    def save(self, path: Path) -> None:
        """Write a checkpoint under another name, then put it in place of the last one."""
        if not self._is_whole:
            return
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "randomness": self._random_state,
            "step": self.step,
            "seconds": self.seconds,
        }
        unfinished = path.with_suffix(".writing")
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        logger.info("%s: step %d", path, self.step)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        device = next(self.model.parameters()).device
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.average = state["average"]
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise LoadingError(
                f"{path} cannot be continued from ({str(error).splitlines()[0]}); it is damaged or "
                "of other settings: choose another output directory"
            ) from None
        state["randomness"]["torch"] = state["randomness"]["torch"].cpu()
        self._random_state = state["randomness"]
        self.randomness.load_state_dict(self._random_state)
        self.step, self.seconds = state["step"], state["seconds"]


def _cut_metrics(path: Path, num_steps: int) -> None:
    """Keep only the lines of steps that the checkpoint holds."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:num_steps]), encoding="utf-8")
