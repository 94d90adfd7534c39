"""Test clips of ablations: crops of held-out clips, and cameras over held-out pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swifti2v.errors import InputError
from swifti2v.media import Frames, downscale
from swifti2v.training.nano.material import Material
from swifti2v.training.nano.material_source import TransitionClip


@dataclass(frozen=True, kw_only=True, slots=True)
class TestClip:
    """A true clip and the small one to make it from."""

    __test__ = False  # pytest takes it for a test otherwise

    group: str
    """Kind of clip."""
    name: str
    """Name of the clip and its crop."""
    truth: Frames
    """``[T, H, W, 3]``."""
    low: Frames
    """``[T, h, w, 3]``."""


def cut_test_clips(
    held_out: Material, num_frames: int, crop: int, num_crops: int, factor: int, seed: int = 0
) -> list[TestClip]:
    """Square crops of the first frames of held-out clips, with their own small versions.

    Their side is a multiple of ``factor``.

    Raises:
        InputError: A clip is too short.
    """
    tests = []
    for index, clip in enumerate(held_out.clips):
        if len(clip) < num_frames:
            raise InputError(
                f"held-out clip {index} has {len(clip)} frames, the test needs {num_frames}"
            )
        for number in range(num_crops):
            place = _draw_place(clip, crop, factor, (seed, index, number))
            truth = np.ascontiguousarray(clip[:num_frames, place[0], place[1]])
            low = downscale(truth, factor)
            name = f"clip {index}, crop {number}"
            tests.append(TestClip(group="clips", name=name, truth=truth, low=low))
    return tests


def cut_test_motions(
    redrawn: Sequence[TransitionClip], crop: int, factor: int, seed: int = 0
) -> list[TestClip]:
    """One crop of each camera motion, twice: from its true small version, and from Stage I's."""
    tests = []
    for index, clip in enumerate(redrawn):
        rows, columns = _draw_place(clip.frames, crop, factor, (seed, index, -1 % 2**32))
        truth = np.ascontiguousarray(clip.frames[:, rows, columns])
        small = (_divide(rows, factor), _divide(columns, factor))
        drawn = np.ascontiguousarray(clip.low[:, small[0], small[1]])
        for group, low in (("motions", downscale(truth, factor)), ("Stage I", drawn)):
            tests.append(TestClip(group=group, name=clip.name, truth=truth, low=low))
    return tests


def _draw_place(frames: Frames, crop: int, step: int, seed: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns of a square, at multiples of ``step``."""
    rng = np.random.default_rng(seed)
    corner = [step * int(rng.integers((side - crop) // step + 1)) for side in frames.shape[1:3]]
    return slice(corner[0], corner[0] + crop), slice(corner[1], corner[1] + crop)


def _divide(place: slice, factor: int) -> slice:
    return slice(place.start // factor, place.stop // factor)
