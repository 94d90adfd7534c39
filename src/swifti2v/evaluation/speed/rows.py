"""Rows of a benchmark, as a table for people and as plain values for programs."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from swifti2v.evaluation.speed.timing import Timing
from swifti2v.planning.precision import cpu_name
from swifti2v.units import MB
from swifti2v.version import __version__

COLUMNS = ("case", "variant", "s", "spread", "cold s", "ratio", "TFLOP/s", "peak MB", "error", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way to compute one thing."""

    case: str
    """Name of the computation."""
    variant: str
    """Way of computing it."""
    timing: Timing
    flops: float | None = None
    """FLOP counted on meta tensors: the least work, also for variants that spend more."""
    ratio: float | None = None
    """Speed relative to the first variant of the case; 2 is twice as fast."""
    error: float | None = None
    """Distance to the result in float32, as a part of its length."""
    note: str = ""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds of parts."""

    def cells(self) -> list[str]:
        """Cells as printed, in the order of ``COLUMNS``."""
        timing = self.timing
        rate = None if self.flops is None else self.flops / timing.seconds / 1e12
        peak = None if timing.peak_bytes is None else timing.peak_bytes / MB
        return [
            self.case,
            self.variant,
            f"{timing.seconds:.4g}",
            f"{timing.spread:.0%}",
            f"{timing.cold_seconds:.4g}",
            _cell(self.ratio, ".2f"),
            _cell(rate, ".3g"),
            _cell(peak, ",.0f"),
            _cell(self.error, ".1e"),
            self.note,
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Machine of a benchmark."""

    device: str
    """Name of the GPU or the CPU."""
    pytorch: str
    """Version."""
    cudnn: int | None
    """Version, on a GPU."""
    threads: int
    """Threads of PyTorch on the CPU."""
    python: str
    """Version."""
    swifti2v: str
    """Version."""

    @classmethod
    def here(cls, device: torch.device) -> "Machine":
        """Describe this machine."""
        is_gpu = device.type == "cuda"
        return cls(
            device=torch.cuda.get_device_name(device) if is_gpu else cpu_name(),
            pytorch=torch.__version__,
            cudnn=torch.backends.cudnn.version() if is_gpu else None,  # type: ignore[no-untyped-call]
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            swifti2v=__version__,
        )


def add_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows with their ratio to the first of their case."""
    first: dict[str, float] = {}
    for row in rows:
        first.setdefault(row.case, row.timing.seconds)
    return [
        Row(
            **{name: getattr(row, name) for name in Row.__slots__ if name != "ratio"},
            ratio=first[row.case] / row.timing.seconds,
        )
        for row in rows
    ]


def to_dict(rows: Sequence[Row], machine: Machine, arguments: Sequence[str]) -> dict[str, Any]:
    """Plain values: the command, the machine and every row."""
    return {
        "arguments": list(arguments),
        "machine": asdict(machine),
        "rows": [asdict(row) for row in rows],
    }


def to_markdown(rows: Sequence[Row], machine: Machine, arguments: Sequence[str]) -> str:
    """A table, under the command and the machine."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---" + "|---:" * 7 + "|---|"]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    cudnn = "" if machine.cudnn is None else f", cuDNN {machine.cudnn}"
    return "\n".join(
        [
            f"`{' '.join(arguments)}`: {machine.device}, {machine.threads} threads, PyTorch "
            f"{machine.pytorch}{cudnn}, swifti2v {machine.swifti2v}",
            "",
            *lines,
        ]
    )


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
