"""Rectangles that are cut out of a clip, and of what Stage I made of it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swifti2v.config import Stage2Config
from swifti2v.errors import ConfigError, ShapeError
from swifti2v.media import (
    Frames,
    frames_to_video,
    pixels_to_video,
    resize_video,
    video_to_frames,
)
from swifti2v.pipelines.transition import MotionReference, make_reference
from swifti2v.shapes import Crop


def draw_crop(size: tuple[int, int], side: int | None, step: int, rng: np.random.Generator) -> Crop:
    """Draw a square whose corner lies on multiples of ``step``; without a side, the whole frame.

    Raises:
        ConfigError: The square is larger than the frames.
    """
    if side is None:
        return Crop(0, 0, *size)
    if side > min(size):
        raise ConfigError(
            f"crop {side} is larger than the clips, {size[1]}x{size[0]}; take a smaller one"
        )
    top, left = (step * int(rng.integers((length - side) // step + 1)) for length in size)
    return Crop(top, left, side, side)


def cut_clip(frames: Frames, crop: Crop, places: Sequence[int] | None = None) -> Tensor:
    """A part of some ``[T, H, W, 3]`` frames, or of all, as ``[1, 3, N, h, w]`` in [-1, 1]."""
    part = frames[:, crop.rows, crop.columns]
    return frames_to_video(part if places is None else part[places])


def cut_pair(
    name: str,
    frames: Frames,
    small: Frames | None,
    places: Sequence[int],
    crop: Crop,
    downscale: int,
) -> tuple[Frames, Frames | None]:
    """A part of a clip ``[T, H, W, 3]``, and the same part of its small version where there is one.

    ``small`` is what Stage I made of the clip, if it did. ``places`` are the N frames to take, the
    photo's first; the crop lies on multiples of ``downscale``.

    Returns:
        ``[N, h, w, 3]`` and ``[N, h / downscale, w / downscale, 3]`` uint8.

    Raises:
        ShapeError: ``small`` is of another size.
    """
    part = frames[_as_slice(places), crop.rows, crop.columns]
    if small is None:
        return part, None
    if small.shape[1] * downscale != frames.shape[1]:
        raise ShapeError(
            f"the reference of {name} is {small.shape[2]}x{small.shape[1]}; make it again for clips "
            f"of {frames.shape[2]}x{frames.shape[1]}"
        )
    low = crop.divide(downscale)
    return part, small[_as_slice(places), low.rows, low.columns]


def _as_slice(places: Sequence[int]) -> Any:
    """Frames that follow each other are a view, not a copy."""
    is_range = list(places) == list(range(places[0], places[0] + len(places)))
    return slice(places[0], places[0] + len(places)) if is_range else list(places)


def show_pair(
    video: Tensor, small: Tensor | None, downscale: int, stage2: Stage2Config | None = None
) -> tuple[Tensor, Tensor]:
    """A clip and its reference as Stage II sees them, made on the device of the clip.

    Args:
        video: ``[T, H, W, 3]`` uint8, the photo's frame first.
        small: ``[T, h, w, 3]`` uint8 that Stage I made of it; without one it is computed.
        downscale: Stage I's.
        stage2: Settings of the reference, see ``ReferenceFrames``.

    Returns:
        ``[1, 3, T, H, W]`` each, in [-1, 1].
    """
    shown = pixels_to_video(video)
    if small is None:
        return shown, degrade(shown, downscale, stage2)
    motion = MotionReference(small.cpu().numpy())
    return shown, make_reference(motion, shown[:, :, :1], stage2)


def degrade(video: Tensor, downscale: int, stage2: Stage2Config | None = None) -> Tensor:
    """Stage II's reference for a clip, made from the clip's own small version.

    Args:
        video: ``[B, 3, T, H, W]`` in [-1, 1]; frame 0 is the photo.
        downscale: Divisor of Stage I; the small clip is rounded to 8 bits like a motion reference.
        stage2: Settings of the reference, see ``ReferenceFrames``.

    Returns:
        ``[B, 3, T, H, W]``; not clamped, as in the pipeline.
    """
    height, width = video.shape[-2:]
    small = resize_video(video, height // downscale, width // downscale, "area")
    references = [
        make_reference(MotionReference(video_to_frames(own[None])), clip[None, :, :1], stage2)
        for own, clip in zip(small, video, strict=True)
    ]
    return torch.cat(references)
