"""Procedural camera moves over a still picture, and sentences that ask for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from swifti2v.errors import ShapeError

CameraMotion = Literal[
    "pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out", "static"
]
"""What the camera does; what is seen moves the other way."""
CAMERA_MOTIONS: tuple[CameraMotion, ...] = get_args(CameraMotion)

SHIFT = 0.12
"""Way of a pan or tilt over a whole clip, in widths (heights) of the view."""
ZOOM = 0.8
"""Size of the view at the end of a zoom in, relative to its start; a zoom out is the inverse."""
VIEW_SIZES = (0.55, 0.75)
"""Least and greatest side of the first view, as a part of the picture's."""
MARGIN = 1.3
"""Room around the first view, relative to its size, that its centre leaves to the picture's edge."""

PHRASES: dict[CameraMotion, tuple[str, ...]] = {
    "pan left": (
        "pan left", "camera pans left", "the camera pans to the left", "panning left",
        "slow pan left", "the camera moves left", "pan to the left", "camera turns left",
    ),
    "pan right": (
        "pan right", "camera pans right", "the camera pans to the right", "panning right",
        "slow pan right", "the camera moves right", "pan to the right", "camera turns right",
    ),
    "tilt up": (
        "tilt up", "camera tilts up", "the camera tilts upward", "tilting up", "slow tilt up",
        "the camera looks up", "tilt upwards", "camera moves up",
    ),
    "tilt down": (
        "tilt down", "camera tilts down", "the camera tilts downward", "tilting down",
        "slow tilt down", "the camera looks down", "tilt downwards", "camera moves down",
    ),
    "zoom in": (
        "zoom in", "camera zooms in", "the camera zooms in slowly", "zooming in", "slow zoom in",
        "the camera pushes in", "zoom into the scene", "move closer",
    ),
    "zoom out": (
        "zoom out", "camera zooms out", "the camera zooms out slowly", "zooming out",
        "slow zoom out", "the camera pulls back", "zoom out of the scene", "move away",
    ),
    "static": (
        "static", "static camera", "the camera does not move", "a still shot", "locked camera",
        "fixed camera", "static shot", "no camera movement",
    ),
}  # fmt: skip
"""Ways to ask for each motion."""
# What else a prompt may say; none of it tells the motion, some of it holds the same words.
_ADJECTIVES = (
    "a red", "a blue", "an old", "a young", "the big", "a small", "a quiet", "a busy",
    "the bright", "the dark", "a green", "a golden",
)  # fmt: skip
_NOUNS = (
    "house", "street", "cat", "dog", "woman", "man", "city", "river", "mountain", "forest", "car",
    "table", "room", "garden", "sea", "beach", "market", "bridge", "tower", "flower", "snake",
    "train", "boat", "sky", "field", "child", "bird", "horse", "kitchen", "shop",
)  # fmt: skip
_CIRCUMSTANCES = (
    "at sunset", "in the rain", "in the morning", "on a hill", "near the water", "with clouds",
    "under the trees", "in winter", "by the window", "at night", "in sunlight", "on the left",
    "on the right", "up in the air", "down the road",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """Part of a picture that the camera sees at the start; the picture spans -1 to 1."""

    size: float
    """Side of the view as a part of the picture's."""
    center: tuple[float, float]
    """Column and row."""


def draw_view(rng: np.random.Generator) -> View:
    """A random first view with room around it for any motion."""
    size = float(rng.uniform(*VIEW_SIZES))
    reach = 1 - MARGIN * size
    column, row = rng.uniform(-reach, reach, size=2)
    return View(size=size, center=(float(column), float(row)))


def render_motion(
    image: Tensor, motion: CameraMotion, times: Sequence[float], view: View, size: tuple[int, int]
) -> Tensor:
    """Show a still picture through a moving camera.

    Args:
        image: ``[3, H, W]`` floating point. Beyond its edges it is mirrored.
        motion: What the camera does.
        times: T places in the clip, 0 for its first and 1 for its last frame.
        view: What is seen at time 0.
        size: Height and width of the frames in pixels.

    Returns:
        ``[3, T, height, width]`` on the device of ``image``; each pixel is the mean of 2x2
        bilinear samples.

    Raises:
        ShapeError: ``image`` is not as stated.
    """
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise ShapeError(
            f"an image must be floats [3, H, W], not {image.dtype} {list(image.shape)}"
        )
    time = torch.tensor(list(times), dtype=image.dtype, device=image.device)  # [T]
    still = torch.zeros_like(time)
    columns = {"pan left": -SHIFT * time, "pan right": SHIFT * time}.get(motion, still)
    rows = {"tilt up": -SHIFT * time, "tilt down": SHIFT * time}.get(motion, still)
    scale = {"zoom in": ZOOM**time, "zoom out": (1 / ZOOM) ** time}.get(motion, still + 1)
    affine = torch.zeros(len(time), 2, 3, dtype=image.dtype, device=image.device)
    affine[:, 0, 0] = affine[:, 1, 1] = view.size * scale
    affine[:, 0, 2] = view.center[0] + 2 * view.size * columns  # a view is 2 * size wide
    affine[:, 1, 2] = view.center[1] + 2 * view.size * rows
    height, width = size
    grid = F.affine_grid(affine, [len(time), 3, 2 * height, 2 * width], align_corners=False)
    frames = F.grid_sample(
        image.expand(len(time), -1, -1, -1), grid, padding_mode="reflection", align_corners=False
    )
    return F.avg_pool2d(frames, 2).transpose(0, 1)


def known_phrases() -> dict[str, list[str]]:
    """What asks for each motion: the phrases that are learned, and such as ``pans left``."""
    return {
        motion: list(dict.fromkeys((*phrases, motion.replace(" ", "s ", 1))))
        for motion, phrases in PHRASES.items()
    }


def draw_prompt(motion: CameraMotion, rng: np.random.Generator) -> str:
    """A random sentence that asks for a motion, alone or beside a description of the scene."""
    phrase = _choose(PHRASES[motion], rng)
    scene = f"{_choose(_ADJECTIVES, rng)} {_choose(_NOUNS, rng)}"
    if rng.random() < 0.5:
        scene += f" {_choose(_CIRCUMSTANCES, rng)}"
    order = rng.random()
    prompt = phrase
    if order >= 0.35:
        prompt = f"{scene}, {phrase}" if order < 0.7 else f"{phrase}, {scene}"
    if rng.random() < 0.4:
        prompt = prompt.capitalize()
    return f"{prompt}." if rng.random() < 0.3 else prompt


def _choose(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
