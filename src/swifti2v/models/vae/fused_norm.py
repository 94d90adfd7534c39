"""RMS norm over channels followed by SiLU, written to a given place: the Wan VAE's most frequent step."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-24
"""Value added to the mean square: it keeps zeros from becoming NaN and is lost in other values."""


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def norm_silu(x: Tensor, weight: Tensor, output: Tensor, *, fused: bool = True) -> None:
    """Write ``silu(x / rms(x) * weight)`` to ``output``, the mean square taken over channels.

    Args:
        x: ``[B, C, T, H, W]``.
        weight: C values.
        output: Shape and dtype of ``x``; any layout.
        fused: As one kernel, where Triton is installed and channels are neighbours in CUDA memory.
    """
    is_packed = x.stride(1) == output.stride(1) == 1
    if fused and x.is_cuda and is_packed and x.dtype != torch.float64 and has_triton():
        from swifti2v.models.vae.norm_kernel import norm_silu_kernel

        norm_silu_kernel(x, weight, output, EPSILON)
        return
    normed = F.rms_norm(x.movedim(1, -1), (x.shape[1],), weight.flatten(), EPSILON)
    torch.ops.aten.silu.out(normed, out=output.movedim(1, -1))
