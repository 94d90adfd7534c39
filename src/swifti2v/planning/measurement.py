"""Rates and memory of this machine, measured in about a second."""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from swifti2v.planning.devices import Device, Precision, Rates
from swifti2v.proc import read_bytes


def measure_here(precision: Precision, *, with_gpu: bool) -> Device:
    """Measure the first GPU of this machine if it counts and is there, else the CPU."""
    is_gpu = with_gpu and torch.cuda.is_available()
    return measure(torch.device("cuda" if is_gpu else "cpu"), precision)


def measure(device: torch.device, precision: Precision) -> Device:
    """Measure a device of this machine for about a second.

    Args:
        device: ``cpu`` or ``cuda``.
        precision: The one that is measured; the result knows no other.
    """
    dtype, is_gpu = getattr(torch, precision), device.type == "cuda"
    side, tokens, channels = (8192, 8192, 256) if is_gpu else (768, 1024, 32)
    make = partial(torch.randn, device=device, dtype=dtype)
    matrix, query = make(side, side), make(1, 8, tokens, 64)
    frames, kernel = make(1, channels, 6, 66, 66), make(channels, channels, 3, 3, 3)
    values = torch.randn(2**28 if is_gpu else 2**21, device=device)
    attend = partial(F.scaled_dot_product_attention, query, query, query)
    with torch.inference_mode():
        rates = Rates(
            linear=2 * side**3 / _seconds(lambda: matrix @ matrix),
            attention=4 * 8 * tokens**2 * 64 / _seconds(attend),
            convolution=2 * 4 * 64 * 64 * channels**2 * 27
            / _seconds(lambda: F.conv3d(frames, kernel)),
            traffic=2 * values.nbytes / _seconds(lambda: values + 1),
            transfer=_measure_transfer(device) if is_gpu else float("inf"),
        )  # fmt: skip
    return Device(
        name=torch.cuda.get_device_name(device) if is_gpu else "CPU",
        memory_bytes=memory_bytes(device),
        rates={precision: rates},
        is_cpu=not is_gpu,
    )


def _measure_transfer(device: torch.device) -> float:
    pinned = torch.empty(2**26, pin_memory=True)
    return pinned.nbytes / _seconds(lambda: pinned.to(device, non_blocking=True))


def _seconds(run: Callable[[], object], times: int = 5) -> float:
    """Median time of a call after two that are not counted."""
    spent = []
    for index in range(times + 2):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if index > 1:
            spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def memory_bytes(device: torch.device) -> int:
    """Memory of a device of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(device: torch.device) -> int:
    """Memory of a device of this machine that can be had now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = read_bytes("meminfo", "MemAvailable")
    if available is not None:
        return available
    # What no one uses.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
