"""Progress of a running pipeline, reported where the caller may stop it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from swifti2v.config import StageName

TimedStage = Literal["text", "stage1", "reference", "stage2", "decode"]
"""Stages of a run that are timed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """One model call is done."""

    stage: TimedStage
    step: int
    """Finished steps of this stage (of this segment in Stage II), from 1."""
    num_steps: int
    segment: int = 0
    """Index of the segment; 0 outside Stage II."""
    num_segments: int = 1


OnProgress = Callable[[Progress], None]
"""Called between any two model calls; raise ``CancelledError`` in it to stop."""


def report_steps(
    on_progress: OnProgress | None, stage: StageName, num_steps: int, segment: int = 0
) -> Callable[[int], None] | None:
    """Function for ``sampling.denoise`` to call after each step; it tells ``on_progress``."""
    if on_progress is None:
        return None
    return lambda step: on_progress(
        Progress(stage=stage, step=step + 1, num_steps=num_steps, segment=segment)
    )


def report_piece(on_progress: OnProgress | None, number: int, num_pieces: int) -> OnProgress | None:
    """Tell ``on_progress`` the steps of a piece as those of the whole of Stage I."""
    if on_progress is None or num_pieces == 1:
        return on_progress

    def report(progress: Progress) -> None:
        before, num_steps = number * progress.num_steps, num_pieces * progress.num_steps
        on_progress(replace(progress, step=before + progress.step, num_steps=num_steps))

    return report


class Stopwatch:
    """Seconds spent in each stage.

    Args:
        clock: Gives seconds; ``time.process_time`` counts those that the processor worked.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.started = clock()
        self.seconds: dict[str, float] = {}
        self.stage: TimedStage | None = None
        """The one that runs, or ran last."""

    @contextmanager
    def measure(self, stage: TimedStage) -> Iterator[None]:
        """Add the time of a ``with`` block to a stage."""
        self.stage = stage
        start = self.clock()
        try:
            yield
        finally:
            spent = self.clock() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    def total(self) -> float:
        """Seconds since this stopwatch was made."""
        return self.clock() - self.started
