"""Photo files: opened within limits, and their pixels at the depth the file has."""

import io
import logging
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from swifti2v.errors import MediaError

logger = logging.getLogger(__name__)

_MAX_PIXELS = 256_000_000
# Raster formats whose header states the size of what is decoded; no PostScript, no icon sets.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM", "HEIF")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _EXTRA_SAMPLES = 258, 262, 338  # tags of a TIFF
_WHITE_IS_ZERO, _PREMULTIPLIED = 0, (1,)
_PNG_GREY_ALPHA = 4
_pillow_limit_lock = threading.Lock()


class Pixels(NamedTuple):
    """A decoded photo, in the colours of its file."""

    colours: Image.Image | NDArray[np.uint16]
    """8 bits: mode ``L``, ``RGB``, ``CMYK`` or ``LAB``. 16 bits: ``[H, W, C]``, C 1 or 3."""
    alpha: Image.Image | None
    """Mode ``L``, 0 where it is see-through; None for a photo that is not."""


@contextmanager
def open_photo(path: Path) -> Iterator[Image.Image]:
    """Open a still image; its pixels are not decoded yet.

    Raises:
        MediaError: It is animated, has more than 256 megapixels, or is HEIC and pillow-heif is
            not installed.
    """
    if _is_heic(path):
        _register_heic(path)
    # Pillow's own limit is lower than ours and partly a warning, so ours replaces it.
    with _pillow_limit_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            Image.init()
            image = Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN])
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        if image.width * image.height > _MAX_PIXELS:
            raise MediaError(
                f"image {path} is {image.width}x{image.height}, over "
                f"{_MAX_PIXELS // 1_000_000} megapixels; scale it down first"
            )
        _require_still(image, path)
        yield image


def _is_heic(path: Path) -> bool:
    with path.open("rb") as file:
        size, box = struct.unpack(">I4s", file.read(8).ljust(8))
        brands = file.read(min(size, 256) - 8) if box == b"ftyp" and size > 8 else b""
    return b"avif" not in brands and any(brand in brands for brand in _HEIC_BRANDS)


def _register_heic(path: Path) -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise MediaError(
            f"image {path} is HEIC, which needs pillow-heif ({error}): "
            "pip install 'swifti2v[heic]', or export the photo as JPEG"
        ) from None
    register_heif_opener()


def _require_still(image: Image.Image, path: Path) -> None:
    # MPO and HEIC are photos with previews or a second eye beside them: the main one is open.
    num_images = 1 if image.format in ("MPO", "HEIF") else getattr(image, "n_frames", 1)
    if num_images > 1:
        raise MediaError(
            f"image {path} holds {num_images} images (animated or many pages); "
            "save the one you want as a JPEG or PNG"
        )


def png_chunks(path: Path) -> dict[bytes, bytes]:
    """Chunks of a PNG before its pixels, by their four-letter names; those up to 64 bytes long."""
    chunks = {}
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name == b"IDAT":
                break
            if length <= 64:
                chunks[name] = file.read(length)
            file.seek(4 if length <= 64 else length + 4, io.SEEK_CUR)
    return chunks


def read_pixels(image: Image.Image, path: Path) -> Pixels:
    """Decode a photo, with all 16 bits where it has them.

    Args:
        image: From ``open_photo``.
        path: Its file.

    Raises:
        MediaError: It holds floating-point values or more than 16 bits.
    """
    image.load()
    if image.mode == "F":
        raise MediaError(f"image {path} holds floating-point values; save it as 8 or 16 bit")
    chunks = png_chunks(path) if image.format == "PNG" else {}
    depth, kind = chunks.get(b"IHDR", bytes(10))[8:10]
    values = _read_sixteen_bit(image, path, depth)
    if values is not None and kind == _PNG_GREY_ALPHA:  # both decoders make RGB of it
        values = values[..., :1]
    colours = _without_alpha(image) if values is None else values
    if not image.has_transparency_data:
        return Pixels(colours, None)
    key = chunks.get(b"tRNS", b"")
    if key and image.mode in ("1", "L", "RGB", "I;16"):
        return Pixels(colours, _alpha_of_key(colours, np.frombuffer(key, ">u2"), depth))
    return Pixels(colours, image.convert("RGBA").getchannel("A"))


def _without_alpha(image: Image.Image) -> Image.Image:
    if image.mode in ("1", "LA", "La"):
        return image.convert("LA").convert("L") if image.mode == "La" else image.convert("L")
    if image.mode == "RGBa":
        image = image.convert("RGBA")
    return image if image.mode in ("L", "RGB", "CMYK", "LAB") else image.convert("RGB")


def _alpha_of_key(
    colours: Image.Image | NDArray[np.uint16], key: NDArray[np.uint16], depth: int
) -> Image.Image:
    """A PNG may name one colour, at its own depth, that is see-through."""
    values = np.asarray(colours)
    if values.dtype == np.uint8:
        values, key = np.atleast_3d(values), key.astype(int) * 255 // (2**depth - 1)
    return Image.fromarray(np.where((values == key).all(axis=2), 0, 255).astype(np.uint8))


def _read_sixteen_bit(image: Image.Image, path: Path, png_depth: int) -> NDArray[np.uint16] | None:
    """``[H, W, C]``; None for a photo of 8 bits or fewer."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    if image.mode in _SIXTEEN_BIT:
        grey = np.asarray(image).astype(np.int64)[..., None]
        if grey.min() < 0 or grey.max() > 65535:
            raise MediaError(f"image {path} holds more than 16 bit a value; save it as 8 or 16 bit")
        most: int = 2 ** min(bits, 16) - 1
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            grey = most - grey
        return (grey * 65535 // most).astype(np.uint16)
    is_deep = png_depth == 16 or (image.format == "TIFF" and bits == 16)
    is_premultiplied = tags.get(_EXTRA_SAMPLES) == _PREMULTIPLIED
    if is_deep and image.mode in ("RGB", "RGBA") and not is_premultiplied:
        return _decode_sixteen_bit(image, path)
    return None


def _decode_sixteen_bit(image: Image.Image, path: Path) -> NDArray[np.uint16] | None:
    """Decode 16 bits, for which Pillow has no mode: it would keep only the upper 8."""
    level = cv2.utils.logging.setLogLevel(0)  # else a TIFF's private tags are named on stderr
    try:
        decoded = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        cv2.utils.logging.setLogLevel(level)
    if decoded is None or decoded.dtype != np.uint16 or decoded.shape[:2] != image.size[::-1]:
        logger.warning("%s: only the upper 8 of its 16 bits can be read", path)
        return None
    return np.asarray(decoded, np.uint16).reshape(*decoded.shape[:2], -1)[..., 2::-1]  # from BGR(A)
