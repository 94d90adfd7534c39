import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from swifti2v.errors import ShapeError
from swifti2v.media import downscale, frames_to_video, resize_video, video_to_frames
from swifti2v.media.resize import ResizeMode

SIDES = st.integers(1, 70)
MODES = st.sampled_from(["lanczos", "bicubic", "bilinear", "area"])
PILLOW: dict[ResizeMode, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(list(PILLOW)))
@settings(max_examples=60, deadline=None)
def test_equals_pillow_on_floats(
    height: int, width: int, new_height: int, new_width: int, mode: ResizeMode
) -> None:
    video = noise(1, 3, 1, height, width)
    resized = resize_video(video, new_height, new_width, mode)
    for channel in range(3):
        image = Image.fromarray(video[0, channel, 0].numpy())
        expected = np.asarray(image.resize((new_width, new_height), PILLOW[mode]))
        # float32 sums of up to 400 terms
        np.testing.assert_allclose(resized[0, channel, 0], expected, atol=1e-5)


@pytest.mark.parametrize("mode", list(PILLOW))
@pytest.mark.parametrize("size", [(96, 160), (20, 44)])
def test_equals_pillow_within_a_level_on_photos(mode: ResizeMode, size: tuple[int, int]) -> None:
    columns, rows = np.meshgrid(np.linspace(0, 9, 80), np.linspace(0, 7, 48))
    waves = np.stack([np.sin(columns), np.cos(rows), np.sin(columns * rows / 4)], -1)
    frame = (waves * 100 + 127).astype(np.uint8)
    resized = video_to_frames(resize_video(frames_to_video(frame[None]), size[0], size[1], mode))[0]
    expected = np.asarray(Image.fromarray(frame).resize(size[::-1], PILLOW[mode]))
    assert np.abs(resized.astype(int) - expected).max() <= 1  # Pillow rounds between its passes


@given(MODES, st.integers(1, 6), st.data())
@settings(max_examples=40, deadline=None)
def test_a_piece_is_bit_equal_to_the_whole(
    mode: ResizeMode, num_frames: int, data: st.DataObject
) -> None:
    video = noise(2, 3, num_frames, 45, 80)
    start = data.draw(st.integers(0, num_frames - 1))
    stop = data.draw(st.integers(start + 1, num_frames))
    whole = resize_video(video, 88, 160, mode)
    piece = resize_video(video[1:, :, start:stop], 88, 160, mode)
    assert torch.equal(piece, whole[1:, :, start:stop])


@given(MODES, SIDES, SIDES)
@settings(max_examples=40, deadline=None)
def test_a_constant_stays_constant(mode: ResizeMode, height: int, width: int) -> None:
    video = torch.full((1, 3, 1, 12, 20), 0.37)
    resized = resize_video(video, height, width, mode)
    torch.testing.assert_close(resized, torch.full((1, 3, 1, height, width), 0.37))


def test_area_halving_is_the_mean_of_four() -> None:
    video = noise(1, 3, 2, 8, 10)
    expected = video.view(1, 3, 2, 4, 2, 5, 2).mean((4, 6))
    torch.testing.assert_close(resize_video(video, 4, 5, "area"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept_and_input_unchanged(dtype: torch.dtype) -> None:
    video = noise(1, 3, 2, 8, 10).to(dtype)
    before = video.clone()
    resized = resize_video(video, 16, 20)
    assert resized.dtype == dtype
    assert torch.equal(video, before)
    same = resize_video(video, 8, 10)
    assert torch.equal(same, video)
    assert same.data_ptr() != video.data_ptr()


def test_resize_refuses_what_cannot_be() -> None:
    video = noise(1, 3, 1, 8, 8)
    with pytest.raises(ShapeError, match="0x8"):
        resize_video(video, 8, 0)
    with pytest.raises(ShapeError, match="'nearest' is unknown"):
        resize_video(video, 4, 4, "nearest")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="floats"):
        resize_video(video[0], 4, 4)


def test_frames_round_trip_exactly() -> None:
    frames = np.arange(256, dtype=np.uint8).reshape(2, 8, 16, 1).repeat(3, -1)
    video = frames_to_video(frames)
    assert video.shape == (1, 3, 2, 8, 16)
    assert video.min() == -1
    assert video.max() == 1
    np.testing.assert_array_equal(video_to_frames(video), frames)


def test_video_is_clamped_and_rounded() -> None:
    video = torch.tensor([-3.0, 1.7, 0.6 / 127.5 - 1]).view(1, 3, 1, 1, 1)
    assert video_to_frames(video).tolist() == [[[[0, 255, 1]]]]


def test_edges_refuse_other_layouts() -> None:
    with pytest.raises(ShapeError, match="float32"):
        frames_to_video(np.zeros((1, 2, 2, 3), np.float32))
    with pytest.raises(ShapeError, match=r"\(3, 1, 2, 2\)"):
        video_to_frames(torch.zeros(3, 1, 2, 2))


def test_downscale_takes_means_and_refuses_sides_that_do_not_divide():
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    frames[1, :4, 4:] = 40
    frames[1, 0, 4] = 56  # 41 on average
    low = downscale(frames, 4)
    assert low.shape == (2, 2, 2, 3)
    assert low[1, :, :, 0].tolist() == [[0, 41], [0, 0]]
    with pytest.raises(ShapeError, match="8x8 cannot be divided by 3"):
        downscale(frames, 3)
