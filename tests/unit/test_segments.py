import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v import plan_segments
from swifti2v.errors import ShapeError
from swifti2v.segments import plan_pieces


@given(st.integers(1, 200), st.integers(1, 30), st.integers(0, 30))
def test_targets_partition_all_frames_but_the_anchor_in_order(frames, size, context):
    segments = plan_segments(frames, size, context)
    assert [t for s in segments for t in s.target] == list(range(1, frames))
    assert [s.index for s in segments] == list(range(len(segments)))


@given(st.integers(2, 200), st.integers(1, 30), st.integers(0, 30))
def test_windows_are_sorted_unique_bounded_and_start_with_the_anchor(frames, size, context):
    for segment in plan_segments(frames, size, context):
        window = segment.window
        assert list(window) == sorted(set(window))
        assert window[0] == segment.anchor == 0
        assert len(window) <= 1 + context + size
        assert window == (0, *segment.context, *segment.target)


@given(st.integers(2, 200), st.integers(1, 30), st.integers(0, 30))
def test_context_is_the_last_finished_frames_without_the_anchor(frames, size, context):
    for segment in plan_segments(frames, size, context):
        start, stop = segment.latent_range
        assert segment.context == tuple(range(max(1, start - context), start))
        assert segment.target == tuple(range(start, stop))


def test_the_paper_setting_makes_seven_segments_of_81_frames():
    segments = plan_segments(21, 3, 1)
    assert [s.latent_range for s in segments] == [
        (1, 4), (4, 7), (7, 10), (10, 13), (13, 16), (16, 19), (19, 21),
    ]  # fmt: skip
    assert [len(s.window) for s in segments] == [4, 5, 5, 5, 5, 5, 4]


def test_a_single_frame_needs_no_segment():
    assert plan_segments(1) == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((0, 3, 1), "num_latent_frames"), ((5, 0, 1), "segment_size"), ((5, 3, -1), "context_size")],
)
def test_impossible_plans_name_the_argument(arguments, word):
    with pytest.raises(ShapeError, match=word):
        plan_segments(*arguments)


@given(st.integers(1, 200), st.integers(1, 30) | st.none(), st.integers(0, 30))
def test_with_the_anchor_only_the_first_segment_is_another_one(frames, size, context):
    plain = plan_segments(frames, size, context)
    segments = plan_segments(frames, size, context, generates_anchor=True)
    assert [t for s in segments for t in s.target] == list(range(frames))
    assert segments[1:] == plain[1:]
    assert segments[0].given == ()
    assert segments[0].window == segments[0].target == (0, *(plain[0].target if plain else ()))
    assert all(segment.given == (0, *segment.context) for segment in segments[1:])


@given(st.integers(2, 200), st.integers(0, 30))
def test_without_a_size_one_segment_makes_the_clip(frames, context):
    (segment,) = plan_segments(frames, None, context)
    assert segment.window == tuple(range(frames))
    assert segment.given == (0,)


@given(st.integers(2, 100), st.integers(1, 30) | st.none(), st.integers(0, 30), st.booleans())
def test_without_the_anchor_a_window_is_the_last_frames_and_the_target(
    frames, size, context, generates_anchor
):
    shown = plan_segments(frames, size, context, generates_anchor=generates_anchor)
    segments = plan_segments(
        frames, size, context, generates_anchor=generates_anchor, shows_anchor=False
    )
    assert [s.target for s in segments] == [s.target for s in shown]
    for segment in segments:
        start = segment.target[0]
        assert segment.given == segment.context == tuple(range(max(0, start - context), start))
        assert segment.window == (*segment.given, *segment.target)


@given(st.data())
def test_pieces_make_every_frame_once_and_go_on_from_made_ones(data):
    num_frames = 4 * data.draw(st.integers(1, 60)) + 1
    overlap = 4 * data.draw(st.integers(0, 3)) + 1
    longest = data.draw(st.none() | st.integers(overlap // 4 + 1, 20))
    limit = None if longest is None else 4 * longest + 1
    places = st.integers(0, max(0, (num_frames - 5) // 4))
    starts = sorted({4 * place + 1 for place in data.draw(st.lists(places, max_size=4))})
    starts = [start for start in starts if start < num_frames]
    pieces = plan_pieces(num_frames, limit, overlap, starts)
    made = [f for piece in pieces for f in range(piece.start + piece.num_given, piece.stop)]
    assert made == list(range(num_frames))
    assert set(starts) <= {piece.start + piece.num_given for piece in pieces}
    assert pieces[0].num_given == 0
    for piece in pieces:
        assert piece.num_frames % 4 == 1
        assert limit is None or piece.num_frames <= limit
        assert piece is pieces[0] or piece.num_given % 4 == 1
        assert piece.num_given <= overlap
