"""Windows of training: those that sampling goes through, drawn evenly."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.config import Stage2Config
from swifti2v.errors import ConfigError
from swifti2v.segments import plan_segments
from swifti2v.training.windows import WindowConfig, draw_window, localize

sizes = st.lists(st.integers(1, 6), min_size=1, max_size=3)
contexts = st.lists(st.integers(0, 4), min_size=1, max_size=3)


@settings(max_examples=50, deadline=None)
@given(
    segment_sizes=sizes,
    context_sizes=contexts,
    num_latent_frames=st.integers(2, 30),
    seed=st.integers(0, 99),
)
def test_a_window_is_one_of_a_plan(segment_sizes, context_sizes, num_latent_frames, seed):
    config = WindowConfig(segment_sizes=tuple(segment_sizes), context_sizes=tuple(context_sizes))
    segment = draw_window(config, Stage2Config(), num_latent_frames, np.random.default_rng(seed))
    plans = [
        plan_segments(num_latent_frames, size, context)
        for size in segment_sizes
        for context in context_sizes
    ]
    assert any(segment in plan for plan in plans)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(2, 30),
    st.integers(1, 6),
    st.integers(0, 4),
    st.integers(0, 99),
    st.booleans(),
    st.booleans(),
)
def test_a_localized_segment_counts_its_own_window(
    num_latent_frames, size, context, place, generates_anchor, shows_anchor
):
    plan = plan_segments(
        num_latent_frames,
        size,
        context,
        generates_anchor=generates_anchor,
        shows_anchor=shows_anchor,
    )
    segment = plan[place % len(plan)]
    local = localize(segment)
    assert len(local.given) == len(segment.given)
    assert local.window == tuple(range(len(segment.window)))
    assert len(local.context) == len(segment.context)
    assert len(local.target) == len(segment.target)
    assert local.index == segment.index
    if segment.window == tuple(range(len(segment.window))):
        assert local == segment


def test_all_segments_and_sizes_are_drawn_evenly():
    rng = np.random.default_rng(0)
    config = WindowConfig(segment_sizes=(2, 4), context_sizes=(0, 1))
    drawn = Counter(draw_window(config, Stage2Config(), 9, rng) for _ in range(4000))
    expected = {
        segment
        for size in (2, 4)
        for context in (0, 1)
        for segment in plan_segments(9, size, context)
    }
    assert drawn.keys() == expected
    long = [segment for segment in drawn if len(segment.target) == 4]
    assert sum(drawn[segment] for segment in long) == pytest.approx(2000, rel=0.1)
    later = [drawn[s] for s in drawn if len(s.target) == 2 and s.index and len(s.context) == 1]
    assert later == pytest.approx([250] * 3, rel=0.25)


def test_a_segment_as_long_as_the_clip_is_the_whole_clip():
    config = WindowConfig(segment_sizes=(100,), context_sizes=(1,))
    segment = draw_window(config, Stage2Config(), 9, np.random.default_rng(0))
    assert segment.window == tuple(range(9))
    assert segment.context == ()


@pytest.mark.parametrize("generates_anchor", [True, False])
@pytest.mark.parametrize("shows_anchor", [True, False])
def test_windows_of_training_treat_the_anchor_as_sampling_does(generates_anchor, shows_anchor):
    rng = np.random.default_rng(0)
    stage2 = Stage2Config(
        anchor="generated" if generates_anchor else "given", shows_anchor=shows_anchor
    )
    drawn = {draw_window(WindowConfig(), stage2, 9, rng) for _ in range(200)}
    assert drawn == set(stage2.plan(9))


def test_a_single_frame_cannot_be_trained_on():
    with pytest.raises(ConfigError, match="1 latent frame has no segment"):
        draw_window(WindowConfig(), Stage2Config(), 1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"segment_sizes": ()}, "segment_sizes is"),
        ({"segment_sizes": (3, 0)}, "segment_sizes is"),
        ({"context_sizes": ()}, "context_sizes is"),
        ({"context_sizes": (-1,)}, "context_sizes is"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change, match):
    with pytest.raises(ConfigError, match=match):
        WindowConfig(**change)
