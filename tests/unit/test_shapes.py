from hypothesis import given
from hypothesis import strategies as st

from swifti2v.errors import ShapeError
from swifti2v.shapes import LatentShape, PixelShape, ScaleFactors

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
    assert LatentShape.from_pixel_shape(pixels, scale, 16).to_pixel_shape(scale) == pixels


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
