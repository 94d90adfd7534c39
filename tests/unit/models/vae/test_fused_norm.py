import os
import subprocess
import sys

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import Tensor
from torch.nn import functional as F

from swifti2v.models.vae.fused_norm import has_triton, norm_silu

needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")
SIZES = [(1, 5, 3, 4, 7), (2, 96, 1, 3, 3), (1, 160, 2, 5, 9)]
LAYOUTS = [torch.channels_last_3d, torch.contiguous_format]


def frames_of(size: tuple[int, ...], layout: torch.memory_format) -> Tensor:
    """A part of larger frames, with places where all channels are zero."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, frames, height, width = size
    large = torch.randn(batch, channels, frames, height + 2, width + 3, generator=generator)
    large[..., 1, 2] = 0
    return large.contiguous(memory_format=layout)[..., 1:-1, 2:-1]


def norm_of(channels: int) -> WanRMS_norm:
    norm = WanRMS_norm(channels, images=False)
    generator = torch.Generator().manual_seed(1)
    norm.gamma.data = torch.randn(channels, 1, 1, 1, generator=generator)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_norm_and_silu_of_diffusers_written_in_place(size, layout):
    frames, norm = frames_of(size, layout), norm_of(size[1])
    batch, channels, num_frames, *sides = size
    buffer = torch.full((batch, channels, num_frames + 2, *sides), 7.0)
    buffer = buffer.contiguous(memory_format=layout)

    norm_silu(frames, norm.gamma, buffer[:, :, 2:])

    torch.testing.assert_close(buffer[:, :, 2:], F.silu(norm(frames)))
    assert (buffer[:, :, :2] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_rounded_once(dtype):
    frames = frames_of(SIZES[1], torch.channels_last_3d).to(dtype)
    norm = norm_of(96)
    output = torch.empty_like(frames)

    norm_silu(frames, norm.gamma.to(dtype), output)

    norm.gamma.data = norm.gamma.to(dtype).float()
    exact = F.silu(norm(frames.float()))
    assert (output.float() - exact).abs().max() < 2 * torch.finfo(dtype).eps * exact.abs().max()


@needs_triton
def test_the_kernel_gives_what_the_plain_operations_give():
    # Interpreted on the CPU, which Triton decides when it is first imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.helpers.interpreted_kernel"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["6", "cases"]
