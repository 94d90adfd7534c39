"""Do colours and contrast wander away from the photo?"""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from swifti2v.errors import ShapeError
from swifti2v.evaluation.metrics.flow import shrink
from swifti2v.evaluation.metrics.frames import FramePieces, Frames, iterate_frames

FLAT_LIGHTNESS = 0.1
"""A spread of lightness (0 to 100) below this has no contrast to compare with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """Comparison of every frame with the photo, in CIE Lab (D65; lightness 0 to 100)."""

    colour: Tensor
    """``[T]`` float64, distance between the mean colours; 2.3 is just noticeable side by side."""
    contrast: Tensor
    """``[T]`` float64, standard deviation of lightness over that of the photo; 1 is unchanged,
    NaN where the photo is flat."""


def drift(frames: FramePieces, photo: Frames) -> Drift:
    """Compare mean colour and contrast of every frame with those of the photo ``[H, W, 3]``.

    What comes into view by motion counts as well: read it beside a clip of the same motion.

    Raises:
        ShapeError: No frames.
    """
    mean, spread = _lab_statistics(photo)
    statistics = [_lab_statistics(frame) for frame in iterate_frames(frames)]
    if not statistics:
        raise ShapeError("the clip holds no frame: give at least one")
    colours = [float(np.linalg.norm(colour - mean)) for colour, _ in statistics]
    has_contrast = spread >= FLAT_LIGHTNESS
    contrasts = [width / spread if has_contrast else np.nan for _, width in statistics]
    return Drift(
        colour=torch.tensor(colours, dtype=torch.float64),
        contrast=torch.tensor(contrasts, dtype=torch.float64),
    )


def _lab_statistics(frame: Frames) -> tuple[npt.NDArray[np.float64], float]:
    """Mean of the three channels, and standard deviation of lightness."""
    lab = cv2.cvtColor(shrink(frame).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    pixels = lab.reshape(-1, 3).astype(np.float64)
    return pixels.mean(axis=0), float(pixels[:, 0].std())
