import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.errors import ShapeError
from swifti2v.shapes import (
    FrameSize,
    LatentShape,
    PixelShape,
    ScaleFactors,
    exact_size,
    size_of_aspect,
)

WAN22 = ScaleFactors(time=4, space=16, patch=2)


def test_the_2k_clip_has_the_published_latent_shape():
    latent = LatentShape.from_pixel_shape(PixelShape(81, 1408, 2560), WAN22, channels=48)
    assert latent == (48, 21, 88, 160)


@given(
    st.integers(0, 50), st.integers(1, 60), st.integers(1, 60),
    st.builds(ScaleFactors, st.sampled_from([4, 8]), st.sampled_from([8, 16]), st.sampled_from([1, 2])),
)  # fmt: skip
def test_pixels_to_latents_and_back(groups, rows, columns, scale):
    pixels = PixelShape(groups * scale.time + 1, rows * scale.side, columns * scale.side)
    latents = LatentShape.from_pixel_shape(pixels, scale, 16)
    back = (latents.num_frames - 1) * scale.time + 1
    assert (back, latents.height * scale.space, latents.width * scale.space) == pixels


@given(st.integers(1, 500), st.integers(1, 3000), st.integers(1, 3000))
def test_a_shape_fits_or_the_two_nearest_named_do(frames, height, width):
    pixels = PixelShape(frames, height, width)
    try:
        pixels.require_fit(WAN22)
    except ShapeError as error:
        *_, lower, _, upper = str(error).split()
        name = str(error).split()[0]
        for value in (int(lower), int(upper)):
            fitting = {"num_frames": 5, "height": 32, "width": 32} | {name: value}
            PixelShape(**fitting).require_fit(WAN22)
            assert abs(value - getattr(pixels, name)) <= 64
    else:
        assert (frames - 1) % 4 == 0
        assert height % 32 == width % 32 == 0


SIDES = st.integers(100, 5000)


@given(SIDES, SIDES, st.sampled_from([16, 32, 64]), st.sampled_from([4096, 245_760, 3_604_480]))
def test_a_photo_gives_a_size_of_its_aspect_within_the_pixels(height, width, multiple, most):
    size = size_of_aspect(FrameSize(height, width), multiple, most)
    assert size.height % multiple == size.width % multiple == 0
    assert multiple**2 <= size.num_pixels <= max(most, multiple**2)
    turned = size_of_aspect(FrameSize(width, height), multiple, most)
    assert turned.num_pixels == size.num_pixels
    if 1 / 3 <= height / width <= 3 and most >= 60 * multiple**2:
        kept = size.width * height / (size.height * width)
        assert min(kept, 1 / kept) > 0.82  # of 60 cells; a photo of 2.8:1 keeps .857
        assert size.num_pixels > 0.7 * most
        assert (height > width) <= (size.height >= size.width)


def test_usual_photos_give_usual_sizes():
    nano, paper = (16, 640 * 384), (64, 2560 * 1408)
    sizes = {
        (4032, 3024, nano): (560, 432),
        (3024, 4032, nano): (432, 560),
        (384, 640, nano): (384, 640),
        (2160, 3840, paper): (1408, 2496),
        (1408, 2560, paper): (1408, 2560),
        (2560, 1408, paper): (2560, 1408),
        (1000, 1000, paper): (1856, 1856),
    }
    for (height, width, (multiple, most)), size in sizes.items():
        assert size_of_aspect(FrameSize(height, width), multiple, most) == size


def test_one_side_that_is_given_is_kept_and_the_other_follows():
    phone = FrameSize(4032, 3024)
    assert size_of_aspect(phone, 64, 1, width=640) == (832, 640)
    assert size_of_aspect(phone, 64, 1, height=640) == (640, 512)
    assert size_of_aspect(phone, 64, 1, height=70, width=999) == (70, 999)
    with pytest.raises(ShapeError, match="size 0 is too small"):
        size_of_aspect(phone, 64, 1, width=0)


@given(SIDES, SIDES, st.sampled_from([16, 32]))
def test_an_exact_size_has_exactly_the_aspect_and_none_larger_fits(height, width, multiple):
    size = exact_size(FrameSize(height, width), multiple, 640 * 384)
    smallest = exact_size(FrameSize(height, width), multiple, (height * width * multiple) ** 2)
    assert smallest is not None
    if size is None:
        assert all(
            (rows * width) % height or (rows * width // height) % multiple
            for rows in range(multiple, 640 * 384 // multiple + 1, multiple)
            if rows * rows * width <= 640 * 384 * height
        )
        return
    assert size.height * width == size.width * height
    assert size.height % multiple == size.width % multiple == 0
    assert size.num_pixels <= 640 * 384


def test_an_exact_size_of_a_usual_clip():
    assert exact_size(FrameSize(720, 1280), 32, 2560 * 1408) == (1152, 2048)
    assert exact_size(FrameSize(192, 320), 16, 640 * 384) == (384, 640)
    assert exact_size(FrameSize(719, 1280), 32, 2560 * 1408) is None
