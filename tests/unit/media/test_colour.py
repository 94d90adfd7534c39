import logging
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.ExifTags import IFD, Base

from swifti2v.errors import MediaError
from swifti2v.media import load_image
from swifti2v.media.colour import make_profile

D65 = (0.3127, 0.3290)
SRGB = (D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3 = (D65, (0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
P3_TO_SRGB = [[1.22494, -0.22494, 0], [-0.04206, 1.04206, 0], [-0.01964, -0.07864, 1.09827]]
GAMA_LINEAR = (b"gAMA", struct.pack(">I", 100_000))
CICP_P3 = (b"cICP", bytes([12, 13, 0, 1]))


def encode(light: NDArray[Any]) -> NDArray[Any]:
    """Light, 0 to 1, as sRGB's numbers, 0 to 255."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def decode(numbers: NDArray[Any]) -> NDArray[Any]:
    values = numbers / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def loaded(path: Path) -> NDArray[Any]:
    return np.asarray(load_image(path)).astype(float)


def ramp(levels: int = 256, dtype: type = np.uint8) -> NDArray[Any]:
    """``[4, levels, 3]``: grey, then each colour against a constant."""
    rising: NDArray[Any] = np.linspace(0, np.iinfo(dtype).max, levels).astype(dtype)
    pixels = np.repeat(rising[None, :, None], 4, 0).repeat(3, 2)
    for channel in range(3):
        pixels[channel + 1, :, channel] = pixels[0, levels // 3, 0]
    return pixels


def linear_profile(space: bytes = b"RGB ") -> bytes:
    """sRGB's own profile, its name included, with numbers proportional to light."""
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    start = plain.index(b"para")
    curve = b"para" + bytes(8) + struct.pack(">i", 1 << 16)
    linear = plain[:start] + curve.ljust(32, b"\0") + plain[start + 32 :]
    assert b"\0s\0R\0G\0B" in linear
    return linear.replace(b"RGB ", space, 1).replace(
        b"rTRC", b"kTRC" if space == b"GRAY" else b"rTRC"
    )


def write_png(path: Path, pixels: NDArray[Any], *chunks: tuple[bytes, bytes]) -> Path:
    """A PNG of 8 or 16 bits, with chunks before its pixels."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[pixels.shape[2]]
    depth = 8 * pixels.itemsize
    rows = b"".join(b"\0" + row.astype(f">u{pixels.itemsize}").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], len(pixels), depth, kind, 0, 0, 0)
    return write_chunks(path, header, zlib.compress(rows), *chunks)


def write_chunks(path: Path, header: bytes, data: bytes, *chunks: tuple[bytes, bytes]) -> Path:
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in parts
        )
    )
    return path


def iccp(profile: bytes) -> tuple[bytes, bytes]:
    return b"iCCP", b"name\0\0" + zlib.compress(profile)


def write_tiff(
    path: Path, values: NDArray[np.uint16], bits: int, photometric: int, icc: bytes = b""
) -> Path:
    """An uncompressed TIFF of 16 bits a value; of ``bits`` where they are packed into ``values``."""
    height, width, channels = values.shape
    bits_place, icc_place = 8, 16
    data_place = icc_place + len(icc) + len(icc) % 2
    words = 1 if channels == 1 else 0
    entries = [
        (256, 3, 1, width if bits == 16 else width * 16 // bits),
        (257, 3, 1, height),
        (258, 3, channels, bits if words else bits_place),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, data_place),
        (277, 3, 1, channels),
        (278, 3, 1, height),
        (279, 4, 1, values.nbytes),
        *([(34675, 7, len(icc), icc_place)] if icc else []),
    ]
    table = struct.pack("<H", len(entries))
    for tag, kind, count, value in entries:
        table += (
            struct.pack("<HHIHH", tag, kind, count, value, 0)
            if kind == 3 and count == 1
            else (struct.pack("<HHII", tag, kind, count, value))
        )
    head = struct.pack("<2sHI", b"II", 42, data_place + values.nbytes)
    head += struct.pack("<4H", bits, bits, bits, 0) + icc.ljust(data_place - icc_place, b"\0")
    path.write_bytes(head + values.tobytes() + table + bytes(4))
    return path


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P"])
def test_a_profile_counts_by_its_content_not_by_its_name(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(ramp()).convert("L").convert(mode)
    image.save(tmp_path / "a.png", icc_profile=linear_profile())
    expected = encode(ramp()[0] / 255)
    assert np.abs(loaded(tmp_path / "a.png")[0] - expected).max() < 0.6  # rounding to 8 bits


def test_srgbs_own_profile_changes_nothing(tmp_path: Path) -> None:
    for profile in (
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        make_profile(SRGB, None),
    ):
        Image.fromarray(ramp()).save(tmp_path / "a.png", icc_profile=profile)
        np.testing.assert_array_equal(loaded(tmp_path / "a.png"), ramp())


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("space", [b"GRAY", b"RGB "])
def test_grey_is_converted_at_any_depth(
    tmp_path: Path, channels: int, dtype: type, space: bytes
) -> None:
    grey = ramp(dtype=dtype)[..., :1]
    pixels = np.concatenate([grey, np.full_like(grey, np.iinfo(dtype).max)], axis=2)[..., :channels]
    write_png(tmp_path / "a.png", pixels, iccp(linear_profile(space)))
    assert np.abs(loaded(tmp_path / "a.png") - encode(grey / np.iinfo(dtype).max)).max() < 1


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_rounded_after_the_conversion(
    tmp_path: Path, suffix: str, channels: int
) -> None:
    values = np.minimum(ramp(4096, np.uint16), 3000)[..., :channels]  # dark: 8 bits see 12 levels
    path = tmp_path / f"a.{suffix}"
    if suffix == "png":
        write_png(path, values, iccp(linear_profile()))
    else:
        write_tiff(path, values, 16, 1 if channels == 1 else 2, linear_profile())
    result = loaded(path)
    assert np.abs(result - encode(values / 65535)).max() < 1.5  # 0.5 before and after weighing
    assert len(np.unique(result[0])) == result[0].max() + 1 > 60


def test_numbers_of_a_wide_gamut_are_converted(tmp_path: Path) -> None:
    expected = encode(decode(ramp()) @ np.transpose(P3_TO_SRGB))
    Image.fromarray(ramp()).save(tmp_path / "icc.png", icc_profile=make_profile(DISPLAY_P3, None))
    write_png(tmp_path / "cicp.png", ramp(), CICP_P3)
    points = [round(100_000 * value) for point in DISPLAY_P3 for value in point]
    write_png(tmp_path / "chrm.png", ramp(), (b"cHRM", struct.pack(">8I", *points)))
    for name in ("icc", "cicp", "chrm"):
        assert np.abs(loaded(tmp_path / f"{name}.png") - expected).max() < 1, name


def test_avif_and_heic_say_their_colours_by_code_points(tmp_path: Path) -> None:
    flat = np.full((64, 64, 3), (180, 90, 60), np.uint8)
    Image.fromarray(flat).save(tmp_path / "srgb.avif", quality=100)
    srgb = (tmp_path / "srgb.avif").read_bytes()
    wide = srgb.replace(b"nclx\0\1\0\r", b"nclx\0\x0c\0\r")
    (tmp_path / "wide.avif").write_bytes(wide)
    write_heic(tmp_path / "srgb.heic", flat, 1, 13)
    write_heic(tmp_path / "wide.heic", flat, 12, 13)
    expected = encode(decode(flat) @ np.transpose(P3_TO_SRGB))
    for suffix in ("avif", "heic"):
        assert np.abs(loaded(tmp_path / f"srgb.{suffix}") - flat).max() < 4  # the codecs' loss
        assert np.abs(loaded(tmp_path / f"wide.{suffix}") - expected).max() < 5


def test_png_descriptions_overrule_each_other_in_the_standards_order(tmp_path: Path) -> None:
    pixels = ramp()
    linear = encode(pixels / 255)
    srgb = (b"sRGB", b"\0")
    write_png(tmp_path / "gamma.png", pixels, GAMA_LINEAR)
    write_png(
        tmp_path / "icc_over_gamma.png",
        pixels,
        (b"gAMA", struct.pack(">I", 70_000)),
        iccp(linear_profile()),
    )
    for name in ("gamma", "icc_over_gamma"):
        assert np.abs(loaded(tmp_path / f"{name}.png") - linear).max() < 1, name
    write_png(tmp_path / "srgb_over_gamma.png", pixels, GAMA_LINEAR, srgb)
    write_png(tmp_path / "usual_gamma.png", pixels, (b"gAMA", struct.pack(">I", 45_455)))
    write_png(
        tmp_path / "cicp_over_icc.png",
        pixels,
        (b"cICP", bytes([1, 13, 0, 1])),
        iccp(linear_profile()),
    )
    for name in ("srgb_over_gamma", "usual_gamma", "cicp_over_icc"):
        np.testing.assert_array_equal(loaded(tmp_path / f"{name}.png"), pixels, name)


def test_adobe_rgb_of_cameras_is_known_from_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(IFD.Exif)[IFD.Interop] = {1: "R03"}
    flat = Image.new("RGB", (32, 32), (100, 160, 60))
    flat.save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    adobe = (D65, (0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
    flat.save(tmp_path / "b.png", icc_profile=make_profile(adobe, 2.2))
    np.testing.assert_allclose(loaded(tmp_path / "a.jpg"), loaded(tmp_path / "b.png"), atol=2)
    assert loaded(tmp_path / "a.jpg")[0, 0, 0] < 80  # a green that sRGB has less red for


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_photos_are_refused(tmp_path: Path, transfer: int, name: str) -> None:
    flat = np.full((64, 64, 3), 148, np.uint8)
    write_png(
        tmp_path / "a.png", flat.astype(np.uint16) * 257, (b"cICP", bytes([9, transfer, 0, 1]))
    )
    Image.fromarray(flat).save(tmp_path / "srgb.avif")
    srgb = (tmp_path / "srgb.avif").read_bytes()
    (tmp_path / "a.avif").write_bytes(
        srgb.replace(b"nclx\0\1\0\r", bytes([*b"nclx\0\x09\0", transfer]))
    )
    write_heic(tmp_path / "a.heic", flat, 9, transfer)
    profile = make_profile(SRGB, None)  # with a tag of code points in the place of its white
    start = profile.index(b"XYZ \0\0\0\0", 128)
    said = profile[:start] + bytes([*b"cicp\0\0\0\0", 9, transfer]) + profile[start + 10 :]
    Image.fromarray(flat).save(tmp_path / "a.jpg", icc_profile=said.replace(b"wtpt", b"cicp", 1))
    for suffix in ("png", "avif", "heic", "jpg"):
        with pytest.raises(MediaError, match=rf"a\.{suffix} is HDR, transfer .*{name}.*as SDR"):
            load_image(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("profile", [b"no profile", linear_profile(b"CMYK")])
def test_a_profile_that_cannot_be_used_is_named(
    tmp_path: Path, profile: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    Image.fromarray(ramp()).save(tmp_path / "a.png", icc_profile=profile)
    write_png(tmp_path / "b.png", ramp(), (b"cHRM", bytes(32)))
    with caplog.at_level(logging.WARNING, "swifti2v"):
        for name in ("a.png", "b.png"):
            np.testing.assert_array_equal(loaded(tmp_path / name), ramp())
            assert name in caplog.text
            assert "read as sRGB" in caplog.text
            caplog.clear()


def test_lab_is_converted(tmp_path: Path) -> None:
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    Image.fromarray(ramp()).save(tmp_path / "rgb.png")
    to_lab.apply(Image.fromarray(ramp())).save(tmp_path / "a.tiff")
    assert np.abs(loaded(tmp_path / "a.tiff") - ramp()).mean() < 3  # 8 bits of Lab are coarse


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_grey_tiffs_of_any_depth_and_sense(tmp_path: Path, bits: int, white_is_zero: bool) -> None:
    levels = np.linspace(0, 2**bits - 1, 64).astype(np.uint16)
    expected = np.round(levels / (2**bits - 1) * 255)
    stored = 2**bits - 1 - levels if white_is_zero else levels
    if bits == 12:  # two values in three bytes
        first, second = stored[::2].astype(int), stored[1::2].astype(int)
        packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1)
        stored = np.frombuffer(packed.astype(np.uint8).tobytes(), np.uint16)
    write_tiff(tmp_path / "a.tiff", stored.reshape(1, -1, 1), bits, 0 if white_is_zero else 1)
    if bits == 12 and white_is_zero:  # Pillow has no reader for it
        with pytest.raises(MediaError, match="not an image that can be read"):
            load_image(tmp_path / "a.tiff")
        return
    assert np.abs(loaded(tmp_path / "a.tiff")[0, :, 0] - expected).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_one_colour_of_a_png_may_be_see_through(tmp_path: Path, channels: int, dtype: type) -> None:
    pixels = ramp(16, dtype)[:1, :, :channels]
    pixels[0, 7] += 1 if dtype is np.uint16 else 0  # differs from 6 in its lower byte too
    key = pixels[0, 7].astype(">u2").tobytes()
    write_png(tmp_path / "a.png", pixels, (b"tRNS", key))
    with pytest.raises(MediaError, match="partly see-through"):
        load_image(tmp_path / "a.png")
    result = np.asarray(load_image(tmp_path / "a.png", background=(1, 2, 3)))[0]
    assert [(pixel == (1, 2, 3)).all() for pixel in result] == [i == 7 for i in range(16)]


def test_a_see_through_grey_of_four_bits_is_found(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 4, 1, 4, 0, 0, 0, 0)
    write_chunks(tmp_path / "a.png", header, zlib.compress(b"\0\x05\xaf"), (b"tRNS", b"\0\x05"))
    result = np.asarray(load_image(tmp_path / "a.png", background=(9, 9, 9)))[0, :, 0]
    assert result.tolist() == [0, 9, 170, 255]


def write_heic(path: Path, pixels: NDArray[np.uint8], primaries: int, transfer: int) -> None:
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(
        path,
        quality=100,
        chroma=444,
        save_nclx_profile=True,
        color_primaries=primaries,
        transfer_characteristics=transfer,
        matrix_coefficients=6,
        full_range_flag=1,
    )


def test_heic_is_turned_once(tmp_path: Path) -> None:
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:24, :32] = 255  # in the top left corner
    exif = Image.Exif()
    exif[Base.Orientation] = 6  # to be turned clockwise
    pillow_heif.register_heif_opener()
    Image.fromarray(pixels).save(tmp_path / "a.heic", exif=exif.tobytes())
    with Image.open(tmp_path / "a.heic") as image:
        assert image.size == (64, 96)  # the decoder turns it, and EXIF said so too
        assert image.info["original_orientation"] == 6
    result = loaded(tmp_path / "a.heic")
    assert result.shape == (96, 64, 3)
    assert result[4, -4, 0] > 200
    assert result[-4, -4, 0] < 50


def test_heic_without_its_reader_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_heic(tmp_path / "a.heic", np.zeros((64, 64, 3), np.uint8), 1, 13)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(MediaError, match=r"a\.heic is HEIC.*pip install 'swifti2v\[heic\]'.*JPEG"):
        load_image(tmp_path / "a.heic")


def test_damaged_heic_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    write_heic(tmp_path / "whole.heic", noise, 1, 13)
    whole = (tmp_path / "whole.heic").read_bytes()
    for share in (0.02, 0.3, 0.9):
        (tmp_path / "a.heic").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(MediaError, match=r"a\.heic"):
            load_image(tmp_path / "a.heic")
