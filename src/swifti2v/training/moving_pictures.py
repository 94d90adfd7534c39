"""Clips made of large pictures: a camera pans, tilts and zooms over them, seen through a crop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from swifti2v.training.camera_motion import SHIFT, ZOOM, CameraMotion

MAX_SHIFT = 0.16
"""Longest way of a pan or tilt, in widths (heights) of the frame over ``NUM_FRAMES``."""
MAX_ZOOM = 0.3
"""Largest zoom over ``NUM_FRAMES``, as the logarithm of the scale."""
NUM_FRAMES = 33
"""Frames over which the motions above are counted."""
_SUPERSAMPLED = 1.2  # from this many picture pixels a frame pixel on, four samples are averaged
_LARGEST_PART = 0.8  # of a picture that the first frame may cover, so that there is room to move


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraPath:
    """How the camera moves, and what it sees first."""

    center: tuple[float, float]
    """Column and row of the picture at the frame's centre, in picture pixels."""
    scale: float
    """Picture pixels a frame pixel."""
    pan: float = 0.0
    """Way to the right over ``NUM_FRAMES``, in frame pixels."""
    tilt: float = 0.0
    """Way downwards, likewise."""
    zoom: float = 0.0
    """Logarithm of the scale's growth over ``NUM_FRAMES``; below 0 zooms in."""


def draw_path(
    picture_size: tuple[int, int], frame_size: tuple[int, int], rng: np.random.Generator
) -> CameraPath:
    """A random camera path: a pan, a tilt, a zoom, pan and tilt and zoom together, or none.

    Args:
        picture_size: Height and width in pixels.
        frame_size: Of the clip's whole frame. A picture without room around it is enlarged.
        rng: Source of randomness.
    """
    height, width = frame_size
    fit = min(picture_size[0] / height, picture_size[1] / width)
    largest = _LARGEST_PART * fit
    scale = float(rng.uniform(1.0, largest)) if largest > 1 else largest
    row, column = (
        _draw_center(side, scale * shown, rng)
        for side, shown in zip(picture_size, frame_size, strict=True)
    )
    kinds = [{"pan"}, {"tilt"}, {"zoom"}, {"pan", "tilt", "zoom"}, set[str]()]
    kind = kinds[int(rng.integers(len(kinds)))]
    pan, tilt, zoom = rng.uniform(-1, 1, size=3)
    return CameraPath(
        center=(column, row),
        scale=scale,
        pan=float(pan) * MAX_SHIFT * width if "pan" in kind else 0.0,
        tilt=float(tilt) * MAX_SHIFT * height if "tilt" in kind else 0.0,
        zoom=float(zoom) * MAX_ZOOM if "zoom" in kind else 0.0,
    )


def draw_motion_path(
    motion: CameraMotion,
    picture_size: tuple[int, int],
    frame_size: tuple[int, int],
    rng: np.random.Generator,
) -> CameraPath:
    """The path of one of the motions that a prompt can ask for, from a random start.

    Args:
        motion: As ``camera_motion.render_motion`` does it.
        picture_size: Height and width in pixels.
        frame_size: Of the clip's whole frame.
        rng: Source of randomness.
    """
    start = draw_path(picture_size, frame_size, rng)
    sign = {"pan left": -1, "pan right": 1}.get(motion, 0)
    rise = {"tilt up": -1, "tilt down": 1}.get(motion, 0)
    growth = {"zoom in": math.log(ZOOM), "zoom out": -math.log(ZOOM)}.get(motion, 0.0)
    return replace(
        start,
        pan=sign * SHIFT * frame_size[1],
        tilt=rise * SHIFT * frame_size[0],
        zoom=growth,
    )


def render_path(
    picture: NDArray[np.uint8],
    path: CameraPath,
    frames: Sequence[float],
    frame_size: tuple[int, int],
    crop: tuple[int, int, int, int],
) -> Tensor:
    """Show a picture through a moving camera, only a part of each frame.

    Args:
        picture: ``[H, W, 3]`` RGB. Beyond its edges it is mirrored.
        path: Of the camera.
        frames: T times, counted in frames from the first.
        frame_size: Height and width of the whole frame in pixels.
        crop: Top, left, height and width of the part in pixels.

    Returns:
        ``[3, T, height, width]`` float32 in [-1, 1].
    """
    top, left, height, width = crop
    samples = 2 if path.scale > _SUPERSAMPLED else 1
    row = top + (torch.arange(height * samples) + 0.5) / samples - frame_size[0] / 2
    column = left + (torch.arange(width * samples) + 0.5) / samples - frame_size[1] / 2
    places = []  # [rows, columns, 2] in picture pixels: column, row
    for frame in frames:
        part = frame / (NUM_FRAMES - 1)
        scale = path.scale * math.exp(path.zoom * part)
        x = path.center[0] + scale * column + path.scale * path.pan * part
        y = path.center[1] + scale * row + path.scale * path.tilt * part
        places.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1))
    seen = torch.stack(places)
    lowest = (seen.amin(dim=(0, 1, 2)) - 3).clamp(min=0).int().tolist()
    x_start, y_start = (
        min(at, side - 2) for at, side in zip(lowest, picture.shape[1::-1], strict=True)
    )
    x_stop, y_stop = (
        max(int(at) + 4, start + 2)
        for at, start in zip(seen.amax(dim=(0, 1, 2)).tolist(), (x_start, y_start), strict=True)
    )
    part_shown = torch.tensor(picture[y_start:y_stop, x_start:x_stop]).permute(2, 0, 1).float()
    sides = torch.tensor([part_shown.shape[2], part_shown.shape[1]])
    grid = (seen - torch.tensor([x_start, y_start])) / sides * 2 - 1
    video = F.grid_sample(
        part_shown.expand(len(grid), -1, -1, -1),
        grid,
        mode="bilinear" if samples > 1 else "bicubic",
        padding_mode="reflection",
        align_corners=False,
    )
    video = F.avg_pool2d(video, samples).clamp(0, 255)
    return video.transpose(0, 1) / 127.5 - 1


def _draw_center(side: int, shown: float, rng: np.random.Generator) -> float:
    room = side - shown
    return float(rng.uniform(shown / 2, side - shown / 2)) if room > 0 else side / 2
