"""The layers of diffusers' Wan VAE with an explicit history, for one latent frame at a time.

They compute with the weights of diffusers' modules and give the same values up to rounding, but
move less memory: frames stay in channels-last layout, a convolution finds its history, its padding
and its normalized input in one buffer, and sums are made in place.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swifti2v.errors import LoadingError
from swifti2v.models.vae.causal_conv import CausalConv, History, Slots, VaeLevers, convolve
from swifti2v.models.vae.tiles import Layer


class FrameLayer(Layer, Protocol):
    """A layer that computes."""

    def __call__(self, x: Tensor, history: History, *, first: bool) -> Tensor:
        """``[B, C, T, H, W]`` of one latent frame to that of the next layer.

        Args:
            x: Not changed.
            history: Read and updated, in the layer's own slots.
            first: The frame is the first of its clip.
        """


class ResidualBlock:
    """``WanResidualBlock``."""

    grows = shrinks = 1

    def __init__(self, block: Any, slots: Slots, levers: VaeLevers) -> None:
        self._levers = levers
        self._convs = [
            CausalConv(block.conv1, slots, levers, block.norm1),
            CausalConv(block.conv2, slots, levers, block.norm2),
        ]
        self._shortcut = block.conv_shortcut if block.in_dim != block.out_dim else None

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """See ``Layer``."""
        return reach_through(self._convs, start, stop)

    def __call__(self, x: Tensor, history: History, *, first: bool = False) -> Tensor:
        """See ``FrameLayer``."""
        hidden = self._convs[0](x, history, first=first)
        hidden = self._convs[1](hidden, history, first=first)
        if self._shortcut is None:
            return hidden.add_(x)
        return hidden.add_(convolve(x, self._shortcut, 0, self._levers))


def reach_through(layers: Sequence[Any], start: int, stop: int) -> tuple[int, int]:
    """Reach of layers one after the other; no layer may depend on the whole frame."""
    for layer in reversed(layers):
        start, stop = layer.reach(start, stop)
    return start, stop


class MiddleBlock:
    """``WanMidBlock``: its attention makes every sample depend on the whole frame."""

    grows = shrinks = 1

    def __init__(self, block: Any, slots: Slots, levers: VaeLevers) -> None:
        self._resnets = [ResidualBlock(resnet, slots, levers) for resnet in block.resnets]
        self._attentions = list(block.attentions)

    def reach(self, start: int, stop: int) -> None:
        """See ``Layer``."""
        del start, stop

    def __call__(self, x: Tensor, history: History, *, first: bool = False) -> Tensor:
        """See ``FrameLayer``."""
        x = self._resnets[0](x, history, first=first)
        for attention, resnet in zip(self._attentions, self._resnets[1:], strict=True):
            x = resnet(attention(x), history, first=first)
        return x


class AttentionLayer:
    """``WanAttentionBlock`` between other layers."""

    grows = shrinks = 1

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    def reach(self, start: int, stop: int) -> None:
        """See ``Layer``."""
        del start, stop

    def __call__(self, x: Tensor, history: History, *, first: bool = False) -> Tensor:
        """See ``FrameLayer``."""
        del history, first
        output: Tensor = self._block(x)
        return output


class Upsample:
    """``WanResample`` that doubles space and, in later frames of a clip, time."""

    grows, shrinks = 2, 1

    def __init__(self, block: Any, slots: Slots, levers: VaeLevers) -> None:
        self._levers = levers
        self._conv = block.resample[1]
        self._time: CausalConv | None = None
        if block.mode == "upsample3d":
            self._time = CausalConv(block.time_conv, slots, levers)

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """See ``Layer``."""
        return (start - 1) // 2, stop // 2 + 1

    def __call__(self, x: Tensor, history: History, *, first: bool = False) -> Tensor:
        """See ``FrameLayer``."""
        if self._time is not None and not first:  # a first frame leaves a history of zeros
            x = self._double_frames(self._time(x, history))
        return _on_frames(x, self._enlarge)

    def _double_frames(self, pairs: Tensor) -> Tensor:
        """``[B, 2C, T, H, W]`` to ``[B, C, 2T, H, W]``: the halves of the channels take turns."""
        batch, channels, frames, *size = pairs.shape
        output = torch.empty(
            (batch, channels // 2, 2 * frames, *size),
            dtype=pairs.dtype,
            device=pairs.device,
            memory_format=self._levers.memory_format,
        )
        output[:, :, 0::2], output[:, :, 1::2] = pairs.chunk(2, dim=1)
        return output

    def _enlarge(self, frames: Tensor) -> Tensor:
        weight, bias = self._conv.weight, self._conv.bias
        if self._levers.folds_upsampling:
            return F.conv_transpose2d(frames, fold_upsampling(weight), bias, stride=2, padding=1)
        large = F.interpolate(frames, scale_factor=2.0, mode="nearest-exact")
        return F.conv2d(large, weight, bias, padding=1)


def fold_upsampling(weight: Tensor) -> Tensor:
    """Kernel of the transposed convolution that upsamples by 2 (nearest) and convolves.

    Each input is spread over 2 x 2 outputs, so the kernel is the flipped one, summed over those.

    Args:
        weight: ``[out, in, 3, 3]`` of a convolution with padding 1.

    Returns:
        ``[in, out, 4, 4]`` for stride 2 and padding 1; sums are made in float32 at least.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    spread = F.pad(wide.flip(2, 3), (1, 1, 1, 1))  # [out, in, 5, 5]
    spread = spread[:, :, 1:] + spread[:, :, :-1]
    spread = spread[..., 1:] + spread[..., :-1]
    return spread.transpose(0, 1).to(weight.dtype)


class Downsample:
    """``WanResample`` that halves space and, in later frames of a clip, time."""

    grows, shrinks = 1, 2

    def __init__(self, block: Any, slots: Slots, levers: VaeLevers) -> None:
        self._conv = block.resample[1]
        self._time: CausalConv | None = None
        if block.mode == "downsample3d":
            self._time = CausalConv(block.time_conv, slots, levers)

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """See ``Layer``."""
        return 2 * start, 2 * stop + 2  # one sample behind each pair, and one more to make a pair

    def __call__(self, x: Tensor, history: History, *, first: bool = False) -> Tensor:
        """See ``FrameLayer``."""
        x = _on_frames(x, self._reduce)
        if self._time is None:
            return x
        if first:
            self._time.remember(x, history)
            return x
        return self._time(x, history)

    def _reduce(self, frames: Tensor) -> Tensor:
        # Padded behind each side only, which a convolution cannot do by itself.
        padded = F.pad(frames, (0, 1, 0, 1))
        return F.conv2d(padded, self._conv.weight, self._conv.bias, stride=2)


def _on_frames(x: Tensor, run: Any) -> Tensor:
    """Apply ``run`` to ``[B * T, C, H, W]``."""
    batch, _, frames, *_ = x.shape
    output: Tensor = run(x.transpose(1, 2).flatten(0, 1))
    return output.view(batch, frames, *output.shape[1:]).transpose(1, 2)


class UpBlock:
    """``WanResidualUpBlock`` and ``WanUpBlock``."""

    shrinks = 1

    def __init__(self, block: Any, slots: Slots, levers: VaeLevers) -> None:
        self._layers: list[Any] = [ResidualBlock(each, slots, levers) for each in block.resnets]
        upsamplers = getattr(block, "upsamplers", None) or [getattr(block, "upsampler", None)]
        self.grows = 1
        if upsamplers[0] is not None:
            self._layers.append(Upsample(upsamplers[0], slots, levers))
            self.grows = 2
        self._shortcut = getattr(block, "avg_shortcut", None)
        if self._shortcut is not None and self._shortcut.in_channels % self._shortcut.out_channels:
            raise LoadingError(
                f"the VAE's decoder goes from {self._shortcut.in_channels} to "
                f"{self._shortcut.out_channels} channels; only whole fractions are supported"
            )

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """See ``Layer``."""
        return reach_through(self._layers, start, stop)

    def __call__(self, x: Tensor, history: History, *, first: bool = False) -> Tensor:
        """See ``FrameLayer``."""
        output = x
        for layer in self._layers:
            output = layer(output, history, first=first)
        if self._shortcut is not None:
            add_duplicated(output, x, self._shortcut.factor_t, self._shortcut.repeats)
        return output


def add_duplicated(output: Tensor, x: Tensor, time: int, repeats: int) -> None:
    """Add ``DupUp3D`` of ``x`` to ``output``, in place and without making it.

    Args:
        output: ``[B, D, time * T, 2h, 2w]``, or without the first ``time - 1`` frames, which the
            first latent frame of a clip does not have.
        x: ``[B, C, T, h, w]``.
        time: Frames for each one of ``x``.
        repeats: Channels made of each one of ``x``, in order: of them each output channel takes
            its ``4 * time`` places.
    """
    group = x.shape[1] // output.shape[1]  # channels of ``x`` that share the places of an output's
    missing = time * x.shape[2] - output.shape[2]
    for place in range(4 * time):
        after, row, column = place // 4, place // 2 % 2, place % 2
        if after < missing:
            continue
        source = x[:, place // repeats :: group]
        output[:, :, after - missing :: time, row::2, column::2].add_(source)


class ResidualDownBlock:
    """``WanResidualDownBlock``."""

    grows = 1

    def __init__(self, block: Any, slots: Slots, levers: VaeLevers) -> None:
        self._layers: list[Any] = [ResidualBlock(each, slots, levers) for each in block.resnets]
        self.shrinks = 1
        if block.downsampler is not None:
            self._layers.append(Downsample(block.downsampler, slots, levers))
            self.shrinks = 2
        self._shortcut = block.avg_shortcut
        if self._shortcut.in_channels * self._shortcut.factor_t % self._shortcut.out_channels:
            raise LoadingError(
                f"the VAE's encoder goes from {self._shortcut.in_channels} to "
                f"{self._shortcut.out_channels} channels; only a whole number of channels for each "
                "frame that is averaged is supported"
            )

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """See ``Layer``."""
        start, stop = reach_through(self._layers, start, stop)
        side = self.shrinks  # whole pairs, for the shortcut
        return start // side * side, -(-stop // side) * side

    def __call__(self, x: Tensor, history: History, *, first: bool = False) -> Tensor:
        """See ``FrameLayer``."""
        output = x
        for layer in self._layers:
            output = layer(output, history, first=first)
        mean = self._shortcut
        return output.add_(average(x, mean.factor_t, mean.factor_s, mean.out_channels))


def average(x: Tensor, time: int, side: int, channels: int) -> Tensor:
    """``AvgDown3D``: means over ``side`` x ``side`` samples, and over frames and channels in groups.

    Args:
        x: ``[B, C, T, h, w]``; zeros are put before the frames to make T a multiple of ``time``.
        time: Frames that become one.
        side: Rows and columns that become one.
        channels: Number of channels of the result; they divide ``C * time``.

    Returns:
        ``[B, channels, T / time, h / side, w / side]``.
    """
    pooled = _on_frames(x, partial(F.avg_pool2d, kernel_size=side)) if side > 1 else x
    missing = -pooled.shape[2] % time
    if missing:
        pooled = F.pad(pooled, (0, 0, 0, 0, missing, 0))
    # Channels of the result take those of the input one after the other, each with its frames.
    batch, num_channels, frames, *size = pooled.shape
    groups = pooled.view(batch, num_channels, frames // time, time, *size).transpose(2, 3)
    return groups.reshape(batch, channels, -1, frames // time, *size).mean(dim=2)
