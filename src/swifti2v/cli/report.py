"""Display of a running run for the user."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Self

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from swifti2v.pipelines.decoding import SegmentOutput
from swifti2v.pipelines.progress import Progress

REPORT_SECONDS = 10.0
"""Seconds between two lines about steps."""


class Pace:
    """Prediction of the time of steps that take about equally long."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def find_left(self, done: int, total: int) -> str:
        """``, 0:01:40 left`` when ``done`` of ``total`` steps are done; empty until two are."""
        now = self._clock()
        if self._first is None:
            self._first = (done, now)
        start, since = self._first
        if done in (start, total):
            return ""
        seconds = (now - since) / (done - start) * (total - done)
        return f", {timedelta(seconds=round(seconds))} left"


class ProgressDisplay:
    """Bars on a terminal, else lines: on stderr.

    Stage I, every segment and a step every ten seconds have a line, with the time left.
    """

    def __init__(self, num_segments: int) -> None:
        self._num_segments = num_segments
        self._paces = {"stage1": Pace(), "stage2": Pace()}
        self._left = ""
        self._said_at = time.monotonic()
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bars = Bars(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def on_progress(self, progress: Progress) -> None:
        """Show that a model call is done."""
        step, num_steps = progress.step, progress.num_steps
        if progress.stage == "stage1":
            key, label, done, total = "stage1", "Stage I", step, num_steps
        else:
            key, label = (
                "stage2",
                f"Stage II, segment {progress.segment + 1} of {self._num_segments}",
            )
            done, total = progress.segment * num_steps + step, self._num_segments * num_steps
        self._left = self._paces[key].find_left(done, total)
        self._show(key, label, done, total)
        if key == "stage1" and done == total:
            self._say("Stage I done")
        elif time.monotonic() - self._said_at >= REPORT_SECONDS:
            self._say(f"{label}: step {step} of {num_steps}{self._left}")

    def on_segment(self, segment: SegmentOutput) -> None:
        """Show that a segment is done."""
        self._say(
            f"segment {segment.index + 1} of {self._num_segments} done: {len(segment.frames)} frames, "
            f"{segment.seconds:.1f} s{self._left}"
        )

    def _show(self, key: str, label: str, done: int, total: int) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(label, total=total)
        self._bars.update(self._tasks[key], description=label, completed=done, total=total)

    def _say(self, text: str) -> None:
        self._said_at = time.monotonic()
        if self._bars.disable:
            typer.echo(text, err=True)
