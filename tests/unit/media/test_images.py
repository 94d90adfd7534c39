import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from swifti2v.errors import MediaError, ShapeError
from swifti2v.media import contact_sheet, fit_image, image_to_tensor, load_image
from swifti2v.media.images import Fit

SIDES = st.integers(1, 90)


def photo(width: int = 40, height: int = 30) -> Image.Image:
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([columns, rows, columns[::-1]], -1).astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"IDAT"
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">I", zlib.crc32(body))
        + struct.pack(">I", 0)
        + end
        + struct.pack(">I", zlib.crc32(end))
    )


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm"])
def test_lossless_formats_come_back_exactly(tmp_path: Path, suffix: str) -> None:
    photo().save(tmp_path / f"a.{suffix}")
    loaded = load_image(tmp_path / f"a.{suffix}")
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(loaded, photo())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo().save(tmp_path / "a.png", exif=exif)
    pixels = np.asarray(photo())
    expected = [
        pixels,
        pixels[:, ::-1],
        pixels[::-1, ::-1],
        pixels[::-1],
        pixels.transpose(1, 0, 2),
        np.rot90(pixels, -1),
        pixels[::-1, ::-1].transpose(1, 0, 2),
        np.rot90(pixels, 1),
    ][orientation - 1]
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, 64 * 4).round().astype(np.uint16).reshape(4, 64)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    loaded = np.asarray(load_image(tmp_path / f"a.{suffix}"))
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(loaded, np.repeat(expected[..., None], 3, -1))


def test_sixteen_bit_rgb_is_scaled_not_clipped(tmp_path: Path) -> None:
    levels = np.array([0, 10_000, 30_000, 65_535], dtype=">u2")
    rows = b"\0" + np.repeat(levels[:, None], 3, 1).tobytes()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 4, 1, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    loaded = np.asarray(load_image(tmp_path / "a.png")).astype(int)
    assert np.abs(loaded[0, :, 0] - levels.astype(float) / 257).max() <= 1


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "tiff" if mode in ("CMYK", "YCbCr") else "png"
    source = photo().convert(mode)
    source.save(tmp_path / f"a.{suffix}")
    loaded = load_image(tmp_path / f"a.{suffix}")
    assert loaded.mode == "RGB"
    np.testing.assert_allclose(
        np.asarray(loaded).astype(int), np.asarray(source.convert("RGB")), atol=2
    )  # YCbCr rounds twice


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (250, 20, 30)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(np.asarray(load_image(tmp_path / "a.jpg")).mean((0, 1)) - [250, 20, 30]).max() < 4


def test_colour_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")  # swap these primaries
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    swapped = bytes(profile).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    for name, used in (("swapped.png", swapped), ("useless.png", b"no profile")):
        Image.new("RGB", (4, 4), (250, 20, 90)).save(tmp_path / name, icc_profile=used)
    converted = np.asarray(load_image(tmp_path / "swapped.png"))[0, 0].astype(int)
    assert np.abs(converted - [20, 250, 90]).max() <= 2  # 8-bit rounding in and out
    assert load_image(tmp_path / "useless.png").getpixel((0, 0)) == (250, 20, 90)


def test_alpha_is_refused_composed_or_dropped(tmp_path: Path) -> None:
    see_through = photo().convert("RGBA")
    see_through.putalpha(Image.new("L", see_through.size, 0))
    see_through.save(tmp_path / "a.png")
    with pytest.raises(MediaError, match=r"a\.png is partly see-through; name a colour"):
        load_image(tmp_path / "a.png")
    composed = load_image(tmp_path / "a.png", background=(1, 2, 3))
    assert composed.getcolors() == [(1200, (1, 2, 3))]

    photo().convert("RGBA").save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(load_image(tmp_path / "opaque.png"), photo())


def test_palette_transparency_counts_as_alpha(tmp_path: Path) -> None:
    photo().convert("P").save(tmp_path / "a.png", transparency=0)
    Image.new("P", (4, 4), 0).save(tmp_path / "b.gif", transparency=0)
    for name in ("a.png", "b.gif"):
        with pytest.raises(MediaError, match="see-through"):
            load_image(tmp_path / name)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_animations_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    photo().save(path, save_all=True, append_images=[photo().rotate(180)])
    with pytest.raises(MediaError, match=rf"a\.{suffix} holds 2 images"):
        load_image(path)


def test_giant_is_refused_from_its_header(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(20_000, 20_000))
    with pytest.raises(MediaError, match="20000x20000, over 256 megapixels; scale it down"):
        load_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(png_header(16_000, 15_999))  # passes; then has no data
    with pytest.raises(MediaError, match="damaged or cut off"):
        load_image(tmp_path / "b.png")


def test_a_file_that_is_not_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("hello")
    for name, reason in (("none.png", "exist"), ("empty.png", "0 bytes"), ("text.jpg", "not an")):
        with pytest.raises(MediaError, match=reason) as caught:
            load_image(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(MediaError, match="not a file"):
        load_image(tmp_path)


@given(kind=st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"]), data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damage_never_escapes_as_another_error(
    tmp_path: Path, kind: str, data: st.DataObject
) -> None:
    buffer = io.BytesIO()
    photo().save(buffer, format=kind)
    whole = bytearray(buffer.getvalue())
    cut = data.draw(st.integers(1, len(whole)), "cut")
    flipped = data.draw(st.integers(0, cut - 1), "flipped")
    whole[flipped] ^= data.draw(st.integers(0, 255), "mask")
    path = tmp_path / "a.img"
    path.write_bytes(whole[:cut])
    with contextlib.suppress(MediaError):
        assert load_image(path, background=(0, 0, 0)).mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_half_a_file_is_refused(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format=kind)
    (tmp_path / "a.img").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(MediaError, match="cut off"):
        load_image(tmp_path / "a.img")


@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(get_args(Fit)))
@settings(max_examples=60, deadline=None)
def test_fit_gives_the_asked_size(
    width: int, height: int, new_width: int, new_height: int, fit: Fit
) -> None:
    image, note = fit_image(photo(width, height), new_height, new_width, fit)
    assert (image.mode, image.size) == ("RGB", (new_width, new_height))
    if width * new_height == height * new_width:
        assert (note is None) == (new_width <= width)
    elif fit == "crop":
        assert note is not None
        assert f"{width}x{height}" in note
        assert f"{new_width}x{new_height}" in note


def test_fit_says_what_it_did() -> None:
    note = fit_image(Image.new("RGB", (4000, 3000)), 384, 640).note
    assert note == (
        "photo 4000x3000 scaled and cropped at the centre to 640x384: 20% of its height is lost"
    )
    assert fit_image(photo(1280, 768), 384, 640).note is None
    assert fit_image(photo(320, 192), 384, 640).note == (
        "photo 320x192 scaled to 640x384: it is enlarged 2.00x, so it stays soft"
    )
    assert fit_image(photo(400, 300), 300, 640, "pad").note == (
        "photo 400x300 scaled and padded to 640x300: 240 of its 640 columns are black bars"
    )


def test_crop_keeps_the_centre_and_pad_keeps_everything() -> None:
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, 20:40] = 255
    image = Image.fromarray(stripes)
    assert np.asarray(fit_image(image, 20, 20, "crop").image).min() == 255
    padded = np.asarray(fit_image(image, 60, 60, "pad").image)
    np.testing.assert_array_equal(padded[20:40], stripes)
    assert padded[:20].max() == padded[40:].max() == 0


def test_fit_refuses_what_cannot_be() -> None:
    with pytest.raises(ShapeError, match="0x10"):
        fit_image(photo(), 10, 0)
    with pytest.raises(MediaError, match="'stretch' is unknown"):
        fit_image(photo(), 10, 10, "stretch")  # type: ignore[arg-type]


def test_tensor_spans_minus_one_to_one() -> None:
    tensor = image_to_tensor(Image.fromarray(np.array([[[0, 255, 51]]], np.uint8)))
    assert tensor.shape == (1, 3, 1, 1, 1)
    torch.testing.assert_close(tensor.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


@pytest.mark.parametrize(("num_frames", "size"), [(1, (32, 16)), (3, (96, 16)), (81, (128, 32))])
def test_contact_sheet_shows_first_and_last(
    tmp_path: Path, num_frames: int, size: tuple[int, int]
) -> None:
    levels = np.linspace(0, 255, num_frames).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (num_frames, 16, 32, 3))
    contact_sheet(frames, tmp_path / "a.png")
    sheet = np.asarray(load_image(tmp_path / "a.png"))
    assert sheet.shape == (size[1], size[0], 3)
    assert (sheet[0, 0, 0], sheet[-1, -1, 0]) == (levels[0], levels[-1])


def test_contact_sheet_is_scaled_down_and_checked(tmp_path: Path) -> None:
    contact_sheet(np.zeros((8, 20, 40, 3), np.uint8), tmp_path / "a.png", max_width=80)
    assert load_image(tmp_path / "a.png").size == (80, 20)
    with pytest.raises(ShapeError, match="at least 1"):
        contact_sheet(np.zeros((0, 20, 40, 3), np.uint8), tmp_path / "b.png")
    with pytest.raises(MediaError, match="cannot be written"):
        contact_sheet(np.zeros((1, 20, 40, 3), np.uint8), tmp_path / "none" / "b.png")
