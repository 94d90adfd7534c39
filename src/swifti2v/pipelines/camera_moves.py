"""What a camera can do over a clip, and where it makes each point go."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swifti2v.pipelines.course import Course

SHIFT = 0.12
"""Way of a pan or tilt over a whole clip, in widths (heights) of the frame."""
ZOOM = 0.8
"""Size of what is seen at the end of a zoom in, relative to its start; a zoom out is the inverse."""
ROLL = 0.14
"""Radians of a roll over a whole clip."""
PARALLAX = (0.3, 1.3)
"""Of a dolly: how much of a zoom the farthest and the nearest things do."""
ORBIT = 0.24
"""How far the nearest and farthest things part in an orbit, in widths of the frame."""
SWAY = (0.008, 0.006)
"""Of a hand: deviation in widths (heights) of the frame, and in radians."""
SLOW, FAST = 0.5, 1.7
"""How much of the usual way a slow and a fast move go."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraMove:
    """What the camera does over a clip: 1 is the usual way, 2 twice as far, below 0 the other way."""

    pan: float = 0.0
    """To the right."""
    tilt: float = 0.0
    """Downwards."""
    zoom: float = 0.0
    """In."""
    roll: float = 0.0
    """Clockwise, so that what is seen turns counter-clockwise."""
    dolly: float = 0.0
    """Forwards: near things grow faster."""
    orbit: float = 0.0
    """To the right around the middle distance: near things go left, far ones right."""
    sway: float = 0.0
    """Of the hand that holds it."""

    def displace(
        self, course: Course, depth: Tensor, points: Tensor, size: tuple[float, float]
    ) -> Tensor:
        """Where each point of a frame was in the first frame, relative to where it is.

        Args:
            course: Of T frames.
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
    """Where points of a frame were in the first frame, each seen by a camera of its own.

    Args:
        ways: Pan, tilt, zoom, roll and sway as ``CameraMove`` counts them; each is a number, or
            numbers that broadcast to ``[..., T, h, w]``.
        course: Of T frames, of one clip or more.
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
"""What can be asked for by a name of its own."""
