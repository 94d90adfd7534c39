"""Rates of machines: data sheets of common GPUs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from swifti2v.errors import ConfigError
from swifti2v.units import MB

Precision = Literal["bfloat16", "float16", "float32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PCIE4, PCIE5 = 31.5e9, 63e9
"""Bytes a second of 16 lanes in one direction."""
PCIE4_X8 = PCIE4 / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Rates that a device reaches in practice at one precision."""

    linear: float
    """FLOP a second of matrix products."""
    attention: float
    """FLOP a second of scaled dot-product attention."""
    convolution: float
    """FLOP a second of convolutions."""
    traffic: float
    """Bytes a second of all other operations, inputs and outputs."""
    transfer: float
    """Bytes a second between host and device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Share of a data sheet's peak that is reached. Assumptions, not measured by this project."""

    linear: float
    attention: float
    convolution: float
    traffic: float = 0.84
    transfer: float = 0.8


HOPPER = Efficiency(linear=0.66, attention=0.59, convolution=0.5)
"""With flash attention instead (``HOPPER_FLASH``) 650 TFLOP/s of linears and 2.8 TB/s on an H100
reproduce the published forward pass of Wan2.1-T2V-14B (480x832, 81 frames, eager), 4.6 s. Attention
is cuDNN's here, as ``SpeedConfig.attention`` chooses by itself: 582 TFLOP/s on an H100 for heads of
128 and 8,192 tokens.

Source:
    github.com/huggingface/diffusers, pull request 11605; github.com/meta-pytorch/tritonbench, 141.
"""
HOPPER_FLASH = 350e12
"""FLOP a second of flash attention 2, PyTorch's own choice, on H100 and H200."""
WORKSTATION = Efficiency(linear=0.85, attention=0.75, convolution=0.65)
"""Cards with a low ratio of arithmetic to memory traffic come nearer to their peak: the same forward
pass, streamed, takes 13.7 s on an RTX 4090, and 11.6 s (88 % of the peak) compiled.

Source:
    github.com/huggingface/diffusers, pull request 11605; convolutions by analogy.
"""
SERVER = Efficiency(linear=0.75, attention=0.6, convolution=0.55)
"""A100 and L40S, between the two; by analogy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A GPU by its data sheet, or a measured machine."""

    name: str
    memory_bytes: int
    """All of it, as ``nvidia-smi`` reports it."""
    rates: Mapping[str, Rates]
    """Rates by ``Precision``; ``float8`` means linear layers alone, the rest in bfloat16."""
    peak: float = 0.0
    """FLOP a second of bfloat16 products by the data sheet; 0 for a measured machine."""
    is_cpu: bool = False
    """Whether weights and activations live in host memory anyway."""


def _gpu(
    name: str,
    memory_mb: int,
    bandwidth: float,
    tflops: tuple[float, float, float | None],
    pcie: float,
    share: Efficiency,
) -> Device:
    """A GPU by its data sheet.

    Args:
        name: For people.
        memory_mb: As ``nvidia-smi`` reports it.
        bandwidth: Bytes a second between memory and chip.
        tflops: Dense peaks with 32-bit accumulation in bfloat16 or float16, float32 (without tensor
            cores) and float8.
        pcie: Bytes a second between host and device, in one direction.
        share: Share of the peaks that is reached.
    """
    half, single, quarter = (None if peak is None else peak * 1e12 for peak in tflops)
    assert half is not None
    assert single is not None

    def rates(linear: float, attention: float, convolution: float) -> Rates:
        return Rates(
            linear=linear * share.linear,
            attention=attention * share.attention,
            convolution=convolution * share.convolution,
            traffic=bandwidth * share.traffic,
            transfer=pcie * share.transfer,
        )

    by_precision = {
        "bfloat16": rates(half, half, half),
        "float16": rates(half, half, half),
        # cuDNN computes float32 convolutions in TF32, at half the rate of bfloat16.
        "float32": rates(single, single, max(single, half / 2)),
    }
    if quarter is not None:
        by_precision["float8"] = rates(quarter, half, half)
    return Device(name=name, memory_bytes=memory_mb * MB, rates=by_precision, peak=half)


DEVICES = {
    "rtx3060": _gpu("GeForce RTX 3060", 12288, 360e9, (25.5, 12.7, None), PCIE4, WORKSTATION),
    "rtx3090": _gpu("GeForce RTX 3090", 24576, 936e9, (71, 35.6, None), PCIE4, WORKSTATION),
    "rtx4060ti": _gpu(
        "GeForce RTX 4060 Ti 16 GB", 16380, 288e9, (44.1, 22.1, 88.2), PCIE4_X8, WORKSTATION
    ),
    "rtx4070": _gpu("GeForce RTX 4070", 12282, 504e9, (58.3, 29.1, 116.6), PCIE4, WORKSTATION),
    "rtx4080": _gpu("GeForce RTX 4080", 16376, 717e9, (97.5, 48.7, 194.9), PCIE4, WORKSTATION),
    "rtx4090": _gpu("GeForce RTX 4090", 24564, 1008e9, (165.2, 82.6, 330.3), PCIE4, WORKSTATION),
    "rtx5070ti": _gpu("GeForce RTX 5070 Ti", 16303, 896e9, (87.9, 43.9, 175.8), PCIE5, WORKSTATION),
    "rtx5080": _gpu("GeForce RTX 5080", 16303, 960e9, (112.6, 56.3, 225.1), PCIE5, WORKSTATION),
    "rtx5090": _gpu("GeForce RTX 5090", 32607, 1792e9, (209.5, 104.8, 419), PCIE5, WORKSTATION),
    "l40s": _gpu("L40S", 46068, 864e9, (362, 91.6, 733), PCIE4, SERVER),
    "a100": _gpu("A100 SXM 80 GB", 81920, 2039e9, (312, 19.5, None), PCIE4, SERVER),
    "h100": _gpu("H100 SXM", 81559, 3350e9, (989.4, 66.9, 1978.9), PCIE5, HOPPER),
    "h200": _gpu("H200 SXM", 143771, 4800e9, (989.4, 66.9, 1978.9), PCIE5, HOPPER),
}
"""Devices by their names on the command line.

Source:
    NVIDIA's data sheets of A100, L40S, H100 and H200; architecture papers of GA102, Ada and RTX
    Blackwell (GeForce cards accumulate in 32 bits at half of their quoted tensor rate). For RTX 3060
    and 4060 Ti, which those papers leave out: cores and boost clocks of NVIDIA's product pages
    (3,584 at 1.777 GHz, 4,352 at 2.535 GHz), two operations a core and clock, and the ratios of the
    other cards of their generation. The RTX 4060 Ti has eight lanes.
"""
KNOWN = (*DEVICES, "cpu", "auto")


def find_device(name: str, precision: Precision) -> Device:
    """A device by name; ``cpu`` and ``auto`` (the first GPU here, else the CPU) are measured.

    Raises:
        ConfigError: The name is unknown.
    """
    if name in DEVICES:
        return DEVICES[name]
    if name not in KNOWN:
        raise ConfigError(f"device {name!r} is unknown; use one of {', '.join(KNOWN)}")
    from swifti2v.planning.measurement import measure_here  # needs PyTorch

    return measure_here(precision, with_gpu=name == "auto")
