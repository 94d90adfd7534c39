"""Choose the faster number type for this CPU: measured once, and remembered."""

import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from swifti2v.planning.devices import Device, Precision
from swifti2v.planning.measurement import measure
from swifti2v.storage import write_whole

GAIN = 1.25
"""Least speed-up at which bfloat16 is worth its rounding."""
CPU = torch.device("cpu")


def choose_cpu_precision(
    cache: Path, measure_cpu: Callable[[torch.device, Precision], Device] = measure
) -> Precision:
    """``bfloat16`` where this CPU has units for it, else ``float32``.

    Args:
        cache: JSON file that remembers the answer for this CPU and this version of PyTorch.
        measure_cpu: Takes a second for each type.
    """
    key = f"{cpu_name()}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads"
    known = _read(cache)
    if known.get(key) not in ("bfloat16", "float32"):
        kinds: tuple[Precision, Precision] = ("float32", "bfloat16")
        plain, half = (_seconds(measure_cpu(CPU, kind), kind) for kind in kinds)
        known[key] = "bfloat16" if plain > GAIN * half else "float32"
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cache, json.dumps(known, indent=2) + "\n")
    return "bfloat16" if known[key] == "bfloat16" else "float32"


def cpu_name() -> str:
    """Name of the CPU."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _seconds(device: Device, precision: Precision) -> float:
    """Seconds of equal work in matrix products and attention, the mix of a window of frames."""
    rates = device.rates[precision]
    return 1 / rates.linear + 1 / rates.attention


def _read(cache: Path) -> dict[str, str]:
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
