"""A camera that moves over pictures: where it looks, how it moves, and what it shows."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.training.camera_motion import CAMERA_MOTIONS, SHIFT, ZOOM, CameraMotion
from swifti2v.training.moving_pictures import (
    MAX_SHIFT,
    MAX_ZOOM,
    NUM_FRAMES,
    CameraPath,
    draw_motion_path,
    draw_path,
    render_path,
)

FRAME = (32, 48)
WHOLE = (0, 0, *FRAME)
CENTERED = CameraPath(center=(100.0, 100.0), scale=1.0)


def coordinates(height: int = 200, width: int = 200) -> np.ndarray:
    """Red tells the column, green the row."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.arange(width)
    picture[..., 1] = np.arange(height)[:, None]
    return picture


def render(path: CameraPath, *frames: float, picture: np.ndarray | None = None) -> torch.Tensor:
    """Grey levels ``[3, T, H, W]``."""
    own = coordinates() if picture is None else picture
    return (render_path(own, path, frames, FRAME, WHOLE) + 1) * 127.5


sizes = st.tuples(st.integers(20, 400), st.integers(20, 400))


@settings(max_examples=60, deadline=None)
@given(picture_size=sizes, seed=st.integers(0, 1000))
def test_the_first_frame_lies_within_the_picture(picture_size, seed):
    path = draw_path(picture_size, FRAME, np.random.default_rng(seed))
    column, row = path.center
    for center, side, shown in zip((row, column), picture_size, FRAME, strict=True):
        half = path.scale * shown / 2
        assert center - half >= -1e-6
        assert center + half <= side + 1e-6
    assert path.scale >= min(
        1.0, 0.8 * min(a / b for a, b in zip(picture_size, FRAME, strict=True))
    )
    assert abs(path.pan) <= MAX_SHIFT * FRAME[1]
    assert abs(path.tilt) <= MAX_SHIFT * FRAME[0]
    assert abs(path.zoom) <= MAX_ZOOM


def test_all_kinds_of_paths_are_drawn():
    rng = np.random.default_rng(0)
    paths = [draw_path((300, 300), FRAME, rng) for _ in range(100)]
    kinds = {(path.pan != 0, path.tilt != 0, path.zoom != 0) for path in paths}
    alone = {(True, False, False), (False, True, False), (False, False, True)}
    assert kinds == alone | {(True, True, True), (False, False, False)}


def test_a_resting_camera_shows_the_picture_itself():
    seen = render(CENTERED, 0, 16)
    torch.testing.assert_close(seen[0, 0], torch.arange(76.0, 124).expand(32, 48), atol=0.1, rtol=0)
    torch.testing.assert_close(seen[1, 0, :, 0], torch.arange(84.0, 116), atol=0.1, rtol=0)
    torch.testing.assert_close(seen[:, 1], seen[:, 0])


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_pan_tilt_and_zoom_move_as_told(scale):
    path = CameraPath(center=(100.0, 100.0), scale=scale, pan=8.0, tilt=-4.0)
    seen = render(path, 0, NUM_FRAMES - 1)
    moved = (seen[:, 1] - seen[:, 0])[:, 4:-4, 4:-4]
    torch.testing.assert_close(moved[0], torch.full_like(moved[0], 8 * scale), atol=0.1, rtol=0)
    torch.testing.assert_close(moved[1], torch.full_like(moved[1], -4 * scale), atol=0.1, rtol=0)
    zoomed = render(CameraPath(center=(100.0, 100.0), scale=scale, zoom=-0.3), 0, NUM_FRAMES - 1)
    steps = zoomed[0, :, 16, 20:28].diff(dim=1).mean(dim=1)
    assert float(steps[0]) == pytest.approx(scale, abs=0.05)
    assert float(steps[1]) == pytest.approx(scale * math.exp(-0.3), abs=0.05)


def test_half_the_frames_move_half_as_far():
    seen = render(CameraPath(center=(100.0, 100.0), scale=1.0, pan=8.0), 0, (NUM_FRAMES - 1) / 2)
    assert float((seen[0, 1] - seen[0, 0])[16, 24]) == pytest.approx(4, abs=0.1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), top=st.integers(0, 16), left=st.integers(0, 32))
def test_a_crop_is_a_part_of_the_frame(seed, top, left):
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (90, 120, 3)).astype(np.uint8)
    path = draw_path((90, 120), FRAME, rng)
    frames = [0, 9, 40]
    whole = render_path(picture, path, frames, FRAME, WHOLE)
    part = render_path(picture, path, frames, FRAME, (top, left, 16, 16))
    expected = whole[:, :, top : top + 16, left : left + 16]
    assert part.shape == (3, 3, 16, 16)
    torch.testing.assert_close(part, expected, atol=2e-2, rtol=0)
    assert part.abs().max() <= 1


def test_large_pictures_are_averaged_and_edges_mirrored():
    checkered = np.indices((400, 400)).sum(axis=0) % 2 * 255
    picture = np.repeat(checkered[..., None], 3, axis=2).astype(np.uint8)
    seen = render(CameraPath(center=(200.0, 200.0), scale=3.0), 0, picture=picture)
    assert 60 < seen.min() < seen.max() < 200
    corner = render(CameraPath(center=(0.0, 100.0), scale=1.0), 0)  # half of it is outside
    torch.testing.assert_close(corner[0, 0, :, :24].flip(-1), corner[0, 0, :, 24:], atol=1, rtol=0)


def test_small_pictures_are_enlarged():
    seen = render(draw_path((16, 16), FRAME, np.random.default_rng(0)), 0, 32,
                  picture=coordinates(16, 16))  # fmt: skip
    assert seen.shape == (3, 2, *FRAME)
    assert seen[0].max() <= 16


@pytest.mark.parametrize("motion", get_args(CameraMotion))
def test_motions_that_a_prompt_asks_for(motion):
    path = draw_motion_path(motion, (200, 200), FRAME, np.random.default_rng(1))
    start = draw_path((200, 200), FRAME, np.random.default_rng(1))
    assert (path.center, path.scale) == (start.center, start.scale)
    expected = {
        "pan left": (-SHIFT * FRAME[1], 0, 0),
        "pan right": (SHIFT * FRAME[1], 0, 0),
        "tilt up": (0, -SHIFT * FRAME[0], 0),
        "tilt down": (0, SHIFT * FRAME[0], 0),
        "zoom in": (0, 0, math.log(ZOOM)),
        "zoom out": (0, 0, -math.log(ZOOM)),
        "static": (0, 0, 0),
    }
    assert expected.keys() == set(CAMERA_MOTIONS)
    assert (path.pan, path.tilt, path.zoom) == expected[motion]
