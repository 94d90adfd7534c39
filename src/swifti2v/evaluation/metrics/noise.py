"""Noise that a model leaves in its frames: fine-grained within a frame, and boiling over time."""

import math

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from swifti2v.errors import ShapeError
from swifti2v.evaluation.metrics.flow import shrink
from swifti2v.evaluation.metrics.frames import (
    FramePieces,
    Frames,
    iterate_frames,
    luma,
    to_unit_range,
)
from swifti2v.media.flow import optical_flow

WAVELET = np.array([1 - 3**0.5, 3**0.5 - 3, 3 + 3**0.5, -1 - 3**0.5]) / 2**2.5
"""High-pass of Daubechies' wavelet with two vanishing moments."""
MEDIAN_OF_NORMAL = 0.6744898
"""Median absolute value of a normal variable of standard deviation 1."""
STATIC_PX = 0.1
"""Motion below this many pixels of a frame of 640 counts as none."""
SMOOTH_SIGMA = 2.0
"""Pixels; what a Gaussian of this width leaves over is the fine detail whose boiling counts."""
MIN_STATIC = 0.01
"""Below this part of all pixels, what stands still is no sample."""


def noise_sigma(frames: FramePieces) -> Tensor:
    """Standard deviation of the noise in each frame's luma, estimated from its finest diagonals.

    The median of the diagonal wavelet coefficients hardly sees edges. Fine texture all over the
    frame counts as noise: compare clips of one content.

    Returns:
        ``[T]`` float64, range 1 (1/255 is an 8-bit step); 0 for a flat frame.

    Raises:
        ShapeError: No frames.

    Source:
        Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 81, 1994.
    """
    sigmas = []
    for frame in iterate_frames(frames):
        diagonal = cv2.sepFilter2D(_luma(frame), cv2.CV_32F, WAVELET, WAVELET)[::2, ::2]
        size = np.abs(diagonal[diagonal != 0])  # exact zeros are clipped or painted pixels
        sigmas.append(float(np.median(size)) / MEDIAN_OF_NORMAL if size.size else 0.0)
    if not sigmas:
        raise ShapeError("the clip holds no frame: give at least one")
    return torch.tensor(sigmas, dtype=torch.float64)


def temporal_noise(frames: FramePieces) -> float:
    """Measure the change of fine detail from frame to frame where nothing moves.

    Two frames are in memory at a time.

    Returns:
        Standard deviation over time of high-passed luma at static pixels, range 1; 0 is steady.
        NaN where less than 1 % of the clip stands still.

    Raises:
        ShapeError: Fewer than two frames, or sides below 16 pixels.
    """
    energy, num_static, num_pixels = 0.0, 0, 0
    previous = None
    for frame in iterate_frames(frames):
        current = shrink(frame), _high_pass(frame)
        if previous is not None:
            is_static = _is_static(previous[0], current[0], current[1].shape)
            change = (current[1] - previous[1])[is_static]
            energy += float(np.square(change).sum(dtype=np.float64))
            num_static += change.size
            num_pixels += is_static.size
        previous = current
    if not num_pixels:
        raise ShapeError("temporal noise compares neighbours: give at least two frames")
    if num_static < MIN_STATIC * num_pixels:
        return math.nan
    return math.sqrt(energy / num_static / 2)  # a difference has twice the variance


def _luma(frame: Frames) -> npt.NDArray[np.float32]:
    plane: npt.NDArray[np.float32] = luma(to_unit_range(frame)).cpu().numpy()
    return plane


def _high_pass(frame: Frames) -> npt.NDArray[np.float32]:
    plane = _luma(frame)
    return plane - cv2.GaussianBlur(plane, (0, 0), SMOOTH_SIGMA)


def _is_static(
    first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8], shape: tuple[int, ...]
) -> npt.NDArray[np.bool_]:
    is_still = np.abs(optical_flow(first, second)).max(axis=-1) < STATIC_PX
    size = shape[1], shape[0]
    whole = cv2.resize(is_still.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    result: npt.NDArray[np.bool_] = whole.astype(np.bool_)
    return result
