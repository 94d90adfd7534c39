"""The random part of a camera's motion: the speed of the clip's clock and the sway of a hand."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SPEEDS = (0.85, 1.15)
"""Least and greatest distance that a seed gives the same prompt, in clips of even speed."""
_SWAYS = 3  # columns, rows, roll
_WAVES = 3
_PERIODS = (10.0, 40.0)  # frames of a wave of a hand's sway, at about 16 frames a second
_STREAM = 0x5EED_C0DE  # keeps these draws apart from the noise of the same seed


@dataclass(frozen=True, slots=True)
class Course:
    """Clock and sway at each frame of a clip, both 0 at the first."""

    clock: Tensor
    """``[T]`` part of the motion that is done; about 1 at the last frame. ``[B, T]`` of B clips."""
    sway: Tensor
    """``[T, 3]`` sway to the right, downwards and clockwise, of unit variance over long clips.
    ``[B, T, 3]`` of B clips."""

    def at(self, frames: list[int]) -> "Course":
        """Course of some frames; for one clip only."""
        return Course(self.clock[frames], self.sway[frames])

    def to(self, device: torch.device) -> "Course":
        """Return the course on a device."""
        return Course(self.clock.to(device), self.sway.to(device))


def draw_course(num_frames: int, seed: int) -> Course:
    """Clock and sway of a clip.

    The clock runs evenly, or starts and ends slowly, or something between. The sway is a sum of
    waves, so that its frames follow each other smoothly and a longer clip goes on swaying.

    Args:
        num_frames: T.
        seed: Any integer.
    """
    rng = np.random.default_rng((_STREAM, seed % 2**63))
    way, ease = rng.uniform(*SPEEDS), rng.uniform(0, 1)
    part = np.arange(num_frames) / max(1, num_frames - 1)
    clock = way * ((1 - ease) * part + ease * part**2 * (3 - 2 * part))
    shortest, longest = map(math.log, _PERIODS)
    periods = np.exp(rng.uniform(shortest, longest, size=(_WAVES, _SWAYS)))
    phases = rng.uniform(0, 2 * math.pi, size=(_WAVES, _SWAYS))
    frames = np.arange(num_frames)[:, None, None]
    waves = np.sin(2 * math.pi * frames / periods + phases) * math.sqrt(2 / _WAVES)
    sway = (waves - waves[:1]).sum(axis=1)
    return Course(torch.tensor(clock).float(), torch.tensor(sway).float())


def even_course(num_frames: int) -> Course:
    """Clock and sway of a clip that is known by its frames alone: it runs evenly, without a sway."""
    return Course(torch.linspace(0, 1, num_frames), torch.zeros(num_frames, _SWAYS))


def stack_courses(courses: Sequence[Course]) -> Course:
    """One course of several clips of the same length."""
    return Course(
        torch.stack([course.clock for course in courses]),
        torch.stack([course.sway for course in courses]),
    )


def draw_chart(course: Course, height: int, width: int) -> Tensor:
    """Frames that show place and time: where a frame ends, how far the motion is, how a hand sways.

    Red tells the column, green the row, each from -1 to 1, blue the clock. On them lie waves of
    eight pixels whose contrast is the sway: across for columns, down for rows, both for roll.

    Args:
        course: Course of the T frames that are drawn, of one clip or of B.
        height: Pixels.
        width: Pixels.

    Returns:
        ``[3, T, height, width]``, or ``[B, 3, T, height, width]``.
    """
    column, row = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    across, down = torch.cos(math.pi / 4 * column), torch.cos(math.pi / 4 * row)[:, None]
    place = torch.stack([
        (column / width * 2 - 1).expand(height, width),
        (row / height * 2 - 1)[:, None].expand(height, width),
        torch.zeros(height, width),
    ])  # fmt: skip
    waves = torch.stack([across.expand(height, width), down.expand(height, width), across * down])
    swaying = torch.einsum("...ts,shw->...thw", SWAY_CONTRAST * course.sway, waves)
    chart = place[:, None] + swaying[..., None, :, :, :]
    chart[..., 2, :, :, :] += 2 * course.clock[..., None, None] - 1
    return chart


SWAY_CONTRAST = 0.2
