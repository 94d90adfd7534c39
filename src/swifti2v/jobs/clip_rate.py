"""The whole number of frames a second that a user's clip is written at."""

from dataclasses import dataclass

from swifti2v.media import ClipInfo
from swifti2v.media.timing import count_resampled

MAX_FPS = 240
"""Highest rate that ``GenerationConfig`` takes."""
SAME_SPEED = 0.021
"""Part by which a clip may play faster or slower rather than have frames repeated or left out.
A GIF's 60 ms a frame are 2 % from 17 frames a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenRate:
    """Rate at which a clip is written, and the way it gets there."""

    fps: int
    """Frames a second that are written."""
    resample_fps: int | None
    """Rate to which the clip is resampled; None keeps every frame."""
    num_frames: int
    """Frames at this rate."""
    notes: tuple[str, ...]
    """Notes for the user."""


def plan_rate(info: ClipInfo, asked: int | None) -> WrittenRate:
    """Choose the rate that a clip is written at, and keep its speed.

    If none is asked for it is the whole number that is nearest to the clip's.
    """
    fps = asked or min(MAX_FPS, max(1, round(info.fps)))
    speed = fps / info.fps
    if abs(speed - 1) <= SAME_SPEED:
        note = f"its {info.fps:.5g} fps are written as {fps}: it plays {abs(speed - 1):.1%} "
        note += "faster" if speed > 1 else "slower"
        notes = (note,) if abs(speed - 1) > 1e-6 else ()
        return WrittenRate(fps=fps, resample_fps=None, num_frames=info.num_frames, notes=notes)
    return WrittenRate(
        fps=fps,
        resample_fps=fps,
        num_frames=count_resampled(info.num_frames, info.fps, fps),
        notes=(
            f"its {info.fps:.5g} fps are resampled to {fps}: frames are "
            + ("repeated" if speed > 1 else "left out"),
        ),
    )
