"""Frames small enough to follow, and what motion leaves unexplained between two of them."""

import cv2
import numpy as np
import numpy.typing as npt

from swifti2v.evaluation.metrics.frames import Frames, to_uint8
from swifti2v.media.flow import optical_flow, visible, warp

SMALL_SIDE = 640
"""Longer side of ``shrink``: a quarter of 2560 pixels."""


def shrink(frame: Frames) -> npt.NDArray[np.uint8]:
    """A frame ``[H, W, 3]`` with a longer side of at most 640 pixels, as area means.

    Motion, colour and structure survive; what fine detail and flow's errors do to it does not.
    """
    pixels = to_uint8(frame)
    height, width = pixels.shape[:2]
    scale = SMALL_SIDE / max(height, width)
    if scale >= 1:
        return pixels
    size = (round(width * scale), round(height * scale))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def motion_residual(frame: Frames, neighbour: Frames) -> npt.NDArray[np.float32]:
    """Difference that motion does not explain: a frame minus its neighbour warped onto it.

    Args:
        frame: ``[H, W, 3]`` uint8, or float in [0, 1].
        neighbour: The frame before or after it.

    Returns:
        ``[P, 3]`` float32 differences (range 1) at the P pixels visible in both frames; P may
        be 0, e.g. across a cut.
    """
    a, b = to_uint8(frame), to_uint8(neighbour)
    forward, backward = optical_flow(a, b, "fast"), optical_flow(b, a, "fast")
    warped = warp(b.astype(np.float32), forward)
    difference = ((a - warped) / 255).astype(np.float32, copy=False)
    residual: npt.NDArray[np.float32] = difference[visible(forward, backward)]
    return residual
