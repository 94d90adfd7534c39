"""The random course of a motion, and the chart that shows it to Stage I."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.pipelines.course import (
    SPEEDS,
    SWAY_CONTRAST,
    Course,
    draw_chart,
    draw_course,
    even_course,
)

seeds = st.integers(0, 2**40)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, num_frames=st.sampled_from([1, 5, 33, 81]))
def test_a_seed_is_a_course(seed, num_frames):
    course, again = draw_course(num_frames, seed), draw_course(num_frames, seed)

    assert torch.equal(course.clock, again.clock)
    assert torch.equal(course.sway, again.sway)
    other = draw_course(num_frames, seed + 1)
    assert num_frames == 1 or not torch.equal(other.clock, course.clock)
    assert num_frames == 1 or not torch.equal(other.sway, course.sway)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, num_frames=st.sampled_from([5, 33, 81]))
def test_the_clock_runs_forwards_from_0_at_about_the_usual_speed(seed, num_frames):
    clock = draw_course(num_frames, seed).clock

    assert clock.shape == (num_frames,)
    assert clock[0] == 0
    assert (clock.diff() > 0).all()
    assert SPEEDS[0] - 1e-6 <= clock[-1] <= SPEEDS[1] + 1e-6


def test_seeds_use_the_whole_range_of_speeds():
    ends = torch.stack([draw_course(33, seed).clock[-1] for seed in range(200)])
    assert ends.min() < SPEEDS[0] + 0.02
    assert ends.max() > SPEEDS[1] - 0.02
    middles = torch.stack([draw_course(33, seed).clock for seed in range(200)])
    # The slowest start is half a smooth step's, the fastest that of an even clock.
    first = middles[:, 4] / middles[:, -1]
    assert first.min() < 0.06
    assert first.max() > 0.115


@settings(max_examples=60, deadline=None)
@given(seed=seeds)
def test_a_hand_sways_smoothly_from_where_it_is(seed):
    sway = draw_course(81, seed).sway

    assert sway.shape == (81, 3)
    assert (sway[0] == 0).all()
    # Three waves of at least ten frames and of amplitude sqrt(2/3), all at their steepest.
    steepest = 3 * math.sqrt(2 / 3) * 2 * math.sin(math.pi / 10)
    assert sway.diff(dim=0).abs().max() <= steepest
    assert (sway.amax(dim=0) - sway.amin(dim=0) > 0.3).all()


def test_a_longer_clip_goes_on_swaying():
    assert torch.equal(draw_course(81, 3).sway[:33], draw_course(33, 3).sway)
    many = torch.cat([draw_course(400, seed).sway for seed in range(40)])
    centred = many.reshape(40, 400, 3) - many.reshape(40, 400, 3).mean(dim=1, keepdim=True)
    assert centred.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("seed", [-1, 2**63 - 1, 2**70])
def test_any_integer_is_a_seed(seed):
    assert draw_course(5, seed).clock.isfinite().all()


def test_an_even_course_has_no_sway():
    course = even_course(5)
    assert course.clock.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert course.sway.shape == (5, 3)
    assert not course.sway.any()


def test_some_frames_of_a_course():
    course = draw_course(33, 0)
    some = course.at([0, 7, 32])

    assert torch.equal(some.clock, course.clock[[0, 7, 32]])
    assert torch.equal(some.sway, course.sway[[0, 7, 32]])


def sway_waves(height: int, width: int) -> torch.Tensor:
    """``[3, height, width]`` waves of eight pixels, as the chart is said to have them."""
    wave = [torch.cos(math.pi / 4 * (torch.arange(side) + 0.5)) for side in (height, width)]
    across, down = wave[1].expand(height, width), wave[0][:, None].expand(height, width)
    return torch.stack([across, down, across * down])


@settings(max_examples=20, deadline=None)
@given(seed=seeds, size=st.sampled_from([(16, 24), (32, 16)]))
def test_place_clock_and_sway_can_be_read_from_the_chart(seed, size):
    height, width = size
    course = draw_course(9, seed)
    chart = draw_chart(course, height, width)

    assert chart.shape == (3, 9, height, width)
    # Means over whole waves see no wave.
    torch.testing.assert_close(chart[2].mean(dim=(1, 2)), 2 * course.clock - 1, atol=1e-5, rtol=0)
    column = (torch.arange(width) + 0.5) / width * 2 - 1
    row = (torch.arange(height) + 0.5) / height * 2 - 1
    waves = chart[2] - chart[2].mean(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(chart[0] - waves, column.expand(9, height, width), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        chart[1] - waves, row[:, None].expand(9, height, width), atol=1e-5, rtol=0
    )
    for place, wave in enumerate(sway_waves(height, width)):
        read = (waves * wave).mean(dim=(1, 2)) / wave.square().mean() / SWAY_CONTRAST
        torch.testing.assert_close(read, course.sway[:, place], atol=1e-4, rtol=0)


def test_another_sway_is_another_chart():
    course = draw_course(5, 0)
    for place in range(3):
        sway = course.sway.clone()
        sway[3, place] += 0.5
        different = draw_chart(Course(course.clock, sway), 16, 16) != draw_chart(course, 16, 16)
        assert different[:, 3].any()
        assert not different[:, [0, 1, 2, 4]].any()
