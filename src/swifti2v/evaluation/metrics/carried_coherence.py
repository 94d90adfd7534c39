"""Is the photo's fine detail still there when the camera has moved?"""

from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from swifti2v.errors import ShapeError
from swifti2v.evaluation.metrics.detail_coherence import FLAT_AMPLITUDE
from swifti2v.evaluation.metrics.flow import shrink
from swifti2v.evaluation.metrics.frames import (
    FramePieces,
    Frames,
    iterate_frames,
    luma,
    to_uint8,
    to_unit_range,
)
from swifti2v.media.flow import optical_flow

Image: TypeAlias = npt.NDArray[Any]
Plane: TypeAlias = npt.NDArray[np.float32]

NUM_FEATURES = 2000
"""SIFT points of a frame at most."""
MATCH_RATIO = 0.8
"""A match is taken if the second best is this much farther away (Lowe)."""
MIN_INLIERS = 12
"""Matches that have to agree on a homography."""
REPROJECTION_PX = 3.0
"""Distance within which they agree, at the size of ``shrink``."""
MAX_SHIFT = 0.03
"""Longest local shift, in parts of the longer side."""
MARGIN = 8
"""Pixels along all edges that do not count."""
LEAST_IN_VIEW = 0.05
"""Part of the frame that has to show the photo."""


def carried_coherence(
    frames: FramePieces, photo: Frames, cutoff: float = 0.12, step: int = 4
) -> Tensor:
    """Normalised correlation of frames with the photo moved onto them, in luma above ``cutoff``.

    The photo is moved by the homography that most SIFT matches agree on, then by what small local
    shifts optical flow finds beyond it. Only what the photo shows counts.

    Args:
        frames: ``[T, H, W, 3]`` uint8 or float in [0, 1], or its pieces in temporal order; one
            frame is in memory at a time.
        photo: ``[H, W, 3]``, frame 0 in full.
        cutoff: Lowest frequency that counts, cycles per pixel, radial.
        step: Every so many frames are measured, from frame ``step`` on.

    Returns:
        ``[T]`` float64 in [-1, 1]: 1 for the photo's own detail up to contrast (how much of it there
        is says ``hf_energy_ratio``), 0 for other detail, and where the photo is not found again. NaN for frames that are not measured, where hardly
        anything of the photo is in view, and where the photo has no detail.

    Raises:
        ShapeError: A frame has another size than the photo, or no frame was given.
    """
    still = luma(to_unit_range(photo)).numpy()
    finder = _Finder(photo)
    scores = []
    for index, frame in enumerate(iterate_frames(frames)):
        if frame.shape != photo.shape:
            raise ShapeError(
                f"a frame is {tuple(frame.shape)}, the photo {tuple(photo.shape)}; "
                "resize the photo first"
            )
        is_measured = index > 0 and index % step == 0
        scores.append(_coherence(frame, still, finder, cutoff) if is_measured else np.nan)
    if not scores:
        raise ShapeError("the clip holds no frame: give at least one")
    return torch.tensor(scores, dtype=torch.float64)


class _Finder:
    """Finds where the pixels of a frame are in the photo."""

    def __init__(self, photo: Frames) -> None:
        self.photo = shrink(photo)
        self._sift = cv2.SIFT.create(NUM_FEATURES)
        self._points, self._features = self._describe(self.photo)

    def __call__(self, frame: Frames) -> npt.NDArray[np.float32] | None:
        """``[H, W, 2]`` places in the photo, in pixels; None where it is not found."""
        small = shrink(frame)
        homography = self._find_homography(small)
        if homography is None:
            return None
        height, width = small.shape[:2]
        linear = _places(height, width) @ homography[:2, :2].T + homography[:2, 2]
        depth = _places(height, width) @ homography[2, :2] + homography[2, 2]
        places: Plane = (linear / depth[..., None]).astype(np.float32)
        moved = _look_up(self.photo, places, cv2.INTER_CUBIC).astype(np.uint8, copy=False)
        shift = optical_flow(small, moved)
        length = np.linalg.norm(shift, axis=-1, keepdims=True)
        limit = MAX_SHIFT * max(height, width)
        shift = shift * np.minimum(1, limit / np.maximum(length, limit / 2))
        places = _look_up(places, _places(height, width) + shift, cv2.INTER_LINEAR)
        return _enlarge_places(places, *frame.shape[:2])

    def _describe(self, image: npt.NDArray[np.uint8]) -> tuple[Any, Any]:
        points, features = self._sift.detectAndCompute(
            cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None
        )
        return np.array([point.pt for point in points], np.float32), features

    def _find_homography(self, small: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64] | None:
        """Find the homography from the small frame to the small photo."""
        points, features = self._describe(small)
        if min(len(points), len(self._points)) < MIN_INLIERS:
            return None
        pairs = cv2.BFMatcher().knnMatch(features, self._features, k=2)
        good = [best for best, second in pairs if best.distance < MATCH_RATIO * second.distance]
        if len(good) < MIN_INLIERS:
            return None
        here = points[[match.queryIdx for match in good]]
        there = self._points[[match.trainIdx for match in good]]
        homography, agree = cv2.findHomography(here, there, cv2.RANSAC, REPROJECTION_PX)
        if homography is None or agree.sum() < MIN_INLIERS:
            return None
        return np.asarray(homography, np.float64)


def _places(height: int, width: int) -> Plane:
    """``[H, W, 2]``: every pixel's own place."""
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)


def _look_up(image: Image, places: Plane, how: int) -> Plane:
    """An image at places in it, mirrored at the edges."""
    x, y = (np.ascontiguousarray(places[..., axis], np.float32) for axis in (0, 1))
    values: Plane = np.asarray(cv2.remap(image, x, y, how, borderMode=cv2.BORDER_REFLECT))
    return values


def _enlarge_places(places: Plane, height: int, width: int) -> Plane:
    """Places in a small frame for every pixel of a large one, in pixels of the large photo."""
    scale = np.array([width / places.shape[1], height / places.shape[0]], np.float32)
    enlarged = cv2.resize(places, (width, height), interpolation=cv2.INTER_LINEAR)
    result: Plane = (enlarged + 0.5) * scale - 0.5
    return result


def _coherence(frame: Frames, still: Plane, finder: _Finder, cutoff: float) -> float:
    places = finder(frame)
    if places is None:
        return 0.0
    height, width = still.shape
    moved = _look_up(still, places, cv2.INTER_LANCZOS4)
    inner = np.zeros((height, width), np.uint8)
    inner[MARGIN:-MARGIN, MARGIN:-MARGIN] = 1
    last = np.array([width - 1, height - 1])
    shown = np.asarray(((places >= 0) & (places <= last)).all(axis=-1), np.uint8)
    square = np.ones((2 * MARGIN + 1, 2 * MARGIN + 1), np.uint8)
    mask = (np.asarray(cv2.erode(shown, square)) * inner).astype(bool)
    if mask.mean() < LEAST_IN_VIEW:
        return float("nan")
    a, b = (
        _high_pass(plane, cutoff)[mask].astype(np.float64)
        for plane in (luma(to_unit_range(to_uint8(frame))).numpy(), moved)
    )
    flat = FLAT_AMPLITUDE**2 * a.size
    if (b**2).sum() <= flat:
        return float("nan")
    if (a**2).sum() <= flat:
        return 0.0
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))


def _high_pass(plane: Plane, cutoff: float) -> Plane:
    """Part of a plane above a radial frequency."""
    height, width = plane.shape
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum = np.where(radius > cutoff, np.fft.rfft2(plane), 0)
    return np.fft.irfft2(spectrum, s=plane.shape).astype(np.float32)
