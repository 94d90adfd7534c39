"""Camera motions move the picture the right way, and prompts name them."""

import json
from importlib import resources

import numpy as np
import pytest
import torch

from swifti2v.errors import ShapeError
from swifti2v.models.text import doubt_prompt
from swifti2v.training.camera_motion import (
    CAMERA_MOTIONS,
    PHRASES,
    SHIFT,
    ZOOM,
    CameraMotion,
    View,
    draw_prompt,
    draw_view,
    known_phrases,
    render_motion,
)
from tests.unit.test_text import known_to

CENTRAL = View(size=0.5, center=(0.0, 0.0))
SIZE = (32, 32)


def ramp() -> torch.Tensor:
    """``[3, 256, 256]``: red is the column, green the row, blue their product, in [-1, 1]."""
    axis = (torch.arange(256) + 0.5) / 128 - 1
    column, row = axis[None, :].expand(256, 256), axis[:, None].expand(256, 256)
    return torch.stack([column, row, column * row])


@pytest.mark.parametrize(
    ("motion", "column", "row"),
    [
        ("pan left", -1, 0),
        ("pan right", 1, 0),
        ("tilt up", 0, -1),
        ("tilt down", 0, 1),
        ("zoom in", 0, 0),
        ("zoom out", 0, 0),
        ("static", 0, 0),
    ],
)
def test_view_goes_where_the_motion_says(motion: CameraMotion, column: int, row: int) -> None:
    video = render_motion(ramp(), motion, [0.0, 0.5, 1.0], CENTRAL, SIZE)
    assert video.shape == (3, 3, *SIZE)
    seen = video[:2].mean(dim=(2, 3))  # [2, T], where the view's centre is
    # The view is 2 * 0.5 wide in the picture's coordinates.
    way = SHIFT * torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(seen[0], column * way, atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[1], row * way, atol=1e-3, rtol=0)
    spread = video[0].amax(dim=(1, 2)) - video[0].amin(dim=(1, 2))
    factor = {"zoom in": ZOOM, "zoom out": 1 / ZOOM}.get(motion, 1.0)
    torch.testing.assert_close(spread[2] / spread[0], torch.tensor(factor), atol=1e-2, rtol=0)


def test_a_still_camera_shows_one_frame() -> None:
    video = render_motion(torch.rand(3, 64, 64), "static", [0.0, 0.3, 1.0], CENTRAL, SIZE)
    assert torch.equal(video[:, 0], video[:, 1])
    assert torch.equal(video[:, 0], video[:, 2])


def test_all_motions_start_with_the_same_frame() -> None:
    image = torch.rand(3, 64, 64)
    first = [render_motion(image, m, [0.0, 1.0], CENTRAL, SIZE)[:, 0] for m in CAMERA_MOTIONS]
    for frame in first[1:]:
        torch.testing.assert_close(frame, first[0])


def test_drawn_views_leave_room_for_every_motion() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        view = draw_view(rng)
        # A pan or a zoom out widens what is needed by at most 1 / ZOOM.
        assert max(map(abs, view.center)) + view.size / ZOOM <= 1


def test_an_image_of_whole_numbers_is_refused() -> None:
    with pytest.raises(ShapeError, match="uint8"):
        render_motion(torch.zeros(3, 8, 8, dtype=torch.uint8), "static", [0.0], CENTRAL, SIZE)


def test_prompts_name_their_motion_and_no_other() -> None:
    rng = np.random.default_rng(0)
    for motion in CAMERA_MOTIONS:
        prompts = {draw_prompt(motion, rng) for _ in range(50)}
        assert len(prompts) > 20
        for prompt in prompts:
            assert any(phrase in prompt.lower() for phrase in PHRASES[motion])
    phrases = [phrase for motion in CAMERA_MOTIONS for phrase in PHRASES[motion]]
    assert len(set(phrases)) == len(phrases) == 8 * 7


def test_the_shipped_text_encoder_says_which_phrases_it_learned() -> None:
    shipped = resources.files("swifti2v") / "nano/text_encoder/config.json"
    motions = json.loads(shipped.read_text(encoding="utf-8"))["camera_motions"]
    assert motions == known_phrases()
    encoder, rng = known_to(motions), np.random.default_rng(0)
    for motion in CAMERA_MOTIONS:
        assert all(doubt_prompt(encoder, draw_prompt(motion, rng)) is None for _ in range(30))
