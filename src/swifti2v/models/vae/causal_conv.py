"""Causal convolutions with an explicit history, and what makes them fast."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from swifti2v.models.vae.fused_norm import norm_silu

History = list[Tensor | None]
"""Last inputs of the causal convolutions, ``[B, C, 1 or 2, h, w]`` by slot; None before the clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeLevers:
    """Optimizations of the VAE; each can be switched alone and changes values by rounding only."""

    is_channels_last: bool = True
    """Frames are laid out ``[T, H, W, C]`` in memory, as the convolutions of cuDNN and oneDNN work."""
    folds_upsampling: bool = True
    """Nearest upsampling and the 3x3 convolution behind it are one transposed convolution, with
    4 instead of 9 products for each output."""
    fuses_norm: bool = True
    """RMS norm and SiLU are one kernel, on CUDA and where Triton is installed."""
    uses_onednn: bool = True
    """Use oneDNN's convolutions on a CPU in float32 whatever their size; PyTorch by itself
    takes a slower kernel for a single clip of small frames."""

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of frames ``[B, C, T, H, W]``."""
        return torch.channels_last_3d if self.is_channels_last else torch.contiguous_format


class Slots:
    """Hands out places in a history."""

    def __init__(self) -> None:
        self.count = 0

    def take(self) -> int:
        """The next one."""
        self.count += 1
        return self.count - 1


class CausalConv:
    """A causal convolution, with the norm and SiLU before it if there are any.

    Args:
        conv: ``WanCausalConv3d``; padding is half its kernel in space, all before it in time.
        slots: Gives one place.
        levers: See there.
        norm: ``WanRMS_norm`` over channels.
    """

    grows = shrinks = 1

    def __init__(self, conv: Any, slots: Slots, levers: VaeLevers, norm: Any = None) -> None:
        self._conv, self._norm, self._levers = conv, norm, levers
        self._slot = slots.take()
        self._past: int = conv.kernel_size[0] - conv.stride[0]
        self._margin: int = conv.kernel_size[1] // 2

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """See ``Layer``."""
        return start - self._margin, stop + self._margin

    def __call__(self, x: Tensor, history: History, *, first: bool = False) -> Tensor:
        """See ``FrameLayer``."""
        del first
        past, before = self._past, history[self._slot]
        batch, channels, frames, *size = x.shape
        # ``empty`` would not keep the layout for one row or one column.
        buffer = torch.empty(
            (batch, channels, past + frames, *size),
            dtype=x.dtype,
            device=x.device,
            memory_format=self._levers.memory_format,
        )
        buffer[:, :, :past] = 0 if before is None else before
        if self._norm is None:
            buffer[:, :, past:] = x
        else:
            norm_silu(x, self._norm.gamma, buffer[:, :, past:], fused=self._levers.fuses_norm)
        history[self._slot] = buffer[:, :, -past:].clone()
        return convolve(buffer, self._conv, self._margin, self._levers)

    def remember(self, x: Tensor, history: History) -> None:
        """Take ``x`` as history, without computing anything."""
        history[self._slot] = x[:, :, -self._past :].clone()


def convolve(x: Tensor, conv: Any, margin: int, levers: VaeLevers) -> Tensor:
    """Convolve ``[B, C, T, H, W]``, padded in space alone by ``margin`` zeros."""
    padding = (0, margin, margin)
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if levers.uses_onednn and has_onednn and x.device.type == "cpu" and x.dtype == torch.float32:
        output: Tensor = torch.ops.aten.mkldnn_convolution(
            x, conv.weight, conv.bias, padding, conv.stride, (1, 1, 1), 1
        )
        return output
    return F.conv3d(x, conv.weight, conv.bias, stride=conv.stride, padding=padding)
