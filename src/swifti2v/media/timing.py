"""How evenly the frames of a video file follow each other."""

from itertools import pairwise
from pathlib import Path

from swifti2v.media.clips import _open_clip

SAME_SECONDS = 2.5e-3
"""Containers round times (Matroska to 1 ms): steps that differ by less are equal."""


def frame_steps(path: str | Path) -> tuple[float, float] | None:
    """Shortest and longest time from one frame to the next, without decoding.

    Args:
        path: A video file.

    Returns:
        Seconds; None where the file states no times, or has fewer than three frames.

    Raises:
        MediaError: The file cannot be used, for the reasons given at ``iter_frames``.
    """
    with _open_clip(Path(path)) as (container, stream):
        packets = (packet for packet in container.demux(stream) if packet.size)
        times = [packet.pts for packet in packets if packet.pts is not None]
        tick = stream.time_base
    if tick is None or len(times) < 3:
        return None
    steps = [float((later - earlier) * tick) for earlier, later in pairwise(sorted(times))]
    return min(steps), max(steps)


def has_variable_rate(path: str | Path) -> bool:
    """Whether frames follow each other at clearly different distances; errors as above."""
    steps = frame_steps(path)
    return steps is not None and steps[1] - steps[0] > SAME_SECONDS
