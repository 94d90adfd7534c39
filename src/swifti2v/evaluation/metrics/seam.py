"""Are the joins between segments visible?"""

from collections.abc import Sequence

import numpy as np

from swifti2v.errors import ShapeError
from swifti2v.evaluation.metrics.flow import motion_residual
from swifti2v.evaluation.metrics.frames import FramePieces, iterate_frames
from swifti2v.evaluation.metrics.temporal import MotionResiduals

INVISIBLE_RESIDUAL = 1e-4
"""Value added above and below the ratio (1/40 of an 8-bit step), so that a still clip scores 1."""


def latent_start_residuals(
    frames: FramePieces | MotionResiduals, time_factor: int = 4
) -> dict[int, float]:
    """Mean absolute motion-compensated residual where each latent frame starts.

    ``frames`` may be the clip's ``motion_residuals``; two are in memory at a time.

    Returns:
        Latent frame index -> residual between its first pixel frame,
        ``1 + (index - 1) * time_factor``, and the pixel frame before it. Indices 0 and 1 are
        left out: the step from the photo into the clip is no join of two segments. NaN
        where no pixel is visible in both frames.
    """
    if isinstance(frames, MotionResiduals):
        after = frames.absolute.tolist()  # at t, the step from frame t to t + 1
        return {1 + t // time_factor: after[t] for t in range(time_factor, len(after), time_factor)}
    residuals = {}
    previous = None
    for position, frame in enumerate(iterate_frames(frames)):
        index, phase = divmod(position - 1, time_factor)
        if phase == 0 and index >= 1 and previous is not None:
            residual = motion_residual(previous, frame)
            residuals[index + 1] = float(np.abs(residual).mean()) if residual.size else np.nan
        previous = frame
    return residuals


def seam_score(
    frames: FramePieces | MotionResiduals, segment_starts: Sequence[int], time_factor: int = 4
) -> float:
    """Residual at the starts of segments over the residual at the other latent frames' starts.

    A causal video VAE alone makes a rhythm of ``time_factor`` frames, so starts of segments
    are compared with starts of other latent frames and not with all frames.

    Args:
        frames: See ``latent_start_residuals``.
        segment_starts: **Latent** frame indices, the first target of every segment
            (``segment.latent_range[0]``). 0 and 1, the start of the clip, are ignored.
        time_factor: Pixel frames a latent frame holds.

    Returns:
        1: joins are as smooth as the inside of segments; 1.5: half as much again changes
        there. NaN without a join or without another latent frame to compare with.

    Raises:
        ShapeError: A segment starts outside the clip, or ``time_factor`` is below 1.
    """
    if time_factor < 1:
        raise ShapeError(f"time_factor is {time_factor}; it must be at least 1")
    residuals = latent_start_residuals(frames, time_factor)
    joins = {start for start in segment_starts if start not in (0, 1)}
    outside = sorted(joins - residuals.keys())
    if outside:
        raise ShapeError(
            f"segments start at latent frames {outside}, but this clip has the starts "
            f"{sorted(residuals)}; give latent, not pixel, frame indices"
        )
    at_joins = [residuals[index] for index in sorted(joins)]
    elsewhere = [value for index, value in residuals.items() if index not in joins]
    if not at_joins or not elsewhere:
        return float("nan")
    return float(
        (np.mean(at_joins) + INVISIBLE_RESIDUAL) / (np.mean(elsewhere) + INVISIBLE_RESIDUAL)
    )
