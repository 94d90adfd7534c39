"""How steady a clip is from frame to frame, with and without taking out motion."""

import numpy as np
import torch
from torch import Tensor

from swifti2v.errors import ShapeError
from swifti2v.evaluation.metrics.flow import motion_residual
from swifti2v.evaluation.metrics.frames import FramePieces, iterate_frames, to_unit_range


def warping_error(frames: FramePieces) -> Tensor:
    """Mean square of what motion does not explain between neighbouring frames.

    Args:
        frames: ``[T, H, W, 3]`` uint8 or float in [0, 1], or its pieces in temporal order;
            two frames are in memory at a time.

    Returns:
        ``[T - 1]`` float64: mean over the pixels visible in both frames and the colours of
        ``(frame_t - warp(frame_{t+1}))^2``, range 1; 0 is perfect. NaN where no pixel is
        visible in both (a cut).

    Raises:
        ShapeError: Fewer than two frames, or sides below 16 pixels.

    Source:
        Lai et al., "Learning blind video temporal consistency", ECCV 2018, equation 10.
    """
    errors = []
    previous = None
    for frame in iterate_frames(frames):
        if previous is not None:
            residual = motion_residual(previous, frame)
            errors.append(float(np.square(residual).mean()) if residual.size else float("nan"))
        previous = frame
    if not errors:
        raise ShapeError("the warping error compares neighbours: give at least two frames")
    return torch.tensor(errors, dtype=torch.float64)


def flicker(frames: FramePieces) -> float:
    """VBench's temporal flickering score: how little neighbouring frames differ.

    Motion counts as a difference; use ``warping_error`` where things move.

    Args:
        frames: ``[T, H, W, 3]`` uint8 or float in [0, 1], or its pieces in temporal order.

    Returns:
        1 minus the mean absolute difference of neighbouring frames; 1 is a still picture.

    Raises:
        ShapeError: Fewer than two frames.

    Source:
        Huang et al., "VBench", CVPR 2024: (255 - MAE) / 255.
    """
    differences = []
    previous = None
    for frame in iterate_frames(frames):
        current = to_unit_range(frame)
        if previous is not None:
            differences.append(float((current - previous).abs().mean()))
        previous = current
    if not differences:
        raise ShapeError("flicker compares neighbours: give at least two frames")
    return 1 - sum(differences) / len(differences)
