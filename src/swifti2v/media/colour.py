"""Colours of a photo: what its file says that its numbers mean, and their conversion to sRGB.

Whatever a file says becomes an ICC profile, so that littleCMS converts all of them.
"""

import io
import logging
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.ExifTags import IFD

from swifti2v.errors import MediaError
from swifti2v.media.photo_files import png_chunks

logger = logging.getLogger(__name__)

HDR_TRANSFERS = {16: "smpte2084 (PQ)", 18: "arib-std-b67 (HLG)"}
"""Code points of high dynamic range: ITU-T H.273, table 3."""

Chromaticities = Sequence[tuple[float, float]]
"""CIE xy of white, red, green and blue."""

_D65 = (0.3127, 0.3290)
_SRGB: Chromaticities = (_D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
_ADOBE_RGB: Chromaticities = (_D65, (0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
_PRIMARIES: dict[int, Chromaticities] = {  # ITU-T H.273, table 2
    1: _SRGB,
    5: (_D65, (0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),
    6: (_D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    9: (_D65, (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    11: ((0.314, 0.351), (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    12: (_D65, (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0}  # H.273, table 3; video's curves are shown as sRGB's
_ADOBE_GAMMA = 563 / 256
_SRGB_GAMMA = (0.45, 0.46)
"""PNG writers say 0.45455 for sRGB's own curve, which the format can only name approximately."""
_D50 = (0.9642, 1.0, 0.8249)  # white of all ICC profiles
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
_BAND = 64  # rows converted at a time, to bound memory


class Coding(NamedTuple):
    """Code points of ITU-T H.273, as files carry them."""

    primaries: int
    """Table 2."""
    transfer: int
    """Table 3."""


def find_profile(image: Image.Image, path: Path) -> bytes | None:
    """ICC profile of a photo's colours, also where the file describes them in another way.

    The file's own descriptions count in this order: a PNG's ``cICP``, an ICC profile, a PNG's
    ``sRGB`` or its ``gAMA`` and ``cHRM``, the code points of AVIF and HEIC, EXIF's Adobe RGB.

    Args:
        image: As opened; nothing needs to be decoded.
        path: Its file.

    Returns:
        The profile; None for sRGB.

    Raises:
        MediaError: The photo is HDR (PQ or HLG).
    """
    embedded: bytes | None = image.info.get("icc_profile")
    coding = _read_coding(image, path)
    for said in (coding, _coding_of_profile(embedded or b"")):
        if said is not None and said.transfer in HDR_TRANSFERS:
            raise MediaError(
                f"image {path} is HDR, transfer {HDR_TRANSFERS[said.transfer]}; "
                "export it as SDR (sRGB) first"
            )
    if image.format == "PNG":
        if coding is not None:
            return _profile_of_coding(coding, path)
        return embedded or _profile_of_png(image, path)
    if embedded:
        return embedded
    if coding is not None:
        return _profile_of_coding(coding, path)
    if image.getexif().get_ifd(IFD.Interop).get(1) == "R03":  # DCF's optional colour space
        return make_profile(_ADOBE_RGB, _ADOBE_GAMMA)
    return None


def _read_coding(image: Image.Image, path: Path) -> Coding | None:
    if image.format == "PNG":
        cicp = png_chunks(path).get(b"cICP", b"")
        return Coding(cicp[0], cicp[1]) if len(cicp) == 4 else None
    if image.format == "HEIF":
        nclx = image.info.get("nclx_profile")
        return nclx and Coding(nclx["color_primaries"], nclx["transfer_characteristics"])
    if image.format == "AVIF":
        try:
            with path.open("rb") as file, av.open(file) as container:
                context = container.streams.video[0].codec_context
                return Coding(context.color_primaries, context.color_trc)
        except (av.FFmpegError, IndexError) as error:
            logger.warning(
                "%s: its colours are not described, so they count as sRGB (%s)", path, error
            )
    return None


def _coding_of_profile(profile: bytes) -> Coding | None:
    """Code points in an ICC profile's own ``cicp`` tag (ICC.1:2022, 9.2.17)."""
    table = profile[132 : 132 + 12 * int.from_bytes(profile[128:132], "big")]
    for entry in range(0, len(table), 12):
        if table[entry : entry + 4] == b"cicp":
            start = int.from_bytes(table[entry + 4 : entry + 8], "big") + 8
            if start + 2 <= len(profile):
                return Coding(*profile[start : start + 2])
    return None


def _profile_of_coding(coding: Coding, path: Path) -> bytes | None:
    unspecified = 2
    primaries = _PRIMARIES.get(1 if coding.primaries == unspecified else coding.primaries)
    if primaries is None:
        logger.warning("%s: its primaries (%d) count as sRGB's", path, coding.primaries)
        primaries = _SRGB
    gamma = _GAMMAS.get(coding.transfer)
    return None if primaries is _SRGB and gamma is None else make_profile(primaries, gamma)


def _profile_of_png(image: Image.Image, path: Path) -> bytes | None:
    """Profile made from ``gAMA`` and ``cHRM``, which an ``sRGB`` chunk overrules."""
    if "srgb" in image.info:
        return None
    exponent, points = image.info.get("gamma"), image.info.get("chromaticity")
    chromaticities = _SRGB if points is None else list(zip(points[::2], points[1::2], strict=True))
    gamma = 1 / exponent if exponent and not _SRGB_GAMMA[0] < exponent < _SRGB_GAMMA[1] else None
    if gamma is None and np.allclose(chromaticities, _SRGB, atol=2e-3):
        return None
    try:
        return make_profile(chromaticities, gamma)
    except (ZeroDivisionError, np.linalg.LinAlgError, struct.error):
        logger.warning("%s: its gAMA or cHRM describes no colours, so it is read as sRGB", path)
        return None


def make_profile(chromaticities: Chromaticities, gamma: float | None) -> bytes:
    """An ICC profile of a display with three primaries.

    Args:
        chromaticities: CIE xy of white, red, green and blue.
        gamma: Exponent from numbers to light; None for sRGB's curve.

    Source:
        ICC.1:2022 (format, D50 and the Bradford matrix), IEC 61966-2-1 (sRGB's curve).
    """
    white, *corners = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in chromaticities)
    columns = np.stack(corners, axis=1)
    columns = columns * np.linalg.solve(columns, white)  # together they are the white
    cones = np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white))
    columns = np.linalg.inv(_BRADFORD) @ cones @ _BRADFORD @ columns
    kind, numbers = (
        (0, [gamma]) if gamma else (3, [2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045])
    )
    curve = b"para" + struct.pack(">IHH", 0, kind, 0) + _fixed(numbers)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + _fixed(_D50)}
    for letter, column in zip(b"rgb", columns.T, strict=True):
        tags[bytes([letter]) + b"XYZ"] = b"XYZ \0\0\0\0" + _fixed(column)
        tags[bytes([letter]) + b"TRC"] = curve
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value
    head = struct.pack(
        ">I4xI4s4s4s12x4s", start + len(body), 0x04200000, b"mntr", b"RGB ", b"XYZ ", b"acsp"
    )
    head = head.ljust(68, b"\0") + _fixed(_D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _fixed(numbers: Sequence[float] | NDArray[np.float64]) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def to_srgb(
    colours: Image.Image | NDArray[np.uint16], profile: bytes | None, path: Path
) -> Image.Image:
    """Convert colours to sRGB with 8 bits.

    Args:
        colours: Mode ``L``, ``RGB``, ``CMYK`` or ``LAB``; or ``[H, W, C]`` with C 1 (grey) or 3,
            which are rounded after the conversion.
        profile: See ``find_profile``. One that does not fit is named in a warning and ignored.
        path: Named there.

    Returns:
        Mode RGB.
    """
    if isinstance(colours, Image.Image):
        if colours.mode == "L" and _is_rgb(profile):
            colours = colours.convert("RGB")
        transform = _transform(profile, colours.mode, path)
        return transform.apply(colours) if transform else colours.convert("RGB")
    if colours.shape[2] == 1 and _is_rgb(profile):
        colours = colours.repeat(3, axis=2)
    transform = _transform(profile, "L" if colours.shape[2] == 1 else "RGB", path)
    bands = [
        _round(band) if transform is None else _interpolate(band, transform)
        for band in np.split(colours, range(_BAND, len(colours), _BAND))
    ]
    return _to_image(np.concatenate(bands)).convert("RGB")


def _is_rgb(profile: bytes | None) -> bool:
    return profile is not None and profile[16:20] == b"RGB "


def _transform(profile: bytes | None, mode: str, path: Path) -> ImageCms.ImageCmsTransform | None:
    target = ImageCms.createProfile("sRGB")
    try:
        if mode == "LAB":
            return ImageCms.buildTransform(ImageCms.createProfile("LAB"), target, mode, "RGB")
        if profile is not None:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            # littleCMS would replace the curve of a grey profile by too few points.
            flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
            return ImageCms.buildTransform(source, target, mode, "RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        logger.warning(
            "%s: its colour profile cannot be used (%s); it is read as sRGB", path, error
        )
    return None


def _round(values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _interpolate(
    values: NDArray[np.uint16], transform: ImageCms.ImageCmsTransform
) -> NDArray[np.uint8]:
    """Pillow's littleCMS takes 8 bits: convert the 8-bit colours around, and weigh them.

    Interpolation is in tetrahedra, as littleCMS itself does between the points of a table.
    """
    low, rest = np.divmod(values.astype(np.int32), 257)
    falling = -np.sort(-rest, axis=2)  # [H, W, C]
    steps = np.pad(falling, ((0, 0), (0, 0), (1, 1)), constant_values=((0, 0), (0, 0), (257, 0)))
    mixed = np.full((*values.shape[:2], 3), 128, np.int32)
    for corner in range(values.shape[2] + 1):  # from the lowest to the highest one
        is_up = rest >= steps[..., corner, None]
        colours = transform.apply(_to_image(np.minimum(low + is_up, 255).astype(np.uint8)))
        mixed += (steps[..., corner] - steps[..., corner + 1])[..., None] * np.asarray(colours)
    return (mixed // 257).astype(np.uint8)


def _to_image(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
