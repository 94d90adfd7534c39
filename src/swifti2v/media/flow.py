"""Dense optical flow between two frames, and looking up values along it."""

from typing import Any, Literal, NamedTuple, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from swifti2v.errors import ShapeError
from swifti2v.media.resize import Frames

Flow: TypeAlias = npt.NDArray[np.float32]
"""``[H, W, 2]``: displacement to the right and down, in pixels."""
Image: TypeAlias = npt.NDArray[Any]
Plane: TypeAlias = npt.NDArray[np.float32]

MIN_SIDE = 16
"""DIS needs a pyramid level that holds its 8-pixel patches with room to move."""
Preset: TypeAlias = Literal["fast", "medium", "fine"]


SHIFT_SIDE = 160
"""Longer side of the frames that ``find_shift`` compares."""
LEAST_CORRELATION = 0.6
"""Correlation of the place that it takes."""
CORRELATION_GAIN = 0.1
"""Least gain of that correlation over the correlation at rest."""


class Search(NamedTuple):
    """Settings of a search for optical flow."""

    preset: int
    """OpenCV's preset."""
    finest_scale: int
    """Number of times the frames are halved for the finest level of the search."""
    smoothness: float
    """Weight of smooth flow in the refinement (OpenCV's alpha)."""


PRESETS: dict[Preset, Search] = {
    "fast": Search(cv2.DISOPTICAL_FLOW_PRESET_FAST, 2, 20.0),
    "medium": Search(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM, 1, 20.0),
    "fine": Search(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM, 0, 40.0),
}


def optical_flow(
    first: Frames,
    second: Frames,
    preset: Preset = "medium",
    start: Flow | None = None,
) -> Flow:
    """Dense inverse-search flow from one frame to another.

    Args:
        first: ``[H, W, 3]`` uint8; sides of at least 16 pixels.
        second: The same size.
        preset: ``fast`` finds flow at a quarter of the size, ``medium`` at half and
            about five times slower, ``fine`` at the full size and smoother.
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
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    guess = np.zeros((*grey[0].shape, 2), np.float32) if start is None else start.copy()
    how = PRESETS[preset]
    search = cv2.DISOpticalFlow.create(how.preset)
    search.setFinestScale(how.finest_scale)
    search.setVariationalRefinementAlpha(how.smoothness)
    flow = search.calc(grey[0], grey[1], guess)
    return flow.astype(np.float32, copy=False)


def find_shift(first: Frames, second: Frames) -> tuple[float, float]:
    """Find the middle of a frame in another one: a start for ``optical_flow``.

    From rest that finds motion of up to a fifth of the frame; this reaches a third of it.

    Args:
        first: ``[H, W, 3]`` uint8; its middle ninth is looked for.
        second: The same size.

    Returns:
        Right and down in pixels, as a flow; (0, 0) where no place is clearly better than rest.
    """
    height, width = first.shape[:2]
    scale = min(1.0, SHIFT_SIDE / max(height, width))
    size = max(3, round(width * scale)), max(3, round(height * scale))
    a, b = (
        cv2.cvtColor(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
        for frame in (first, second)
    )
    left, top = size[0] // 3, size[1] // 3
    middle = a[top : 2 * top, left : 2 * left]
    scores = cv2.matchTemplate(b, middle, cv2.TM_CCOEFF_NORMED)
    _, best, _, (x, y) = cv2.minMaxLoc(scores)
    if best < LEAST_CORRELATION or best < scores[top, left] + CORRELATION_GAIN:
        return 0.0, 0.0
    return (x - left) / scale, (y - top) / scale


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


NUM_FITS = 2
"""Steps of ``fit_flow``."""
FIT_SIGMA = 2.0
"""Gaussian window in which points of the small frame move alike, in its pixels."""
FIT_STIFFNESS = 60.0
"""Squared slope, in grey levels a pixel, below which little is moved: rounding hides it."""
FIT_OUTLIER = 14.0
"""Grey levels between the frames at which a place counts 1/e."""
FIT_LIMIT = 0.5
"""Most that a step moves a point, in pixels of the small frame."""


def fit_flow(small: Plane, large: Plane, flow: Flow) -> Flow:
    """Refine the flow from a small frame to a large picture, of which the small one is the mean.

    Flow between two small frames errs where fine detail has become false coarse detail. Here the
    large picture is moved first and made small afterwards, and each point moved to where that looks
    like the small frame; a difference in brightness alone moves nothing.

    Args:
        small: ``[h, w]`` float32 grey levels.
        large: ``[H, W]`` float32, the same view a few times larger.
        flow: ``[a, b, 2]`` on any grid over the frame, right and down in pixels of ``small``.

    Returns:
        The flow on the same grid.

    Source:
        Lucas and Kanade, "An iterative image registration technique with an application to stereo
        vision", IJCAI 1981.
    """
    (height, width), (large_height, large_width) = small.shape, large.shape
    scale = np.array((large_width / width, large_height / height), np.float32)
    coarse = _resize(flow, width, height)
    change: Flow = np.zeros_like(coarse)
    for _ in range(NUM_FITS):
        way = cv2.resize(coarse + change, (large_width, large_height)) * scale
        x = way[..., 0] + np.arange(large_width, dtype=np.float32)
        y = way[..., 1] + np.arange(large_height, dtype=np.float32)[:, None]
        moved = cv2.remap(large, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
        right, down = (
            cv2.Sobel(moved, cv2.CV_32F, *axis, ksize=1) / 2 for axis in ((1, 0), (0, 1))
        )
        planes = np.dstack((moved, right * scale[0], down * scale[1]))
        low, right_slope, down_slope = np.moveaxis(_resize(planes, width, height), -1, 0)
        change = change + _match(small - low, right_slope, down_slope)
    wide = cv2.resize(change, (flow.shape[1], flow.shape[0]), interpolation=cv2.INTER_CUBIC)
    refined: Flow = flow + wide.astype(np.float32, copy=False)
    return refined


def _resize(planes: Flow, width: int, height: int) -> Flow:
    resized = cv2.resize(planes, (width, height), interpolation=cv2.INTER_AREA)
    return resized.astype(np.float32, copy=False)


def _match(difference: Plane, right: Plane, down: Plane) -> Flow:
    """The step ``[h, w, 2]`` by which a frame of these slopes comes closest to one that differs so."""
    distance = cv2.GaussianBlur(np.abs(difference), (0, 0), 0.75)
    weight = np.exp(-((distance / FIT_OUTLIER) ** 2))

    def mean(values: Plane) -> Plane:
        blurred: Plane = cv2.GaussianBlur(weight * values, (0, 0), FIT_SIGMA)
        return blurred

    planes = (right, down, difference)
    total = mean(np.ones_like(weight)) + np.float32(1e-6)
    means = [mean(plane) for plane in planes]

    def covary(a: int, b: int) -> Plane:
        return mean(planes[a] * planes[b]) - means[a] * means[b] / total

    xx, xy, yy = covary(0, 0) + FIT_STIFFNESS, covary(0, 1), covary(1, 1) + FIT_STIFFNESS
    x, y = covary(0, 2), covary(1, 2)
    step = np.dstack((yy * x - xy * y, xx * y - xy * x)) / (xx * yy - xy * xy)[..., None]
    limited: Flow = np.clip(step, -FIT_LIMIT, FIT_LIMIT)
    return limited


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


def cycle_error(forward: Flow, backward: Flow) -> npt.NDArray[np.float32]:
    """Squared distance in pixels, ``[H, W]``, between a pixel and where both flows take it."""
    landed = _where_it_lands(forward, backward)
    error: npt.NDArray[np.float32] = ((forward + landed) ** 2).sum(-1)
    return error


def visible(forward: Flow, backward: Flow) -> npt.NDArray[np.bool_]:
    """Mask of points whose forward flow the backward flow cancels: they are not occluded.

    Returns:
        ``[H, W]``: ``|f + b|^2 < 0.01 (|f|^2 + |b|^2) + 0.5``, and the target is in the frame.

    Source:
        Sundaram et al., "Dense point trajectories", ECCV 2010, equation 5.
    """
    landed = _where_it_lands(forward, backward)
    lengths = (forward**2).sum(-1) + (landed**2).sum(-1)
    cancels = cycle_error(forward, backward) < 0.01 * lengths + 0.5
    height, width = forward.shape[:2]
    x = forward[..., 0] + np.arange(width, dtype=np.float32)
    y = forward[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    result: npt.NDArray[np.bool_] = cancels & inside
    return result
