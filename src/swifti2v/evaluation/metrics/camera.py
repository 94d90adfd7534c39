"""Direction of the camera's motion, measured by optical flow."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from swifti2v.errors import ShapeError
from swifti2v.evaluation.metrics.frames import FramePieces, iterate_frames, to_uint8
from swifti2v.media.flow import MIN_SIDE, optical_flow

CameraLabel: TypeAlias = Literal[
    "pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out", "roll left",
    "roll right", "static",
]  # fmt: skip

STATIC_SHIFT = 0.01
"""Pans below this part of the width, and tilts below this part of the height, are static."""
STATIC_ZOOM = 0.015
"""Changes of scale below this are static."""
STATIC_ROLL = 0.015
"""Rotations below this many radians are static."""
STEP = 4
"""Frames between two measurements: motion is then large against the flow's error."""
MEASURE_SIDE = 640
"""Flow is measured on frames brought towards this longer side."""
MAX_ENLARGEMENT = 2.0
"""Small frames are enlarged by this much at most: flow stops at half of their size."""
MIN_TEXTURE = 1e-4
"""Smallest eigenvalue of the gradients' covariance that gives reliable flow (range 1)."""
MIN_POINTS = 16
"""Fewer textured points than this say nothing about the camera."""
INLIER_PX = 1.0
"""A point follows the camera if its flow over one step is off by less than this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraMotion:
    """Motion of the scene as a whole from the first to the last frame."""

    moves: tuple[CameraLabel, ...]
    """Components beyond the limits of ``static``, the strongest first."""
    pan_px: float
    """Distance of the centre's content to the right; positive is ``pan left``."""
    tilt_px: float
    """Distance of the centre's content downwards; positive is ``tilt up``."""
    zoom: float
    """Growth of the content: 0.1 is 10 % larger (``zoom in``), negative is ``zoom out``."""
    roll_degrees: float
    """Rotation of the content, clockwise; positive is ``roll left``."""
    inliers: float
    """Part of the textured points that follow the camera, in [0, 1]; 0 without texture.

    Where it is low (strong parallax, a close or fast scene) the label is a guess.
    """

    @property
    def label(self) -> CameraLabel:
        """The strongest component, or ``static``."""
        return self.moves[0] if self.moves else "static"


def camera_direction(frames: FramePieces) -> CameraMotion:
    """Name the camera's motion over a clip.

    Flow is measured every four frames at textured points; a shift, a change of scale and a
    rotation about the centre are fitted robustly to it, so that a moving subject does not
    count, and composed over the clip. The label is the component that moves the frame's edge
    most, if it exceeds 1 % of the width (pan) or height (tilt), 1.5 % of scale (zoom) or 0.015
    radians (roll).

    Returns:
        The label and its measurements, in pixels of ``frames``. Content that moves right is
        ``pan left``, content that moves down is ``tilt up``, content that grows ``zoom in``, and
        content that turns clockwise ``roll left``.

    Raises:
        ShapeError: Fewer than two frames, or sides too small for flow.
    """
    factor, shift = 1 + 0j, 0j  # x -> factor * x + shift, complex pixels from the centre
    shares: list[float] = []
    scale = 1.0
    size = (0, 0)
    previous: npt.NDArray[np.uint8] | None = None
    for frame in _every_step(frames):
        size = frame.shape[:2]
        resized, scale = _resize(frame)
        if previous is not None:
            step_factor, step_shift, share = _fit_step(previous, resized)
            factor, shift = step_factor * factor, step_factor * shift + step_shift
            shares.append(share)
        previous = resized
    if not shares:
        raise ShapeError("camera motion needs at least two frames")
    pan, tilt, zoom = shift.real / scale, shift.imag / scale, abs(factor) - 1
    roll = float(np.angle(factor))
    return CameraMotion(
        moves=_moves(pan, tilt, zoom, roll, *size),
        pan_px=pan,
        tilt_px=tilt,
        zoom=zoom,
        roll_degrees=math.degrees(roll),
        inliers=float(np.mean(shares)),
    )


def _every_step(frames: FramePieces) -> Iterator[npt.NDArray[np.uint8]]:
    """Frames 0, STEP, 2 STEP, ... and the last one."""
    position, last = -1, None
    for position, last in enumerate(iterate_frames(frames)):
        if position % STEP == 0:
            yield to_uint8(last)
    if last is not None and position % STEP:
        yield to_uint8(last)


def _resize(frame: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], float]:
    """The frame at the size at which flow is measured, and its scale."""
    height, width = frame.shape[:2]
    scale = min(MAX_ENLARGEMENT, MEASURE_SIDE / max(height, width))
    scale = max(scale, MIN_SIDE / min(height, width))
    size = (round(width * scale), round(height * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(frame, size, interpolation=method).astype(np.uint8, copy=False), scale


def _fit_step(
    first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8]
) -> tuple[complex, complex, float]:
    """Similarity about the centre that most points follow, and the share that does."""
    grey = cv2.cvtColor(first, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    texture = cv2.cornerMinEigenVal(grey, 7)
    has_texture = texture > max(MIN_TEXTURE, float(np.median(texture)))
    if np.count_nonzero(has_texture) < MIN_POINTS:
        return 1 + 0j, 0j, 0.0
    height, width = grey.shape
    y, x = np.nonzero(has_texture)
    flow = optical_flow(first, second)[y, x]
    points = (x - (width - 1) / 2) + 1j * (y - (height - 1) / 2)
    growth, shift, residual = _fit_similarity(points, flow[:, 0] + 1j * flow[:, 1])
    return 1 + growth, shift, float(np.mean(residual < INLIER_PX))


def _fit_similarity(
    points: npt.NDArray[np.complex128], motion: npt.NDArray[np.complex128]
) -> tuple[complex, complex, npt.NDArray[np.float64]]:
    """Fit ``motion = growth * points + shift`` by iteratively reweighted least squares.

    Weights ``1 / residual`` minimise the sum of distances (a median, convex); weights
    ``1 / (1 + r^2)^2`` in units of the median residual (Geman-McClure) then drop outliers.
    """
    weights = np.ones(len(points))
    growth, shift = 0j, 0j
    residual = np.abs(motion)
    for iteration in range(30):
        total = weights.sum()
        mean_point = (weights * points).sum() / total
        mean_motion = (weights * motion).sum() / total
        centred = points - mean_point
        spread = (weights * np.abs(centred) ** 2).sum()
        growth = complex((weights * np.conj(centred) * (motion - mean_motion)).sum() / spread)
        shift = complex(mean_motion - growth * mean_point)
        residual = np.abs(motion - growth * points - shift)
        if iteration < 15:
            weights = 1 / np.maximum(residual, 1e-2)
        else:
            scale = max(1.5 * float(np.median(residual)), 0.05)  # at least the flow's own noise
            weights = 1 / (1 + (residual / scale) ** 2) ** 2
    return growth, shift, residual


def _moves(
    pan: float, tilt: float, zoom: float, roll: float, height: int, width: int
) -> tuple[CameraLabel, ...]:
    """Components by how far they move the frame's edge."""
    edge: dict[CameraLabel, float] = {}
    if abs(pan) >= STATIC_SHIFT * width:
        edge["pan left" if pan > 0 else "pan right"] = abs(pan)
    if abs(tilt) >= STATIC_SHIFT * height:
        edge["tilt up" if tilt > 0 else "tilt down"] = abs(tilt)
    if abs(zoom) >= STATIC_ZOOM:
        edge["zoom in" if zoom > 0 else "zoom out"] = abs(zoom) * width / 2
    if abs(roll) >= STATIC_ROLL:
        edge["roll left" if roll > 0 else "roll right"] = abs(roll) * width / 2
    return tuple(sorted(edge, key=lambda label: -edge[label]))
