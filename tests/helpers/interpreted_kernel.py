"""Compare the Triton kernel with plain operations; run with TRITON_INTERPRET=1."""

import sys

import torch

from swifti2v.models.vae.fused_norm import EPSILON, norm_silu
from swifti2v.models.vae.norm_kernel import norm_silu_kernel

SIZES = [(1, 5, 3, 4, 7), (2, 96, 1, 3, 3), (1, 160, 2, 5, 9)]


def compare(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """Frames that are a part of larger ones, written into a part of a larger buffer."""
    batch, channels, frames, height, width = size
    large = torch.randn(batch, channels, frames, height + 2, width + 3).to(dtype)
    large[..., 1, 2] = 0
    x = large.contiguous(memory_format=torch.channels_last_3d)[..., 1:-1, 2:-1]
    weight = torch.randn(channels, 1, 1, 1).to(dtype)
    buffers = [
        torch.zeros(batch, channels, frames + 2, height, width, dtype=dtype).contiguous(
            memory_format=torch.channels_last_3d
        )
        for _ in range(2)
    ]
    norm_silu(x, weight, buffers[0][:, :, 2:], fused=False)
    norm_silu_kernel(x, weight, buffers[1][:, :, 2:], EPSILON)
    precision = 4 * torch.finfo(dtype).eps  # plain operations round once more
    torch.testing.assert_close(buffers[1], buffers[0], rtol=precision, atol=precision)


if __name__ == "__main__":
    torch.manual_seed(0)
    cases = [(size, dtype) for size in SIZES for dtype in (torch.float32, torch.float16)]
    for size, dtype in cases:
        compare(size, dtype)
    sys.stdout.write(f"{len(cases)} cases\n")
