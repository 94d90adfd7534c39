"""Rectangles that are cut out of a clip and of its reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.errors import ConfigError, ShapeError
from swifti2v.media import frames_to_video, resize_video
from swifti2v.shapes import Crop
from swifti2v.training.data.crops import cut_clip, cut_pair, degrade, draw_crop, show_pair

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (6, 32, 48, 3), np.uint8)
SMALL = RNG.integers(0, 256, (6, 8, 12, 3), np.uint8)
PLACES = [0, 3, 5]


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    side=st.integers(1, 60),
    step=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_a_square_lies_within_the_frames_on_multiples_of_the_step(size, side, step, seed):
    rng = np.random.default_rng(seed)
    if side > min(size):
        with pytest.raises(ConfigError, match=f"crop {side} is larger than the clips"):
            draw_crop(size, side, step, rng)
        return
    top, left, height, width = draw_crop(size, side, step, rng)
    assert (height, width) == (side, side)
    assert (top % step, left % step) == (0, 0)
    assert 0 <= top <= size[0] - side
    assert 0 <= left <= size[1] - side


def test_every_place_is_drawn_and_whole_frames_draw_nothing():
    rng = np.random.default_rng(0)
    drawn = {draw_crop((32, 48), 24, 8, rng)[:2] for _ in range(100)}
    assert drawn == {(top, left) for top in (0, 8) for left in (0, 8, 16, 24)}
    before = rng.bit_generator.state
    assert draw_crop((32, 48), None, 8, rng) == (0, 0, 32, 48)
    assert rng.bit_generator.state == before


def test_a_clip_is_cut_in_space_and_time():
    crop = Crop(8, 12, 16, 20)
    part = FRAMES[:, 8:24, 12:32]
    assert torch.equal(cut_clip(FRAMES, crop), frames_to_video(part))
    assert torch.equal(cut_clip(FRAMES, crop, PLACES), frames_to_video(part[PLACES]))


def test_without_stage_ones_clip_the_reference_is_computed():
    part, small = cut_pair("a", FRAMES, None, PLACES, Crop(4, 8, 16, 16), 4)
    assert small is None
    video, reference = show_pair(torch.from_numpy(part), None, 4)
    assert torch.equal(video, cut_clip(FRAMES, Crop(4, 8, 16, 16), PLACES))
    assert torch.equal(reference, degrade(video, 4))


def test_stage_ones_clip_is_cut_at_the_same_place_with_the_photo_in_front():
    part, small = cut_pair("a", FRAMES, SMALL, PLACES, Crop(4, 8, 16, 16), 4)
    assert small is not None
    video, reference = show_pair(torch.from_numpy(part), torch.from_numpy(small), 4)
    expected = resize_video(frames_to_video(SMALL[PLACES, 1:5, 2:6]), 16, 16, "lanczos")
    assert torch.equal(reference[:, :, 1:], expected[:, :, 1:])
    assert torch.equal(reference[:, :, 0], video[:, :, 0])


def test_frames_in_a_row_are_not_copied():
    part, _ = cut_pair("a", FRAMES, None, range(4), Crop(0, 0, 32, 48), 4)
    assert np.shares_memory(part, FRAMES)


def test_a_reference_of_another_size_is_refused():
    with pytest.raises(ShapeError, match=r"reference of a is 12x8; .* for clips of 48x32"):
        cut_pair("a", FRAMES, SMALL, PLACES, Crop(0, 0, 16, 16), 2)
