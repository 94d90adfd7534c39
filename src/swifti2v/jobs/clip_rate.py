"""The frames a second that a user's clip is written at."""

import math
from dataclasses import dataclass

from swifti2v.media import ClipInfo
from swifti2v.media.timing import count_resampled

MIN_FPS, MAX_FPS = 1, 240
"""Rates that ``GenerationConfig`` takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenRate:
    """Rate at which a clip is written, and the way it gets there."""

    fps: int | float
    """Frames a second that are written."""
    resample_fps: int | float | None
    """Rate to which the clip is resampled; None keeps every frame."""
    num_frames: int
    """Frames at this rate."""
    notes: tuple[str, ...]
    """Notes for the user."""


def plan_rate(info: ClipInfo, asked: float | None) -> WrittenRate:
    """Choose the rate that a clip is written at, and keep its speed.

    If none is asked for it is the clip's own, and so it is where 29.97 is asked for and the clip
    has 30000/1001.
    """
    fps = min(MAX_FPS, max(MIN_FPS, info.fps)) if asked is None else asked
    if math.isclose(fps, info.fps, rel_tol=1e-5):
        own = round(info.fps) if info.fps == round(info.fps) else info.fps
        return WrittenRate(fps=own, resample_fps=None, num_frames=info.num_frames, notes=())
    return WrittenRate(
        fps=fps,
        resample_fps=fps,
        num_frames=count_resampled(info.num_frames, info.fps, fps),
        notes=(
            f"its {info.fps:.5g} fps are resampled to {fps:.5g}: frames are "
            + ("repeated" if fps > info.fps else "left out"),
        ),
    )
