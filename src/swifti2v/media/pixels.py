"""Turn a decoded frame into the pixels a viewer sees: upright, square, opaque RGB."""

import struct
from fractions import Fraction
from typing import Any, cast

import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from swifti2v.errors import MediaError
from swifti2v.media.colour import HDR_TRANSFERS

Color = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

MAX_PIXEL_ASPECT = 8
"""Wider or taller pixels are taken for a damaged header."""
_UNSPECIFIED = 2  # ITU-T H.273, table 4
_RGB_FLAGS = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


class UnusableClipError(MediaError):
    """A fault of a clip, in words that follow its name."""


def require_sdr(transfer: int) -> None:
    """Refuse the transfer functions of HDR (ITU-T H.273, table 3).

    Raises:
        UnusableClipError: The transfer function is one of HDR.
    """
    if transfer in HDR_TRANSFERS:
        raise UnusableClipError(
            f"is HDR, transfer {HDR_TRANSFERS[transfer]}; export it as SDR (BT.709) first"
        )


def may_be_see_through(frame: VideoFrame) -> bool:
    """Whether the frame's format has room for transparency."""
    layout = frame.format
    return layout.has_palette or any(part.is_alpha for part in layout.components)


def to_pixels(
    frame: VideoFrame, pixel_aspect: Fraction, background: Color | None
) -> NDArray[np.uint8]:
    """One frame as ``PixelReader`` gives those of a clip."""
    return PixelReader(pixel_aspect, background).read(frame)


class PixelReader:
    """Frames of a clip to pixels; converter and orientation are kept from frame to frame.

    Args:
        pixel_aspect: Width over height of a pixel.
        background: Colour behind see-through parts; None refuses them.
    """

    def __init__(self, pixel_aspect: Fraction, background: Color | None) -> None:
        self._pixel_aspect, self._background = pixel_aspect, background
        self._converter: Any = VideoReformatter()  # its stub knows no names of colour spaces
        self._matrix: tuple[int, int, int, int] | None = None
        self._rotation = 0

    def read(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """``[H, W, 3]``: pixels made square by enlarging, then turned and mirrored as the file says.

        Raises:
            UnusableClipError: The frame is HDR, see-through or turned by no quarter, or its pixels
                cannot be.
        """
        require_sdr(frame.color_trc)
        width, height = square_size(frame, self._pixel_aspect)
        colorspace = None
        if frame.colorspace == _UNSPECIFIED:  # what players take for granted
            is_large = min(frame.height, frame.width) >= 720
            colorspace = Colorspace.ITU709 if is_large else Colorspace.ITU601
        has_alpha = may_be_see_through(frame)
        # In this thread alone: those of the converter would not live on in a forked process, where
        # its end waits for them.
        converted = self._converter.reformat(
            frame,
            width=width,
            height=height,
            format="rgba" if has_alpha else "rgb24",
            interpolation=_RGB_FLAGS,
            src_colorspace=colorspace,
            threads=1,
        )
        pixels: NDArray[Any] = converted.to_ndarray()
        if has_alpha:
            pixels = _fill(pixels, self._background)
        return cast(NDArray[np.uint8], np.ascontiguousarray(_orient(pixels, self._find(frame))))

    def _find(self, frame: VideoFrame) -> tuple[int, int, int, int]:
        """The frame's orientation.

        A frame whose side data was looked at stays in memory until the garbage collector comes: only
        the first one is looked at, and those that are turned otherwise than the one before.
        """
        if self._matrix is None or frame.rotation != self._rotation:
            self._matrix, self._rotation = display_matrix(frame), frame.rotation
        return self._matrix


def square_size(frame: VideoFrame, pixel_aspect: Fraction) -> tuple[int, int]:
    """Width and height with square pixels; neither is less than before.

    Raises:
        UnusableClipError: The aspect cannot be right.
    """
    if not Fraction(1, MAX_PIXEL_ASPECT) <= pixel_aspect <= MAX_PIXEL_ASPECT:
        raise UnusableClipError(
            f"has pixels of {pixel_aspect.numerator}:{pixel_aspect.denominator}, not possible; "
            "export it with square pixels"
        )
    if pixel_aspect >= 1:
        return round(frame.width * pixel_aspect), frame.height
    return frame.width, round(frame.height / pixel_aspect)


def _fill(pixels: NDArray[np.uint8], background: Color | None) -> NDArray[np.uint8]:
    color, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.min() == 255:
        return color
    if background is None:
        raise UnusableClipError(
            "is partly see-through; export it without transparency, or name a colour with "
            "--background where the command takes it"
        )
    behind = np.array(background, np.uint32)
    alpha = alpha.astype(np.uint32)
    return ((color * alpha + behind * (255 - alpha) + 127) // 255).astype(np.uint8)


def display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """``a, b, c, d``, each -1, 0 or 1: a point at x, y is shown at ``a x + c y, b x + d y``.

    Source: ISO/IEC 14496-12, section 8.2.2 (``matrix``), as FFmpeg hands it on.

    Raises:
        UnusableClipError: It turns by something else than quarters.
    """
    side_data: Any = frame.side_data
    for item in side_data:
        if item.type == SideDataType.DISPLAYMATRIX:
            a, b, _, c, d, *_ = struct.unpack("=9i", bytes(item))  # in the machine's byte order
            return _to_quarters(a, b, c, d)
    return 1, 0, 0, 1


def _to_quarters(a: int, b: int, c: int, d: int) -> tuple[int, int, int, int]:
    size = max(abs(a), abs(b), abs(c), abs(d))
    if size == 0:  # as some writers leave it
        return 1, 0, 0, 1
    a, b, c, d = (round(value / size) for value in (a, b, c, d))
    if (abs(a), abs(b)) not in ((1, 0), (0, 1)) or (abs(c), abs(d)) != (abs(b), abs(a)):
        raise UnusableClipError(
            "is turned by an angle other than a quarter turn; export it upright"
        )
    return a, b, c, d


def _orient(pixels: NDArray[np.uint8], matrix: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    a, b, c, d = matrix
    if a == 0:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: b + d, :: a + c]  # one of each pair is 0, the other 1 or -1
