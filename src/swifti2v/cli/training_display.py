"""Display of a training on stderr: a bar on a terminal, else a line every few seconds."""

import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from statistics import fmean
from typing import TYPE_CHECKING, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from swifti2v.units import format_bytes

if TYPE_CHECKING:
    from swifti2v.training.engine.run_log import StepMetrics

REPORT_SECONDS = 10.0
"""Seconds between two lines."""
PACE_STEPS = 20
"""Steps whose mean the bar's rates are."""


class TrainingDisplay:
    """Tells of the steps of one part after the other, on stderr by default."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24))
        self._bars = Progress(*columns, TextColumn("{task.fields[facts]}"), console=self._console)
        self._task: TaskID | None = None
        self._steps: deque[StepMetrics] = deque(maxlen=PACE_STEPS)
        self._part = ""
        self._said_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bars.stop()

    def of(self, part: str) -> "Callable[[StepMetrics], None]":
        """The display of one part."""
        return lambda metrics: self(part, metrics)

    def __call__(self, part: str, metrics: "StepMetrics") -> None:
        """Tell of a step."""
        is_new = part != self._part
        self._part = part
        if self._console.is_terminal:
            self._draw(part, metrics, is_new=is_new)
            return
        now = time.monotonic()
        if is_new or now - self._said_at >= REPORT_SECONDS:
            self._said_at = now
            typer.echo(to_line(part, metrics), err=True)

    def _draw(self, part: str, metrics: "StepMetrics", *, is_new: bool) -> None:
        if is_new:
            self._steps.clear()
            self._task = self._bars.add_task(part, total=1.0, facts="")
            self._bars.start()
        self._steps.append(metrics)
        assert self._task is not None
        self._bars.update(
            self._task,
            description=f"{part}, {metrics.phase}",
            completed=metrics.seconds / max(metrics.seconds + metrics.seconds_left, 1e-9),
            facts=to_facts(self._steps),
        )


def to_line(part: str, metrics: "StepMetrics") -> str:
    """A step for a log."""
    memory = f", {format_bytes(metrics.peak_device_bytes)}" if metrics.peak_device_bytes else ""
    return (
        f"{part}: step {metrics.step}, {metrics.seconds:.0f} s, loss {metrics.loss:.4f}, "
        f"learning rate {metrics.lr:.1e}, {metrics.samples_per_second:.2f} samples/s{memory}"
    )


def to_facts(steps: "deque[StepMetrics]") -> str:
    """The last step, and the rates over a few."""
    last, seconds = steps[-1], fmean(step.step_seconds for step in steps)
    samples = fmean(step.samples_per_second * step.step_seconds for step in steps) / seconds
    facts = [
        f"step {last.step}",
        f"loss {last.loss:.4f}",
        f"{1 / seconds:.2f} steps/s",
        f"{samples:.2f} samples/s",
        f"{timedelta(seconds=round(last.seconds_left))} left",
    ]
    if last.peak_device_bytes:
        facts.append(format_bytes(last.peak_device_bytes))
    if last.mfu:
        facts.append(f"MFU {fmean(step.mfu for step in steps):.0%}")
    return ", ".join(facts)
