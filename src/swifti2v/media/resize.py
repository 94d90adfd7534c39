"""Resizing of videos, frame by frame, with the same filters that Pillow has."""

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from swifti2v.errors import ShapeError

Frames = NDArray[np.uint8]
"""``[T, H, W, 3]`` RGB."""
ResizeMode = Literal["lanczos", "bicubic", "bilinear", "area"]

_SUPPORT = {"lanczos": 3.0, "bicubic": 2.0, "bilinear": 1.0}  # half width of the filter
_BICUBIC_A = -0.5  # Pillow's; Keys, "Cubic convolution interpolation", 1981


def resize_video(video: Tensor, height: int, width: int, mode: ResizeMode = "lanczos") -> Tensor:
    """Resize every frame on its own: resizing a piece equals cutting the resized whole.

    Filters are widened when scaling down, so nothing aliases. Lanczos and bicubic overshoot
    at edges; the result is not clamped. ``video`` is not changed.

    Args:
        video: ``[B, 3, T, H, W]``, floating point.
        height: Pixels, of the result.
        width: Pixels, of the result.
        mode: ``lanczos``, ``bicubic``, ``bilinear`` (Pillow's definitions) or ``area`` (means
            over the covered pixels).

    Returns:
        ``[B, 3, T, height, width]``, dtype and device of ``video``; computed in float32 or
        float64.

    Raises:
        ShapeError: A size below 1, an unknown ``mode``, or a video that is not as stated.
    """
    if video.ndim != 5 or not video.is_floating_point() or video.numel() == 0:
        raise ShapeError(
            f"a video must be a non-empty [B, 3, T, H, W] of floats; this one is "
            f"{tuple(video.shape)} {video.dtype}"
        )
    if height < 1 or width < 1:
        raise ShapeError(
            f"size {width}x{height} is not possible; both sides must be at least 1 pixel"
        )
    if mode != "area" and mode not in _SUPPORT:
        raise ShapeError(f"resize mode {mode!r} is unknown; use lanczos, bicubic, bilinear or area")
    batch_size, channels, num_frames, *size = video.shape
    if tuple(size) == (height, width):
        return video.clone()
    dtype = torch.float64 if video.dtype == torch.float64 else torch.float32
    rows = columns = torch.empty(0)
    if mode != "area":
        rows = _weights(size[0], height, mode).to(video.device, dtype)  # [height, H]
        columns = _weights(size[1], width, mode).to(video.device, dtype).T  # [W, width]
    result = video.new_empty(batch_size, channels, num_frames, height, width)
    # One product of a fixed shape a frame: larger products may round differently.
    for batch in range(batch_size):
        for index in range(num_frames):
            frame = torch.empty(channels, *size, dtype=dtype, device=video.device)
            frame.copy_(video[batch, :, index])  # [3, H, W], its own memory: alignment counts too
            if mode == "area":
                resized = F.interpolate(frame[None], (height, width), mode="area")[0]
            else:
                resized = rows @ (frame @ columns)
            result[batch, :, index] = resized
    return result


def _kernel(x: NDArray[np.floating], mode: str) -> NDArray[np.floating]:
    distance = np.abs(x)
    if mode == "lanczos":
        return np.where(distance < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
    if mode == "bilinear":
        return np.where(distance < 1, 1 - distance, 0.0)
    near = ((_BICUBIC_A + 2) * distance - (_BICUBIC_A + 3)) * distance**2 + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * _BICUBIC_A
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))


@lru_cache(maxsize=64)
def _weights(size: int, new_size: int, mode: str) -> Tensor:
    """Weights ``[new_size, size]`` float64; each row sums to one (Pillow's ``Resample.c``)."""
    scale = size / new_size
    stretch = max(scale, 1.0)
    support = _SUPPORT[mode] * stretch
    weights = np.zeros((new_size, size))
    for row in range(new_size):
        centre = (row + 0.5) * scale
        start = max(0, math.floor(centre - support + 0.5))
        stop = min(size, math.floor(centre + support + 0.5))
        values = _kernel((np.arange(start, stop) - centre + 0.5) / stretch, mode)
        weights[row, start:stop] = values / values.sum()
    return torch.from_numpy(weights)


def frames_to_video(frames: Frames) -> Tensor:
    """Turn frames from a file into a video.

    Args:
        frames: ``[T, H, W, 3]`` uint8; not changed.

    Returns:
        ``[1, 3, T, H, W]`` float32 in [-1, 1].

    Raises:
        ShapeError: ``frames`` is not as stated.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ShapeError(
            f"frames must be uint8 [T, H, W, 3]; these are {frames.dtype} {frames.shape}"
        )
    return pixels_to_video(torch.from_numpy(np.require(frames, requirements=["C", "W"])))


def pixels_to_video(pixels: Tensor) -> Tensor:
    """Turn ``[T, H, W, 3]`` uint8 into a video ``[1, 3, T, H, W]`` in [-1, 1], on its device."""
    return (pixels.permute(3, 0, 1, 2).float() / 127.5 - 1)[None].contiguous()


def video_to_frames(video: Tensor) -> Frames:
    """Turn a video into frames for a file; values are clamped to [-1, 1] and rounded.

    Args:
        video: ``[1, 3, T, H, W]``, any floating type and device; not changed.

    Returns:
        ``[T, H, W, 3]`` uint8.

    Raises:
        ShapeError: ``video`` is not as stated.
    """
    if video.ndim != 5 or video.shape[:2] != (1, 3):
        raise ShapeError(f"a video must be [1, 3, T, H, W]; this one is {tuple(video.shape)}")
    frames = torch.empty(
        (*video.shape[2:], 3), dtype=torch.uint8, pin_memory=video.device.type == "cuda"
    )
    for index in range(len(frames)):  # one at a time: hardly any memory beside the video
        pixels = video[0, :, index].permute(1, 2, 0).float().clamp(-1, 1)  # [H, W, 3]
        levels = pixels.add_(1).mul_(127.5).round_().to(torch.uint8)
        frames[index].copy_(levels.contiguous(), non_blocking=True)
    if video.is_cuda:
        torch.cuda.current_stream(video.device).synchronize()
    result: Frames = frames.numpy()
    return result


def downscale_video(frames: Frames, factor: int, device: torch.device | str = "cpu") -> Tensor:
    """Means over ``factor`` x ``factor`` pixels; one frame is held at full size.

    Args:
        frames: ``[T, H, W, 3]`` uint8.
        factor: Whole number that H and W are multiples of.
        device: Where it is computed and stays.

    Returns:
        ``[1, 3, T, H / factor, W / factor]`` float32 in [-1, 1], not rounded to 8 bits.

    Raises:
        ShapeError: A side is no multiple of ``factor``.
    """
    _, height, width, _ = frames.shape
    if height % factor or width % factor:
        raise ShapeError(f"{width}x{height} cannot be divided by {factor}; crop the clip first")
    pieces = [
        resize_video(
            frames_to_video(frame[None]).to(device), height // factor, width // factor, "area"
        )
        for frame in frames
    ]
    return torch.cat(pieces, dim=2)


def downscale(frames: Frames, factor: int) -> Frames:
    """``downscale_video`` rounded to 8 bits: the true low-resolution clip."""
    return video_to_frames(downscale_video(frames, factor))
