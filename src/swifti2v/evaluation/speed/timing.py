"""Seconds and peak memory of a computation: warm-ups first, then the median of several runs."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How often a computation runs."""

    warmups: int = 2
    """Runs before those that count; the first of them is reported as cold."""
    repeats: int = 5
    """Runs that count."""

    def __post_init__(self) -> None:
        assert self.warmups >= 0
        assert self.repeats > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What was measured."""

    seconds: float
    """Median."""
    spread: float
    """Longest less shortest, as a part of the median."""
    cold_seconds: float
    """The very first run, compilation included."""
    peak_bytes: int | None
    """Of the last run: on a GPU most memory of tensors, weights included; on a CPU most memory of
    the process above what it held before. None where the system does not tell."""


def measure(
    run: Callable[[], Result], device: torch.device, protocol: Protocol
) -> tuple[Timing, Result]:
    """Run a computation several times.

    Args:
        run: Without gradients; what it returns the last time is handed back.
        device: What computes, or ``cpu``.
        protocol: How often.
    """
    spent: list[float] = []
    for _ in range(protocol.warmups):
        with stopped(device, spent):
            run()
    with peak_memory(device) as peaks:
        for _ in range(protocol.repeats):
            with stopped(device, spent):
                result = run()
    counted = spent[protocol.warmups :]
    median = statistics.median(counted)
    timing = Timing(
        seconds=median,
        spread=(max(counted) - min(counted)) / median,
        cold_seconds=spent[0],
        peak_bytes=peaks[0],
    )
    return timing, result


@contextmanager
def stopped(device: torch.device, spent: list[float]) -> Iterator[None]:
    """Add the seconds of the block to ``spent``, until all of a GPU's work is done."""
    _synchronize(device)
    start = time.perf_counter()
    with torch.inference_mode():
        yield
    _synchronize(device)
    spent.append(time.perf_counter() - start)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int | None]]:
    """A list that gets the block's peak memory, see ``Timing.peak_bytes``."""
    peaks: list[int | None] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peaks
        peaks.append(torch.cuda.max_memory_allocated(device))
        return
    with suppress(OSError):
        CLEAR_REFS.write_text("5")  # Linux: the peak starts again from what is held now
    before = _status("VmRSS")
    yield peaks
    after = _status("VmHWM")
    peaks.append(None if before is None or after is None else max(0, after - before))


def _status(name: str) -> int | None:
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
