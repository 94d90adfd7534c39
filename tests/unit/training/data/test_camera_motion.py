"""Camera moves go where their names say, and the displacement beside a clip is the true one."""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swifti2v.media import Frames
from swifti2v.pipelines.camera_moves import (
    MOVES,
    ORBIT,
    PARALLAX,
    ROLL,
    SHIFT,
    SWAY,
    ZOOM,
    CameraMove,
)
from swifti2v.pipelines.course import Course, draw_course, even_course
from swifti2v.pipelines.displacement import move_photo
from swifti2v.training.data.camera_motion import (
    VIEW_SIDES,
    Scene,
    View,
    draw_thing,
    draw_view,
    make_scenes,
    place_in_front,
    render_move,
    split_scene,
)

SIDE = 256
SIZE = (48, 80)
PORTRAIT = (80, 48)


def smooth_picture() -> Frames:
    """``[256, 256, 3]``: slow waves, so that a frame moved by a displacement is exact."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    waves = [np.sin(7 * x + 2 * y), np.cos(6 * y - 3 * x), np.sin(5 * x) * np.cos(4 * y)]
    return (127.5 + 110 * np.stack(waves, axis=-1)).round().astype(np.uint8)


FLAT = Scene(smooth_picture(), None, None)
CENTRAL = View(center=(SIDE / 2, SIDE / 2), scale=1.1)
EVEN = even_course(5)
SWAYING = Course(
    torch.linspace(0, 1, 5),
    torch.tensor([[0, 0, 0], [1, -0.5, 0.8], [2, 1, -1.5], [-1, 2, 1], [0.5, -2, 2.0]]),
)


def of(
    name: str, scene: Scene = FLAT, view: View = CENTRAL, size: tuple[int, int] = SIZE
) -> tuple[Tensor, Tensor]:
    course = SWAYING if name == "handheld" else EVEN
    return render_move(scene, view, MOVES[name], course, size)


def leads_inside(displacement: Tensor, margin: float = 2) -> Tensor:
    """``[T, h, w]`` whether a displacement ``[2, T, h, w]`` leads into the first frame."""
    height, width = displacement.shape[-2:]
    column = torch.arange(width) + displacement[0]
    row = torch.arange(height)[:, None] + displacement[1]
    inside = (column >= margin) & (column <= width - 1 - margin)
    return inside & (row >= margin) & (row <= height - 1 - margin)


@pytest.mark.parametrize("size", [SIZE, PORTRAIT])
@pytest.mark.parametrize("is_mirrored", [False, True])
@pytest.mark.parametrize("name", MOVES)
def test_the_first_frame_moved_by_the_displacement_is_the_clip(name, is_mirrored, size):
    video, displacement = of(name, view=replace(CENTRAL, is_mirrored=is_mirrored), size=size)

    assert video.shape == (3, 5, *size)
    assert displacement.shape == (2, 5, *size)
    assert (displacement[:, 0] == 0).all()
    moved = move_photo(video[None, :, :1], displacement[None])[0]
    inside = leads_inside(displacement)
    assert inside.float().mean() > 0.6
    # Half an 8-bit level of rounding in the picture, and what two resamplings cost.
    assert ((moved - video).abs().amax(dim=0) * inside).max() < 0.02
    is_moving = displacement[:, -1].abs().max() > 1
    assert is_moving == (name != "static")


@settings(max_examples=20, deadline=None)
@given(
    ways=st.tuples(*[st.floats(-1.7, 1.7)] * 7), seed=st.integers(0, 1000), scale=st.floats(0.6, 2)
)
def test_moves_at_once_with_a_drawn_course_have_their_true_displacement(ways, seed, scale):
    names = ("pan", "tilt", "zoom", "roll", "dolly", "orbit", "sway")
    move = CameraMove(**dict(zip(names, ways, strict=True)))
    course = draw_course(9, seed)
    video, displacement = render_move(FLAT, replace(CENTRAL, scale=scale), move, course, (32, 40))
    moved = move_photo(video[None, :, :1], displacement[None])[0]
    inside = leads_inside(displacement)
    assert ((moved - video).abs().amax(dim=0) * inside).max() < 0.06


@pytest.mark.parametrize(
    ("name", "column", "row"),
    [("pan left", -1, 0), ("pan right", 1, 0), ("tilt up", 0, -1), ("tilt down", 0, 1)],
)
@pytest.mark.parametrize("size", [SIZE, PORTRAIT])
def test_pans_and_tilts_show_what_lies_there(name, column, row, size):
    _, displacement = of(name, size=size)
    way = SHIFT * torch.linspace(0, 1, 5)
    for side, found in ((column * size[1], displacement[0]), (row * size[0], displacement[1])):
        expected = (side * way)[:, None, None].expand(5, *size)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_pan_to_the_right_moves_the_picture_to_the_left():
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    picture[:, 120:136] = 255
    video, _ = of("pan right", Scene(picture, None, None))
    bright = (video[0] + 1).sum(dim=1)  # [T, w]
    columns = (bright * torch.arange(SIZE[1])).sum(dim=1) / bright.sum(dim=1)
    torch.testing.assert_close(
        columns - columns[0], -SHIFT * SIZE[1] * torch.linspace(0, 1, 5), atol=0.05, rtol=0
    )


@pytest.mark.parametrize(("name", "factor"), [("zoom in", ZOOM), ("zoom out", 1 / ZOOM)])
def test_zooms_change_the_size_of_what_is_seen(name, factor):
    _, displacement = of(name)
    column = torch.arange(SIZE[1]) + 0.5 - SIZE[1] / 2
    row = (torch.arange(SIZE[0]) + 0.5 - SIZE[0] / 2)[:, None]
    expected = torch.stack([column.expand(*SIZE), row.expand(*SIZE)]) * (factor - 1)
    torch.testing.assert_close(displacement[:, -1], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "sign"), [("roll left", -1), ("roll right", 1)])
def test_a_roll_turns_around_the_centre(name, sign):
    _, displacement = of(name)
    turn = 2 * math.sin(ROLL / 2)  # of a chord, relative to the radius
    # Right of the centre a clockwise camera sees what was further down.
    assert float(displacement[1, -1, SIZE[0] // 2, -1]) == pytest.approx(
        sign * turn * SIZE[1] / 2, abs=0.3
    )
    length = displacement[:, -1].norm(dim=0)
    assert length[SIZE[0] // 2, SIZE[1] // 2] < 0.2
    torch.testing.assert_close(length.max(), length[0, 0], atol=1e-3, rtol=0)


def thing() -> Scene:
    """A disc in front of waves."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    cv2.circle(mask, (SIDE // 2, SIDE // 2), 14, 1, -1)
    behind = smooth_picture()
    picture = np.where(mask[..., None] > 0, 255 - behind, behind)
    return place_in_front(picture, behind, mask)


@pytest.mark.parametrize("name", ["dolly in", "dolly out", "orbit left", "orbit right"])
def test_near_things_move_more_than_far_ones(name):
    scene = thing()
    video, displacement = of(name, scene)
    flat_video, flat = of(name)
    middle = (slice(None), slice(None), slice(22, 26), slice(38, 42))
    edge = (slice(None), slice(None), slice(0, 4), slice(None))
    torch.testing.assert_close(displacement[edge], flat[edge])  # the far end of the ramp
    torch.testing.assert_close(video[edge], flat_video[edge], atol=0.02, rtol=0)
    if name.startswith("orbit"):
        sign = 1 if name == "orbit right" else -1
        near, far = displacement[middle][0, -1], displacement[edge][0, -1]
        assert (sign * near > 0.4 * ORBIT * SIZE[1]).all()
        assert (sign * far < 0).all()  # to the other side
    else:
        beside = (slice(None), 4, slice(22, 26), slice(32, 36))  # on the disc, off the centre
        assert (displacement[beside][0].abs() > 1.3 * flat[beside][0].abs()).all()
        growth = PARALLAX[0] + (PARALLAX[1] - PARALLAX[0]) * 0.95
        scale = ZOOM ** (growth if name == "dolly in" else -growth)
        column = torch.arange(32, 36) + 0.5 - SIZE[1] / 2
        torch.testing.assert_close(
            displacement[beside][0], (column * (scale - 1)).expand(4, 4), atol=1e-4, rtol=0
        )
    # Where the disc is and was, the first frame moved is the clip.
    moved = move_photo(video[None, :, :1], displacement[None])[0]
    assert (moved - video)[middle].abs().max() < 0.03


def test_a_thing_in_front_covers_what_is_behind_and_uncovers_it():
    scene = thing()
    video, _ = of("orbit right", scene)
    assert scene.behind is not None
    behind, _ = of("orbit right", Scene(scene.behind, None, None))
    # The disc moves to the left by more than its width would need; right of it is the background.
    row = video[:, -1, SIZE[0] // 2] - behind[:, -1, SIZE[0] // 2]
    covered = row.abs().amax(dim=0) > 0.1
    first = (video[:, 0, SIZE[0] // 2] - behind[:, 0, SIZE[0] // 2]).abs().amax(dim=0) > 0.1
    assert first.any()
    assert covered.nonzero().float().mean() < first.nonzero().float().mean() - 5


@pytest.mark.parametrize("crop", [(0, 0, 16, 24), (16, 40, 32, 40), (8, 12, 24, 32)])
@pytest.mark.parametrize("center", [(SIDE / 2, SIDE / 2), (SIDE - 12.0, 10.0), (3.0, SIDE - 2.0)])
@pytest.mark.parametrize("name", ["pan right", "zoom out", "roll left", "orbit left", "handheld"])
def test_a_crop_is_that_of_the_whole(name, center, crop):
    """Even where the view reaches beyond the picture, which is mirrored there."""
    view, course = replace(CENTRAL, center=center), EVEN
    course = SWAYING if name == "handheld" else course
    top, left, height, width = crop
    whole = render_move(thing(), view, MOVES[name], course, SIZE)
    part = render_move(thing(), view, MOVES[name], course, SIZE, crop)
    for found, expected in zip(part, whole, strict=True):
        torch.testing.assert_close(
            found, expected[..., top : top + height, left : left + width], atol=2e-3, rtol=0
        )


def test_a_hand_sways_as_the_course_says():
    _, displacement = of("handheld")
    for frame, (right, down, roll) in enumerate(SWAYING.sway.tolist()):
        mean = displacement[:, frame].mean(dim=(1, 2))
        expected = torch.tensor([right * SIZE[1], down * SIZE[0]]) * SWAY[0]
        torch.testing.assert_close(mean, expected, atol=1e-3, rtol=0)
        twist = displacement[1, frame, :, -1].mean() - displacement[1, frame, :, 0].mean()
        assert twist == pytest.approx((SIZE[1] - 1) * math.sin(SWAY[1] * roll), abs=1e-3)
    _, still = render_move(FLAT, CENTRAL, MOVES["static"], SWAYING, SIZE)
    assert (still == 0).all()


def test_a_mirrored_view_shows_the_mirrored_picture():
    mirrored = Scene(np.ascontiguousarray(smooth_picture()[:, ::-1]), None, None)
    for name in ("pan left", "roll right"):
        own = of(name, view=replace(CENTRAL, is_mirrored=True))
        other = of(name, mirrored)
        torch.testing.assert_close(own[0], other[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(own[1], other[1])


def test_a_still_camera_shows_one_frame():
    video, displacement = of("static")
    assert torch.equal(video, video[:, :1].expand_as(video))
    assert (displacement == 0).all()


def test_large_pictures_are_averaged_not_sampled():
    noise = np.random.default_rng(0).integers(0, 2, (SIDE, SIDE, 1)).repeat(3, axis=2) * 255
    scene = Scene(noise.astype(np.uint8), None, None)
    fine, coarse = (
        of("static", scene, replace(CENTRAL, scale=scale))[0].std() for scale in (1.0, 2.0)
    )
    assert coarse < 0.6 * fine


@settings(max_examples=50, deadline=None)
@given(
    picture=st.tuples(st.integers(64, 400), st.integers(64, 400)),
    frame=st.sampled_from([(96, 160), (160, 96), (128, 128)]),
    seed=st.integers(0, 1000),
)
def test_a_drawn_view_lies_in_the_picture(picture, frame, seed):
    view = draw_view(picture, frame, np.random.default_rng(seed))
    sides = [view.scale * side for side in frame]
    for side, center, whole in zip(sides, view.center[::-1], picture, strict=True):
        assert side / 2 <= center + 1e-6
        assert center + side / 2 <= whole + 1e-6
    largest = max(side / whole for side, whole in zip(sides, picture, strict=True))
    assert VIEW_SIDES[0] - 1e-6 <= largest <= VIEW_SIDES[1] + 1e-6


def test_drawn_views_are_mirrored_half_of_the_time():
    rng = np.random.default_rng(0)
    mirrored = sum(draw_view((100, 100), (50, 50), rng).is_mirrored for _ in range(200))
    assert 70 < mirrored < 130


@pytest.mark.slow
def test_the_thing_in_front_is_found_by_its_colours():
    y, x = np.mgrid[:240, :320]
    picture = np.stack([90 + y // 8, 110 + x // 8, 140 + y // 8], axis=-1).astype(np.uint8)
    grain = np.random.default_rng(0).normal(0, 6, picture.shape)
    picture = (picture + grain).clip(0, 255).astype(np.uint8)
    assert split_scene(picture).front is None  # nothing stands out
    disc = (x - 160) ** 2 + (y - 130) ** 2 < 45**2
    picture[disc] = (230, 40, 20)
    scene = split_scene(picture)
    assert scene.front is not None
    assert scene.behind is not None
    assert ((scene.front > 0.5) == disc).mean() > 0.98
    assert scene.behind[130, 160, 0] < 160  # filled with what surrounds it
    assert np.array_equal(scene.picture, picture)


def test_a_drawn_thing_stands_in_front_of_its_picture():
    picture, other = smooth_picture(), np.full((60, 90, 3), 255, np.uint8)
    for seed in range(5):
        scene = draw_thing(picture, other, np.random.default_rng(seed))
        assert scene.front is not None
        assert scene.behind is not None
        assert scene.picture.shape == scene.behind.shape == picture.shape
        assert np.array_equal(scene.behind, picture)
        is_front = scene.front > 0.999
        assert 0.005 < is_front.mean() < 0.6
        assert (scene.picture[is_front] == 255).all()
        assert np.array_equal(scene.picture[scene.front == 0], picture[scene.front == 0])


def test_scenes_are_no_larger_than_their_frames_need():
    pictures = [np.zeros((600, 1000, 3), np.uint8), np.zeros((100, 160, 3), np.uint8)]
    large, small = make_scenes(pictures, (96, 160))
    assert large.picture.shape == (211, 352, 3)
    assert small.picture.shape == (100, 160, 3)
