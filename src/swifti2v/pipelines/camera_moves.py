"""Moves of a camera over a clip, and the way of each point in them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swifti2v.pipelines.course import Course

SHIFT = 0.12
"""Distance of a pan or tilt over a whole clip, in widths (heights) of the frame."""
ZOOM = 0.8
"""Size of the visible part at the end of a zoom in, relative to its start; a zoom out is the
inverse."""
ROLL = 0.14
"""Radians of a roll over a whole clip."""
PARALLAX = (0.3, 1.3)
"""Share of a zoom that the farthest and the nearest things make in a dolly."""
ORBIT = 0.24
"""Distance between the ways of the nearest and farthest things in an orbit, in widths of the
frame."""
SWAY = (0.008, 0.006)
"""Deviation of a hand-held camera in widths (heights) of the frame, and in radians."""
SLOW, FAST = 0.5, 1.7
"""Shares of the usual distance in a slow and in a fast move."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraMove:
    """Motion of the camera over a clip; 2 is twice the usual distance, -1 the opposite way."""

    pan: float = 0.0
    """Distance to the right."""
    tilt: float = 0.0
    """Distance downwards."""
    zoom: float = 0.0
    """Zoom in."""
    roll: float = 0.0
    """Clockwise roll, so that the picture turns counter-clockwise."""
    dolly: float = 0.0
    """Distance forwards: near things grow faster."""
    orbit: float = 0.0
    """Orbit to the right around the middle distance: near things go left, far ones right."""
    sway: float = 0.0
    """Sway of the hand that holds the camera."""

    def displace(
        self, course: Course, depth: Tensor, points: Tensor, size: tuple[float, float]
    ) -> Tensor:
        """Place of each point of a frame in the first frame, relative to its own place.

        Args:
            course: Course of T frames.
            depth: ``[h, w]`` of the points, 0 far to 1 near, or a number for all.
            points: ``[h, w, 2]`` columns and rows in pixels from the frame's centre.
            size: Height and width of the frame in pixels.

        Returns:
            ``[T, h, w, 2]`` columns and rows in pixels.
        """
        far, near = PARALLAX
        zoom = self.zoom + self.dolly * (far + (near - far) * depth)
        pan = self.pan + self.orbit * ORBIT / SHIFT * (depth - 0.5)
        return move_points((pan, self.tilt, zoom, self.roll, self.sway), course, points, size)


def move_points(
    ways: Sequence[float | Tensor], course: Course, points: Tensor, size: tuple[float, float]
) -> Tensor:
    """Places of a frame's points in the first frame, each point seen by its own camera.

    Args:
        ways: Pan, tilt, zoom, roll and sway as ``CameraMove`` counts them; each is a number, or
            numbers that broadcast to ``[..., T, h, w]``.
        course: Course of T frames, of one clip or more.
        points: ``[h, w, 2]`` columns and rows in pixels from the frame's centre.
        size: Height and width of the frame in pixels.

    Returns:
        ``[..., T, h, w, 2]`` columns and rows in pixels, relative to where the points are.
    """
    pan, tilt, zoom, roll, sway = ways
    height, width = size
    clock = course.clock[..., None, None]
    swaying = [sway * way[..., None, None] for way in course.sway.unbind(-1)]
    scale = ZOOM ** (zoom * clock)
    angle = ROLL * roll * clock + SWAY[1] * swaying[2]
    right = SHIFT * pan * clock + SWAY[0] * swaying[0]
    down = SHIFT * tilt * clock + SWAY[0] * swaying[1]
    x, y = points.unbind(-1)
    sine, cosine = torch.sin(angle), torch.cos(angle)
    column = scale * (cosine * x - sine * y) + width * right - x
    row = scale * (sine * x + cosine * y) + height * down - y
    return torch.stack([column, row], dim=-1)


MOVES: dict[str, CameraMove] = {
    "pan left": CameraMove(pan=-1),
    "pan right": CameraMove(pan=1),
    "tilt up": CameraMove(tilt=-1),
    "tilt down": CameraMove(tilt=1),
    "zoom in": CameraMove(zoom=1),
    "zoom out": CameraMove(zoom=-1),
    "roll left": CameraMove(roll=-1),
    "roll right": CameraMove(roll=1),
    "dolly in": CameraMove(dolly=1),
    "dolly out": CameraMove(dolly=-1),
    "orbit left": CameraMove(orbit=-1),
    "orbit right": CameraMove(orbit=1),
    "handheld": CameraMove(sway=1),
    "static": CameraMove(),
}
"""Moves that a prompt can name."""
