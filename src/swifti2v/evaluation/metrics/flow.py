"""Dense optical flow, warping along it, and what is left of a frame pair after both."""

from typing import Any, Literal, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from swifti2v.errors import ShapeError
from swifti2v.evaluation.metrics.frames import Frames, to_uint8

Flow: TypeAlias = npt.NDArray[np.float32]
"""``[H, W, 2]``: displacement to the right and down, in pixels."""
Image: TypeAlias = npt.NDArray[Any]

MIN_SIDE = 16
"""DIS needs a pyramid level that holds its 8-pixel patches with room to move."""
SMALL_SIDE = 640
"""Longer side of ``shrink``: a quarter of 2560 pixels."""
PRESETS = {
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}


def optical_flow(
    first: Frames,
    second: Frames,
    preset: Literal["fast", "medium"] = "medium",
    start: Flow | None = None,
) -> Flow:
    """Dense inverse-search flow from one frame to another.

    Args:
        first: ``[H, W, 3]`` uint8, or float in [0, 1]; sides of at least 16 pixels.
        second: The same size.
        preset: ``fast`` finds flow at a quarter of the size, ``medium`` at half and
            about five times slower.
        start: ``[H, W, 2]``, a guess that is refined and not changed; None starts from rest.

    Returns:
        ``[H, W, 2]`` float32, right and down in pixels: what is at ``x`` in ``first`` is at
        ``x + flow(x)`` in ``second``, so ``warp(second, flow)`` looks like ``first``.

    Raises:
        ShapeError: The frames differ in size or are too small.

    Source:
        Kroeger et al., "Fast optical flow using dense inverse search", ECCV 2016 (OpenCV).
    """
    if first.shape != second.shape or first.ndim != 3 or first.shape[-1] != 3:
        raise ShapeError(
            f"flow needs two frames [H, W, 3] of one size, got {tuple(first.shape)} "
            f"and {tuple(second.shape)}"
        )
    if min(first.shape[:2]) < MIN_SIDE:
        raise ShapeError(f"a side of {tuple(first.shape)} is below {MIN_SIDE} pixels: enlarge it")
    grey = [cv2.cvtColor(to_uint8(frame), cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    guess = np.zeros((*grey[0].shape, 2), np.float32) if start is None else start.copy()
    flow = cv2.DISOpticalFlow.create(PRESETS[preset]).calc(grey[0], grey[1], guess)
    return flow.astype(np.float32, copy=False)


def warp(image: Image, flow: Flow) -> Image:
    """Look up every pixel of an image where the flow points to (backward warping).

    Args:
        image: ``[H, W]`` or ``[H, W, K]`` with K of at most 4, uint8 or float32.
        flow: ``[H, W, 2]``, right and down in pixels.

    Returns:
        The same shape and type: ``image(x + flow(x))``, Lanczos over 8 x 8 pixels, mirrored
        at the edges. A float32 image may overshoot its range at sharp edges.

    Raises:
        ShapeError: The sizes differ.
    """
    height, width = flow.shape[:2]
    if image.shape[:2] != (height, width):
        raise ShapeError(f"image {image.shape[:2]} and flow {(height, width)} differ in size")
    x = flow[..., 0] + np.arange(width, dtype=np.float32)
    y = flow[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    return cv2.remap(image, x, y, cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REFLECT_101)


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


def chain(first: Flow, second: Flow) -> Flow:
    """Flow from A to C, of the flow from A to B and the flow from B to C, all ``[H, W, 2]``."""
    chained: Flow = first + _where_it_lands(first, second)
    return chained


def _where_it_lands(flow: Flow, values: Flow) -> Flow:
    """``values`` at the ends of ``flow``; beyond the edges those at the edge."""
    height, width = flow.shape[:2]
    x = flow[..., 0] + np.arange(width, dtype=np.float32)
    y = flow[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    landed = cv2.remap(values, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return landed.astype(np.float32, copy=False)


def visible(forward: Flow, backward: Flow) -> npt.NDArray[np.bool_]:
    """Where a forward flow and the backward flow it lands on cancel: no occlusion.

    Returns:
        ``[H, W]``: ``|f + b|^2 < 0.01 (|f|^2 + |b|^2) + 0.5``, and the target is in the frame.

    Source:
        Sundaram et al., "Dense point trajectories", ECCV 2010, equation 5.
    """
    landed = _where_it_lands(forward, backward)
    lengths = (forward**2).sum(-1) + (landed**2).sum(-1)
    cancels = ((forward + landed) ** 2).sum(-1) < 0.01 * lengths + 0.5
    height, width = forward.shape[:2]
    x = forward[..., 0] + np.arange(width, dtype=np.float32)
    y = forward[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    result: npt.NDArray[np.bool_] = cancels & inside
    return result


def motion_residual(frame: Frames, neighbour: Frames) -> npt.NDArray[np.float32]:
    """What motion does not explain: a frame minus its neighbour warped onto it.

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
