"""Flow from a small frame to a large picture: finer than flow between two small ones."""

from typing import Any

import cv2
import numpy as np
import pytest

from swifti2v.media import downscale
from swifti2v.media.flow import FIT_LIMIT, NUM_FITS, fit_flow, optical_flow
from tests.helpers.evaluation_clips import texture

SCALE, HEIGHT, WIDTH = 4, 160, 240
INNER = (slice(6, -6), slice(6, -6))


def grey(frame: Any) -> Any:
    return cv2.cvtColor(frame.astype(np.float32), cv2.COLOR_RGB2GRAY)


def shifted(right: int, down: int) -> tuple[Any, Any, Any]:
    """A picture and, small, what a camera sees that has moved so; pixels of the large one."""
    picture = texture(HEIGHT + 16, WIDTH + 16)
    large = picture[8:-8, 8:-8]
    moved = picture[8 + down : HEIGHT + 8 + down, 8 + right : WIDTH + 8 + right]
    small = downscale(np.stack([large, moved]), SCALE)
    return grey(large), small[0], small[1]


def error(flow: Any, right: int, down: int) -> float:
    true = np.array([right, down], np.float32) / SCALE
    return float(np.linalg.norm(flow - true, axis=-1)[INNER].mean())


@pytest.mark.parametrize(("right", "down"), [(1, 0), (2, 1), (3, -2), (6, 5)])
def test_it_is_closer_than_flow_between_small_frames(right, down):
    large, first, frame = shifted(right, down)
    found = optical_flow(frame, first, "fine")
    fitted = fit_flow(grey(frame), large, found)
    assert error(fitted, right, down) < 0.5 * error(found, right, down)
    assert error(fitted, right, down) < 0.05


def test_the_grid_of_the_flow_is_kept_and_so_is_what_it_was_given():
    large, _, frame = shifted(2, 1)
    start = np.zeros((2 * HEIGHT // SCALE, 2 * WIDTH // SCALE, 2), np.float32)
    fitted = fit_flow(grey(frame), large, start)
    assert fitted.shape == start.shape
    assert not start.any()
    true = np.array([2, 1], np.float32) / SCALE
    assert np.linalg.norm(fitted - true, axis=-1)[12:-12, 12:-12].mean() < 0.1


def test_brightness_moves_nothing():
    large, _, frame = shifted(2, 1)
    start = np.zeros((HEIGHT // SCALE, WIDTH // SCALE, 2), np.float32)
    same, brighter = (fit_flow(grey(frame) + more, large, start) for more in (0, 5))
    # A brighter frame looks a little less like the picture, so places weigh otherwise.
    assert np.abs(same - brighter)[INNER].mean() < 0.03
    flat = np.full_like(large, 80)
    assert not fit_flow(
        np.full((HEIGHT // SCALE, WIDTH // SCALE), 90, np.float32), flat, start
    ).any()


def test_another_picture_moves_a_point_by_the_limit_at_most():
    large, _, frame = shifted(0, 0)
    start = np.zeros((HEIGHT // SCALE, WIDTH // SCALE, 2), np.float32)
    fitted = fit_flow(255 - grey(frame), large, start)
    assert np.abs(fitted).max() <= NUM_FITS * FIT_LIMIT + 1e-5
    assert np.abs(fitted).mean() < 0.1
