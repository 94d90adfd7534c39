"""Steadiness of a clip from frame to frame, with and without taking out motion."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from swifti2v.errors import ShapeError
from swifti2v.evaluation.metrics.flow import motion_residual
from swifti2v.evaluation.metrics.frames import FramePieces, iterate_frames, to_unit_range


@dataclass(frozen=True, kw_only=True, slots=True)
class MotionResiduals:
    """Residuals of motion between neighbouring frames, measured once for many metrics."""

    absolute: Tensor
    """``[T - 1]`` float64, mean of ``|frame_t - warp(frame_{t+1})|`` over the pixels visible in
    both frames and the colours, range 1; NaN where no pixel is visible in both (a cut)."""
    square: Tensor
    """``[T - 1]`` float64, the mean of the squares."""


def motion_residuals(frames: FramePieces) -> MotionResiduals:
    """Warp every frame onto the one before it along optical flow, and take the difference.

    Two frames are in memory at a time.

    Raises:
        ShapeError: Fewer than two frames, or sides below 16 pixels.
    """
    means = []
    previous = None
    for frame in iterate_frames(frames):
        if previous is not None:
            residual = motion_residual(previous, frame)
            means.append(
                (np.abs(residual).mean(), np.square(residual).mean())
                if residual.size
                else (np.nan, np.nan)
            )
        previous = frame
    if not means:
        raise ShapeError("motion residuals compare neighbours: give at least two frames")
    absolute, square = torch.tensor(np.array(means, np.float64)).T
    return MotionResiduals(absolute=absolute, square=square)


def warping_error(frames: FramePieces | MotionResiduals) -> Tensor:
    """Mean square of what motion does not explain between neighbouring frames.

    ``frames`` may be the result of ``motion_residuals``.

    Returns:
        ``[T - 1]`` float64: mean over the pixels visible in both frames and the colours of
        ``(frame_t - warp(frame_{t+1}))^2``, range 1; 0 is perfect. NaN where no pixel is
        visible in both (a cut).

    Raises:
        ShapeError: Fewer than two frames, or sides below 16 pixels.

    Source:
        Lai et al., "Learning blind video temporal consistency", ECCV 2018, equation 10.
    """
    residuals = frames if isinstance(frames, MotionResiduals) else motion_residuals(frames)
    return residuals.square


def compensated_flicker(frames: FramePieces | MotionResiduals) -> float:
    """``flicker`` with motion taken out; arguments and errors as in ``warping_error``.

    Returns:
        1 minus the mean absolute residual, cuts left out; 1 is steady. NaN if all is cuts.
    """
    residuals = frames if isinstance(frames, MotionResiduals) else motion_residuals(frames)
    return 1 - float(residuals.absolute.nanmean())


def frame_changes(frames: FramePieces | Tensor) -> Tensor:
    """Mean absolute difference of every frame to the one before it.

    A result of this function is returned as it is.

    Returns:
        ``[T - 1]`` float64, range 1.

    Raises:
        ShapeError: Fewer than two frames.
    """
    if isinstance(frames, Tensor) and frames.ndim == 1:
        return frames
    changes = []
    previous = None
    for frame in iterate_frames(frames):
        current = to_unit_range(frame)
        if previous is not None:
            changes.append(float((current - previous).abs().mean()))
        previous = current
    if not changes:
        raise ShapeError("changes are between neighbours: give at least two frames")
    return torch.tensor(changes, dtype=torch.float64)


def flicker(frames: FramePieces) -> float:
    """VBench's temporal flickering score: how little neighbouring frames differ.

    Motion counts as a difference; use ``compensated_flicker`` where things move. ``frames`` may be
    the result of ``frame_changes``.

    Returns:
        1 minus the mean absolute difference of neighbouring frames; 1 is a still picture.

    Raises:
        ShapeError: Fewer than two frames.

    Source:
        Huang et al., "VBench", CVPR 2024: (255 - MAE) / 255.
    """
    return 1 - float(frame_changes(frames).mean())
