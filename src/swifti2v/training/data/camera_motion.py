"""A camera that moves over pictures with near and far things."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from swifti2v.media import Frames
from swifti2v.pipelines.camera_moves import CameraMove
from swifti2v.pipelines.course import Course

NEAR = 0.95
"""Depth of what stands in front."""
RAMP = (0.15, 0.65)
"""Depth of the rest, at the upper and the lower edge of the frame; 0 is the farthest."""
VIEW_SIDES = (0.5, 0.9)
"""Least and greatest side of the first view, as a part of the picture's."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture, and what of it stands in front of the rest."""

    picture: Frames
    """``[H, W, 3]`` uint8."""
    front: NDArray[np.float32] | None
    """``[H, W]`` in [0, 1]: 1 where something stands in front; None where nothing does."""
    behind: Frames | None
    """The picture without it, as well as can be guessed."""


def split_scene(picture: Frames) -> Scene:
    """Find the thing in front by its colours: the middle of the picture against its edges.

    A region that reaches the edges of the middle counts as background.

    Source:
        GrabCut (Rother et al., SIGGRAPH 2004), in OpenCV.
    """
    height, width = picture.shape[:2]
    side = _SPLIT_SIDE / max(height, width)
    size = (round(width * side), round(height * side))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    columns, rows = size
    left, top, wide, high = columns // 8, rows // 8, columns * 3 // 4, rows * 5 // 6
    mask = np.zeros((rows, columns), np.uint8)
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(small, mask, (left, top, wide, high), *models, 4, cv2.GC_INIT_WITH_RECT)
    found = np.isin(mask, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    opened = cv2.morphologyEx(found, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
    front = cv2.morphologyEx(opened, cv2.MORPH_CLOSE, np.ones((7, 7), np.uint8))
    edges = [front[top : top + high, left : left + 3], front[top : top + 3, left : left + wide],
             front[top : top + high, left + wide - 3 : left + wide]]  # fmt: skip
    if not 0.03 < front.mean() < 0.4 or max(float(edge.mean()) for edge in edges) > 0.1:
        return Scene(picture, None, None)
    whole = cv2.resize(front, (width, height)).astype(np.uint8)
    return place_in_front(picture, picture, whole)


def make_scenes(pictures: Sequence[Frames], size: tuple[int, int]) -> tuple[Scene, ...]:
    """Pictures as scenes, made smaller where they have more than twice the pixels of the frames."""
    scenes = []
    for picture in pictures:
        fit = min(whole / shown for whole, shown in zip(picture.shape[:2], size, strict=True))
        if fit > _ROOM:
            small = (round(picture.shape[1] * _ROOM / fit), round(picture.shape[0] * _ROOM / fit))
            picture = np.asarray(cv2.resize(picture, small, interpolation=cv2.INTER_AREA), np.uint8)
        scenes.append(split_scene(picture))
    return tuple(scenes)


_ROOM = 2.2  # of a scene's picture, in sides of the frame


def draw_thing(picture: Frames, other: Frames, rng: np.random.Generator) -> Scene:
    """A picture with a smooth shape in front of it that shows a part of another one."""
    height, width = picture.shape[:2]
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    waves = sum(
        rng.normal() / k * np.cos(k * turn + rng.uniform(0, 2 * np.pi)) for k in range(2, 6)
    )
    radius = min(height, width) * rng.uniform(0.12, 0.3) * np.exp(0.35 * waves)
    stretch = np.exp(rng.uniform(-0.5, 0.5))
    middle = rng.uniform((0.2, 0.35), (0.8, 0.85)) * (width, height)
    outline = middle + np.stack([radius * np.cos(turn) * stretch, radius * np.sin(turn)], axis=1)
    front = np.zeros((height, width), np.uint8)
    cv2.fillPoly(front, [outline.astype(np.int32)], 1)
    shown = cv2.resize(other, (width, height), interpolation=cv2.INTER_AREA)
    return place_in_front(np.where(front[..., None] > 0, shown, picture), picture, front)


def place_in_front(picture: Frames, behind: Frames, front: NDArray[np.uint8]) -> Scene:
    """A scene of a picture, its mask and the background, whose hidden part continues the edges.

    The mask is 1 where the thing in front is; ``behind`` may be the same picture.

    Source:
        Telea's inpainting (2004), in OpenCV.
    """
    height, width = front.shape
    if behind is picture:
        side = _SPLIT_SIDE / max(height, width)
        size = (round(width * side), round(height * side))
        wide = cv2.dilate(cv2.resize(front, size), np.ones((7, 7), np.uint8))
        small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        filled = cv2.resize(cv2.inpaint(small, wide, 5, cv2.INPAINT_TELEA), (width, height))
        hidden = cv2.resize(wide, (width, height), interpolation=cv2.INTER_NEAREST)[..., None]
        behind = np.where(hidden > 0, filled, picture)
    soft = cv2.GaussianBlur(front.astype(np.float32), (0, 0), 1.0)
    return Scene(picture, soft.astype(np.float32), behind)


_SPLIT_SIDE = 320  # things are told apart at this longer side


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """Part of a picture that the first frame shows."""

    center: tuple[float, float]
    """Column and row of the picture at the frame's centre, in picture pixels."""
    scale: float
    """Picture pixels a frame pixel."""
    is_mirrored: bool = False
    """Whether left and right are exchanged."""


def draw_view(
    picture_size: tuple[int, int], frame_size: tuple[int, int], rng: np.random.Generator
) -> View:
    """A random first view."""
    fit = min(whole / shown for whole, shown in zip(picture_size, frame_size, strict=True))
    scale = float(rng.uniform(*VIEW_SIDES)) * fit
    rooms = [whole - scale * shown for whole, shown in zip(picture_size, frame_size, strict=True)]
    row, column = (
        float(rng.uniform(-room, room)) / 2 + whole / 2
        for room, whole in zip(rooms, picture_size, strict=True)
    )
    return View(center=(column, row), scale=scale, is_mirrored=bool(rng.random() < 0.5))


def render_move(
    scene: Scene,
    view: View,
    move: CameraMove,
    course: Course,
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Show a picture through a moving camera; beyond its edges it is mirrored.

    ``size`` is that of whole frames. A ``crop`` is top, left, height and width of the part that is
    shown.

    Returns:
        ``[3, T, h, w]`` float32 in [-1, 1], and the displacement ``[2, T, h, w]``: where each point
        was in the first frame, columns and rows in frame pixels relative to where it is.
    """
    top, left, height, width = crop or (0, 0, *size)
    samples = 2 if view.scale > _SUPERSAMPLED else 1
    row = top + (torch.arange(height * samples) + 0.5) / samples - size[0] / 2
    column = left + (torch.arange(width * samples) + 0.5) / samples - size[1] / 2
    points = torch.stack(torch.meshgrid(column, row, indexing="xy"), dim=-1)
    ramp = RAMP[0] + (RAMP[1] - RAMP[0]) * (points[..., 1] / size[0] + 0.5)
    way = move.displace(course, ramp, points, size)
    if scene.front is None or scene.behind is None or move.dolly == move.orbit == 0:
        video = _look(scene.picture, view, points + way)
    else:
        nearer = move.displace(course, torch.tensor(NEAR), points, size)
        front = _look(scene.front[..., None], view, points + nearer)
        video = front * _look(scene.picture, view, points + nearer)
        video += (1 - front) * _look(scene.behind, view, points + way)
        way = torch.where(front[:, 0, ..., None] > 0.5, nearer, way)
    video = F.avg_pool2d(video, samples).clamp(0, 255) / 127.5 - 1
    displacement = F.avg_pool2d(way.permute(0, 3, 1, 2), samples)
    return video.transpose(0, 1), displacement.transpose(0, 1)


_SUPERSAMPLED = 1.2  # from this many picture pixels a frame pixel on, four samples are averaged


def _look(picture: NDArray[Any], view: View, points: Tensor) -> Tensor:
    """Colours ``[T, C, h, w]`` of a picture ``[H, W, C]`` at ``[T, h, w, 2]`` frame pixels."""
    sign = torch.tensor([-1.0 if view.is_mirrored else 1.0, 1.0])
    places = torch.tensor(view.center) + view.scale * sign * points  # picture pixels
    whole = torch.tensor(picture.shape[1::-1])
    places = whole - (places.remainder(2 * whole) - whole).abs()  # mirrored into the picture
    starts = (places.amin(dim=(0, 1, 2)) - 3).clamp(min=0).int().tolist()
    stops = (places.amax(dim=(0, 1, 2)) + 4).int().tolist()
    part = np.ascontiguousarray(picture[starts[1] : stops[1], starts[0] : stops[0]])
    shown = torch.tensor(part).permute(2, 0, 1).float()
    sides = torch.tensor([shown.shape[2], shown.shape[1]])
    return F.grid_sample(
        shown.expand(len(places), -1, -1, -1),
        (places - torch.tensor(starts)) / sides * 2 - 1,
        mode="bilinear" if view.scale > _SUPERSAMPLED else "bicubic",
        padding_mode="reflection",
        align_corners=False,
    )
