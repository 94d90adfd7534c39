"""Seconds and peak memory of a computation: warm-ups first, then the median of several runs."""

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from swifti2v.proc import read_bytes

Result = TypeVar("Result")
CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Numbers of runs of a computation."""

    warmups: int = 2
    """Runs before the measured ones; the first is reported as cold."""
    repeats: int = 5
    """Measured runs."""

    def __post_init__(self) -> None:
        assert self.warmups >= 0
        assert self.repeats > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Measurements of a computation."""

    seconds: float
    """Median seconds of a run."""
    spread: float
    """Longest less shortest, as a part of the median."""
    cold_seconds: float
    """Seconds of the very first run, compilation included."""
    peak_bytes: int | None
    """Peak of the last run: on a GPU most memory of tensors, weights included; on a CPU most memory
    of the process above what it held before. None if the system does not report it."""
    reserved_bytes: int | None = None
    """Most GPU memory that PyTorch's allocator took, gaps included."""
    retries: int = 0
    """Number of times that allocator had to free memory before it got more; 0 is normal."""


@dataclass(slots=True)
class Peaks:
    """Memory of a block, see ``Timing``."""

    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    retries: int = 0


def measure(
    run: Callable[[], Result], device: torch.device, protocol: Protocol
) -> tuple[Timing, Result]:
    """Run a computation several times without gradients; the result is that of the last run."""
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
        peak_bytes=peaks.peak_bytes,
        reserved_bytes=peaks.reserved_bytes,
        retries=peaks.retries,
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
def peak_memory(device: torch.device) -> Iterator[Peaks]:
    """Memory of the block, filled in at its end."""
    peaks = Peaks()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
        yield peaks
        peaks.peak_bytes = torch.cuda.max_memory_allocated(device)
        peaks.reserved_bytes = torch.cuda.max_memory_reserved(device)
        peaks.retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0) - retries
        return
    with suppress(OSError, AttributeError):  # Linux, with its usual C library
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before goes back to the system
        CLEAR_REFS.write_text("5")  # the peak starts again from the memory held now
    before = read_bytes("self/status", "VmRSS")
    yield peaks
    after = read_bytes("self/status", "VmHWM")
    peaks.peak_bytes = None if before is None or after is None else max(0, after - before)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
