"""Pixel and latent shapes, and every rule that ties them together."""

import math
from typing import NamedTuple

from swifti2v.errors import ShapeError

TIME_FACTOR = 4
"""Pixel frames that a latent frame of Wan's VAEs, and of ours, holds; the first one holds one."""


def latent_frames(num_frames: int, time: int = TIME_FACTOR) -> int:
    """Number of latent frames that hold ``num_frames`` pixel frames, which are ``time * k + 1``."""
    return (num_frames - 1) // time + 1


def pixel_frames(latent_frame: int, time: int = TIME_FACTOR) -> range:
    """Pixel frames that one latent frame holds: the first holds one, any other ``time``."""
    return range(max(0, time * (latent_frame - 1) + 1), time * latent_frame + 1)


class ScaleFactors(NamedTuple):
    """Pixels along one latent cell, and along one transformer token."""

    time: int
    """Pixel frames a latent frame holds (the first latent frame holds one)."""
    space: int
    """Pixels along a side of a latent cell."""
    patch: int
    """Latent cells along a side of a transformer token."""

    @property
    def side(self) -> int:
        """Pixels along a side of a token: height and width must be multiples of it."""
        return self.space * self.patch


class PixelShape(NamedTuple):
    """Size of a clip in pixels."""

    num_frames: int
    height: int
    width: int

    def require_fit(self, scale: ScaleFactors) -> None:
        """Refuse a shape that the model cannot hold exactly.

        Raises:
            ShapeError: The frame count is not ``time * k + 1``, or a side is not a multiple
                of ``scale.side``; the message names the nearest values that fit.
        """
        if self.num_frames < 1 or (self.num_frames - 1) % scale.time:
            lower = max(0, (self.num_frames - 1) // scale.time) * scale.time + 1
            raise ShapeError(
                f"num_frames {self.num_frames} does not fit: it must be {scale.time}k + 1; "
                f"the nearest are {lower} and {lower + scale.time}"
            )
        for name, side in (("height", self.height), ("width", self.width)):
            if side < 1 or side % scale.side:
                lower = max(1, side // scale.side) * scale.side
                raise ShapeError(
                    f"{name} {side} does not fit: it must be a multiple of {scale.side}; "
                    f"the nearest are {lower} and {lower + scale.side}"
                )


class FrameSize(NamedTuple):
    """Size of a frame in pixels."""

    height: int
    width: int

    @property
    def num_pixels(self) -> int:
        """Pixels of a frame."""
        return self.height * self.width


class Crop(NamedTuple):
    """A part of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """Rows of the frame."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """Columns of the frame."""
        return slice(self.left, self.left + self.width)

    def grow(self, margin: int, frame: FrameSize) -> "Crop":
        """Add ``margin`` pixels on each side, up to the edge of the frame."""
        top, left = max(0, self.top - margin), max(0, self.left - margin)
        bottom = min(frame.height, self.top + self.height + margin)
        right = min(frame.width, self.left + self.width + margin)
        return Crop(top, left, bottom - top, right - left)

    def within(self, other: "Crop") -> "Crop":
        """Count the part from the corner of another one."""
        return Crop(self.top - other.top, self.left - other.left, self.height, self.width)

    def divide(self, factor: int) -> "Crop":
        """Return the same part of a frame that is smaller by a factor.

        Raises:
            ShapeError: Corner or sides are not multiples of it.
        """
        if any(value % factor for value in self):
            raise ShapeError(f"{self} is not made of whole squares of {factor} pixels")
        return Crop(*(value // factor for value in self))


def size_of_aspect(
    aspect: FrameSize,
    multiple: int,
    max_pixels: int,
    *,
    height: int | None = None,
    width: int | None = None,
) -> FrameSize:
    """Output size for a photo: its own aspect, as far as the sides that a model takes allow.

    Of all sizes within ``max_pixels`` the one that keeps most of the photo at most resolution:
    the part of the photo that is left after cropping, times the square root of the pixels.

    Args:
        aspect: Size of the photo.
        multiple: Number of which both sides must be multiples.
        max_pixels: Most pixels of a frame, such as those of the model's default size. At least
            one ``multiple`` on either side is returned.
        height: Kept if given; then the width follows from the aspect, whatever ``max_pixels``.
        width: Kept if given, in the same way.

    Raises:
        ShapeError: ``aspect``, ``height`` or ``width`` is below 1.
    """
    given = [side for side in (height, width) if side is not None]
    if min(*aspect, *given) < 1:
        raise ShapeError(f"size {min(*aspect, *given)} is too small; sides are at least 1 pixel")
    if height is not None:
        return FrameSize(height, width or _nearest(height * aspect.width / aspect.height, multiple))
    if width is not None:
        return FrameSize(_nearest(width * aspect.height / aspect.width, multiple), width)
    num_cells = max(1, max_pixels // multiple**2)

    def quality(size: FrameSize) -> tuple[float, int]:
        ratio = size.width * aspect.height / (size.height * aspect.width)
        return min(ratio, 1 / ratio) * math.sqrt(size.num_pixels), size.num_pixels

    sizes = []
    exact_rows = math.sqrt(num_cells * aspect.height / aspect.width)
    for rows in range(1, min(num_cells, 2 * math.ceil(exact_rows)) + 1):
        fitting = rows * aspect.width / aspect.height
        for columns in {math.floor(fitting), math.ceil(fitting), num_cells // rows}:
            if 1 <= columns <= num_cells // rows:
                sizes.append(FrameSize(rows * multiple, columns * multiple))
    return max(sizes, key=quality)


def exact_size(aspect: FrameSize, multiple: int, max_pixels: int) -> FrameSize | None:
    """The largest size of exactly an aspect; None if every such size exceeds ``max_pixels``.

    Args:
        aspect: A size of that aspect.
        multiple: Number of which both sides must be multiples.
        max_pixels: Most pixels of a frame.
    """
    common = math.gcd(*aspect)
    rows, columns = aspect.height // common, aspect.width // common
    step = math.lcm(*(multiple // math.gcd(multiple, side) for side in (rows, columns)))
    times = math.isqrt(max_pixels // (rows * columns * step**2)) * step
    return FrameSize(rows * times, columns * times) if times else None


def _nearest(side: float, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple


class LatentShape(NamedTuple):
    """Size of a clip in latent cells."""

    channels: int
    num_frames: int
    height: int
    width: int

    @classmethod
    def from_pixel_shape(
        cls, pixels: PixelShape, scale: ScaleFactors, channels: int
    ) -> "LatentShape":
        """Latent size of a clip.

        Raises:
            ShapeError: ``pixels`` does not fit ``scale`` (see ``PixelShape.require_fit``).
        """
        pixels.require_fit(scale)
        return cls(
            channels,
            latent_frames(pixels.num_frames, scale.time),
            pixels.height // scale.space,
            pixels.width // scale.space,
        )


NUM_WAYS = 5
"""Output channels, before those of the latents, of a Stage I that generates displacement: the camera of a
cell, its pan, tilt, zoom, roll and sway."""
