"""Triton kernel of ``swifti2v.models.vae.fused_norm``; imported only where Triton is installed."""

import triton
import triton.language as tl
from torch import Tensor

PROGRAM_SIZE = 4096
"""Values that a program holds: a few rows of all channels."""


@triton.jit  # type: ignore[untyped-decorator]
def _norm_silu(  # type: ignore[no-untyped-def] # noqa: PLR0913
    x, weight, output, channels, rows, frames, height, width,
    x_batch, x_frame, x_row, x_column, out_batch, out_frame, out_row, out_column,
    epsilon, NUM_ROWS: tl.constexpr, NUM_CHANNELS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    channel = tl.arange(0, NUM_CHANNELS)
    inside = (place < rows)[:, None] & (channel < channels)[None, :]
    column, rest = place % width, place // width
    row, rest = rest % height, rest // height
    frame, batch = rest % frames, rest // frames
    read = batch * x_batch + frame * x_frame + row * x_row + column * x_column
    written = batch * out_batch + frame * out_frame + row * out_row + column * out_column
    values = tl.load(x + read[:, None] + channel[None, :], inside, other=0).to(tl.float32)
    gamma = tl.load(weight + channel, channel < channels, other=0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / channels + epsilon)
    normed = values * scale[:, None] * gamma[None, :]
    result = normed * tl.sigmoid(normed)
    target = output + written[:, None] + channel[None, :]
    tl.store(target, result.to(output.dtype.element_ty), inside)


def norm_silu_kernel(x: Tensor, weight: Tensor, output: Tensor, epsilon: float) -> None:
    """``norm_silu`` in one kernel, computed in float32.

    Args:
        x: ``[B, C, T, H, W]``; neighbouring channels are neighbours in memory.
        weight: C values.
        output: As ``x``.
        epsilon: Added to the mean square.
    """
    batch, channels, frames, height, width = x.shape
    rows = batch * frames * height * width
    num_channels = triton.next_power_of_2(channels)
    num_rows = max(PROGRAM_SIZE // num_channels, 1)
    strides = [[tensor.stride(dim) for dim in (0, 2, 3, 4)] for tensor in (x, output)]
    _norm_silu[(triton.cdiv(rows, num_rows),)](
        x, weight.flatten(), output, channels, rows, frames, height, width,
        *strides[0], *strides[1], epsilon, NUM_ROWS=num_rows, NUM_CHANNELS=num_channels,
    )  # fmt: skip
