"""Photos: read any common file into plain RGB, fit it to a size, turn it into a tensor."""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base

from swifti2v.errors import MediaError, ShapeError
from swifti2v.media.colour import find_profile, to_srgb
from swifti2v.media.photo_files import open_photo, read_pixels

Fit = Literal["crop", "pad"]


class FittedImage(NamedTuple):
    """An image of the requested size, and a note on the changes."""

    image: Image.Image
    """RGB."""
    note: str | None
    """One sentence for the user; None where nothing was lost, added or enlarged."""


def load_image(path: str | Path, *, background: tuple[int, int, int] | None = None) -> Image.Image:
    """Read a photo as 8-bit RGB, upright and in sRGB.

    Orientation is applied. Colours are converted to sRGB by the file's own description (see
    ``swifti2v.media.colour``), 16-bit values before they are rounded; palette, greyscale and CMYK
    become RGB.

    Args:
        path: A still image (JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF, JPEG 2000 or PPM; HEIC where
            pillow-heif is installed).
        background: RGB colour, 0 to 255, to put behind a see-through image. None refuses one.

    Returns:
        The image, mode RGB.

    Raises:
        MediaError: The file is missing, empty, damaged, animated, HDR, see-through without a
            ``background``, or has more than 256 megapixels (checked before decoding).
    """
    path = Path(path)
    if not path.is_file():
        raise MediaError(f"image {path} does not exist or is not a file; check the path")
    if path.stat().st_size == 0:
        raise MediaError(f"image {path} is empty (0 bytes); save or copy it again")
    try:
        with open_photo(path) as image:
            profile = find_profile(image, path)
            colours, alpha = read_pixels(image, path)
            rgb = to_srgb(colours, profile, path)
            if alpha is not None and alpha.getextrema()[0] != 255:
                rgb = _put_on(rgb, alpha, path, background)
            rgb.getexif()[Base.Orientation] = image.getexif().get(Base.Orientation, 1)
        return ImageOps.exif_transpose(rgb)
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise MediaError(
            f"{path} is not an image that can be read; convert it to JPEG or PNG"
        ) from error
    except Exception as error:  # decoders raise nearly any type on damaged files
        raise MediaError(
            f"image {path} is damaged or cut off ({error}); save or copy it again"
        ) from error


def _put_on(
    rgb: Image.Image, alpha: Image.Image, path: Path, background: tuple[int, int, int] | None
) -> Image.Image:
    if background is None:
        raise MediaError(
            f"image {path} is partly see-through; name a colour behind it "
            "(--background white), or save it without transparency"
        )
    canvas = Image.new("RGB", rgb.size, background)
    canvas.paste(rgb, mask=alpha)
    return canvas


def fit_image(image: Image.Image, height: int, width: int, fit: Fit = "crop") -> FittedImage:
    """Scale an image to a size without stretching it (Lanczos).

    Args:
        image: Mode RGB.
        height: Pixels, of the result.
        width: Pixels, of the result.
        fit: ``crop`` covers the size and cuts the excess evenly on both sides; ``pad``
            shows the whole image and fills the rest with black.

    Returns:
        The fitted image and a note on cut, added or enlarged parts; the note is None
        where the aspect fits and the image was not enlarged. ``image`` is not changed.

    Raises:
        ShapeError: ``height`` or ``width`` is below 1.
        MediaError: ``fit`` is neither ``crop`` nor ``pad``.
    """
    if height < 1 or width < 1:
        raise ShapeError(
            f"size {width}x{height} is not possible; both sides must be at least 1 pixel"
        )
    if fit not in ("crop", "pad"):
        raise MediaError(f"fit {fit!r} is unknown; use 'crop' or 'pad'")
    scales = (width / image.width, height / image.height)
    scale = max(scales) if fit == "crop" else min(scales)
    if fit == "crop":
        fitted, change = _crop(image, height, width, scale)
    else:
        fitted, change = _pad(image, height, width, scale)
    changes = [change] if change else []
    if scale > 1:
        changes.append(f"it is enlarged {scale:.2f}x, so it stays soft")
    if not changes:
        return FittedImage(fitted, None)
    done = {"crop": "scaled and cropped at the centre", "pad": "scaled and padded"}[fit]
    note = (
        f"photo {image.width}x{image.height} {done if change else 'scaled'} "
        f"to {width}x{height}: {' and '.join(changes)}"
    )
    return FittedImage(fitted, note)


def _crop(
    image: Image.Image, height: int, width: int, scale: float
) -> tuple[Image.Image, str | None]:
    kept_width = min(image.width, width / scale)  # in pixels of the photo, need not be whole
    kept_height = min(image.height, height / scale)
    left, top = (image.width - kept_width) / 2, (image.height - kept_height) / 2
    box = (left, top, left + kept_width, top + kept_height)
    fitted = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    if image.width * height == image.height * width:
        return fitted, None
    lost_width, lost_height = 1 - kept_width / image.width, 1 - kept_height / image.height
    side = "width" if lost_width > lost_height else "height"
    lost = max(lost_width, lost_height)
    share = f"{lost:.0%}" if lost >= 0.01 else "less than 1%"
    return fitted, f"{share} of its {side} is lost"


def _pad(
    image: Image.Image, height: int, width: int, scale: float
) -> tuple[Image.Image, str | None]:
    inner_width = min(width, max(1, round(image.width * scale)))
    inner_height = min(height, max(1, round(image.height * scale)))
    inner = image.resize((inner_width, inner_height), Image.Resampling.LANCZOS)
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    if (inner_width, inner_height) == (width, height):
        return inner, None
    canvas = Image.new("RGB", (width, height))
    canvas.paste(inner, (left, top))
    if inner_width < width:
        return canvas, f"{width - inner_width} of its {width} columns are black bars"
    return canvas, f"{height - inner_height} of its {height} rows are black bars"


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """Turn an RGB image into a one-frame video.

    Returns:
        ``[1, 3, 1, H, W]`` float32 in [-1, 1].
    """
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # [H, W, 3], a copy
    return (pixels.permute(2, 0, 1).float() / 127.5 - 1)[None, :, None]


def contact_sheet(
    frames: NDArray[np.uint8],
    path: str | Path,
    columns: int = 4,
    rows: int = 2,
    max_width: int = 1600,
) -> None:
    """Save evenly spaced frames of a clip as one PNG, read left to right, top to bottom.

    Args:
        frames: ``[T, H, W, 3]``; the first and the last frame are always shown.
        path: The PNG to write; an existing file is replaced.
        columns: Frames in a row.
        rows: Rows; fewer where the clip has fewer than ``columns * rows`` frames.
        max_width: Pixels, of the sheet; frames are scaled down to it, never up.

    Raises:
        ShapeError: No frames, or a grid that is empty or wider than ``max_width``.
        MediaError: The file cannot be written.
    """
    if frames.ndim != 4 or frames.shape[0] == 0 or not 1 <= columns <= max_width or rows < 1:
        raise ShapeError(
            f"a contact sheet of {columns}x{rows} cannot be made from frames of shape "
            f"{frames.shape}; it needs [T, H, W, 3] with T, columns and rows at least 1"
        )
    num_frames, height, width, _ = frames.shape
    num_shown = min(num_frames, columns * rows)
    columns = min(columns, num_shown)
    scale = min(1.0, max_width / (columns * width))
    cell = (max(1, int(width * scale)), max(1, int(height * scale)))
    sheet = Image.new("RGB", (columns * cell[0], -(-num_shown // columns) * cell[1]))
    for place, index in enumerate(np.linspace(0, num_frames - 1, num_shown).round().astype(int)):
        thumbnail = Image.fromarray(frames[index]).resize(cell, Image.Resampling.LANCZOS)
        sheet.paste(thumbnail, (place % columns * cell[0], place // columns * cell[1]))
    try:
        sheet.save(path, format="PNG")
    except OSError as error:
        raise MediaError(f"contact sheet {path} cannot be written: {error.strerror}") from error
