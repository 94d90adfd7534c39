"""Clips: read frames and metadata of a video file with PyAV."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from swifti2v.errors import MediaError
from swifti2v.media.colour import HDR_TRANSFERS
from swifti2v.media.container import is_cut_off

# No playlists and no network formats: a clip handed in must not make us open other files.
_FORMATS = "mov,mp4,matroska,webm,avi,gif,mpegts,mpeg,ogg,flv,asf,apng,yuv4mpegpipe"
_UNSPECIFIED = 2  # ITU-T H.273, table 4
_RGB_FLAGS = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_CONTAINER_KEYS = {"major_brand", "minor_version", "compatible_brands", "encoder"}


class Clip(NamedTuple):
    """A whole clip in memory."""

    frames: NDArray[np.uint8]
    """``[T, H, W, 3]``."""
    fps: float
    """Frames per second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipInfo:
    """What a video file says about itself."""

    height: int
    """Pixels, upright (rotation metadata applied)."""
    width: int
    """Pixels, upright."""
    fps: float
    """Mean frames per second."""
    num_frames: int | None
    """As the container states it or as its duration suggests; None if it says neither."""
    codec: str
    """FFmpeg's name, for instance ``h264``."""


def probe_clip(path: str | Path) -> ClipInfo:
    """Look at a clip's header and first frame.

    Raises:
        MediaError: The clip cannot be used, for the reasons given at ``iter_frames``.
    """
    path = Path(path)
    with _open_clip(path) as (container, stream):
        first = next(_decode(path, container, stream), None)
        if first is None:
            raise MediaError(f"clip {path} holds no frame that decodes; export it again")
        height, width = _to_rgb(first[1]).shape[:2]
        rate = _rate(stream)
        num_frames: int | None = stream.frames
        if not num_frames:
            seconds = _seconds(container, stream)
            num_frames = round(seconds * rate) if seconds else None
        return ClipInfo(
            height=height,
            width=width,
            fps=float(rate),
            num_frames=num_frames,
            codec=stream.codec_context.name,
        )


def read_clip(
    path: str | Path,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    min_frames: int = 2,
) -> Clip:
    """Read a clip into memory; arguments, result and errors are those of ``iter_frames``.

    Returns:
        The frames and their rate: ``fps``, or the clip's own mean rate where that is None.
    """
    frames = list(iter_frames(path, fps, max_frames=max_frames, min_frames=min_frames))
    if fps is None:
        with _open_clip(Path(path)) as (_, stream):
            fps = float(_rate(stream))
    return Clip(np.stack(frames), fps)


def iter_frames(
    path: str | Path,
    fps: float | None = None,
    *,
    max_frames: int | None = None,
    min_frames: int = 2,
) -> Iterator[NDArray[np.uint8]]:
    """Read a clip frame by frame, upright, without ever holding it.

    Args:
        path: A video file (MP4, MOV, MKV, WebM, AVI, GIF, MPEG ...).
        fps: Frames per second to resample to: at each step the last frame that has started
            is shown, so frames are repeated or left out, never mixed. None keeps all frames.
        max_frames: Stop after so many; None reads to the end.
        min_frames: Refuse a clip that has fewer.

    Returns:
        ``[H, W, 3]`` uint8 each. The file is checked before the first one is asked for.

    Raises:
        MediaError: The file is missing, empty, not a video, cut off or damaged (which may show
            only after some frames), has fewer than ``min_frames``, is HDR, or ``fps`` or
            ``max_frames`` is not above 0.
    """
    path = Path(path)
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise MediaError(f"fps is {fps:g}; it must be above 0")
    if max_frames is not None and max_frames < 1:
        raise MediaError(f"max_frames {max_frames} cannot be; it must be at least 1")
    with _open_clip(path):
        pass
    return _iter_checked(path, fps, max_frames, min_frames)


def _iter_checked(
    path: Path, fps: float | None, max_frames: int | None, min_frames: int
) -> Iterator[NDArray[np.uint8]]:
    num_frames, shape = 0, None
    with _open_clip(path) as (container, stream):
        timed = _decode(path, container, stream)
        shown = (frame for _, frame in timed) if fps is None else _resample(timed, stream, fps)
        for frame in islice(shown, max_frames):
            pixels = _to_rgb(frame)
            if shape not in (None, pixels.shape):
                raise MediaError(f"clip {path} changes its frame size midway; export it again")
            num_frames, shape = num_frames + 1, pixels.shape
            yield pixels
    if num_frames < min_frames and (max_frames is None or num_frames < max_frames):
        raise MediaError(
            f"clip {path} gives {num_frames} frame(s), at least {min_frames} are needed; "
            "give a longer clip, or use the picture as a photo"
        )


@contextmanager
def _open_clip(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    if not path.is_file():
        raise MediaError(f"clip {path} does not exist or is not a file; check the path")
    if path.stat().st_size == 0:
        raise MediaError(f"clip {path} is empty (0 bytes); export or copy it again")
    if is_cut_off(path):
        raise MediaError(f"clip {path} is cut off before its end; export or copy it again")
    with _open_container(path) as container:
        stream = next(iter(container.streams.video), None)
        if stream is None:
            raise MediaError(f"{path} has no video stream; give a video, not a sound file")
        if stream.codec_context is None:  # whatever the type stubs say
            raise MediaError(f"clip {path} has an unknown codec; export it as an MP4 (H.264)")
        _require_sdr(path, stream.codec_context.color_trc)
        yield container, stream


@contextmanager
def _open_container(path: Path) -> Iterator[InputContainer]:
    try:
        # The prefix keeps a colon in the name from being taken for a protocol.
        container = av.open(f"file:{path.absolute()}", options={"format_whitelist": _FORMATS})
    except (av.FFmpegError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", error)
        raise MediaError(
            f"{path} cannot be read as a video ({reason}); export it as an MP4 (H.264)"
        ) from error
    with container:
        yield container


def _require_sdr(path: Path, transfer: int) -> None:
    if transfer in HDR_TRANSFERS:
        raise MediaError(
            f"clip {path} is HDR, transfer {HDR_TRANSFERS[transfer]}; "
            "export it as SDR (BT.709) first"
        )


def _rate(stream: VideoStream) -> Fraction:
    return stream.average_rate or stream.guessed_rate or Fraction(25)


def _seconds(container: InputContainer, stream: VideoStream) -> float | None:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


def _decode(
    path: Path, container: InputContainer, stream: VideoStream
) -> Iterator[tuple[Fraction, VideoFrame]]:
    """Frames and the time in seconds at which each starts."""
    stream.thread_type = "AUTO"
    time = -1 / _rate(stream)
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise MediaError(f"clip {path} is cut off or damaged; export or copy it again")
            for frame in packet.decode():
                _require_sdr(path, frame.color_trc)
                if frame.pts is None or frame.time_base is None:
                    time += 1 / _rate(stream)
                else:
                    time = frame.pts * frame.time_base
                yield time, frame
    except av.FFmpegError as error:
        raise MediaError(
            f"clip {path} is damaged ({error.strerror}); export or copy it again"
        ) from error


def _resample(
    timed: Iterator[tuple[Fraction, VideoFrame]], stream: VideoStream, fps: float
) -> Iterator[VideoFrame]:
    """At each step of ``1 / fps`` seconds the last frame that has started."""
    first = next(timed, None)
    if first is None:
        return
    step = 1 / Fraction(fps).limit_denominator(1001)  # 30000/1001 and its like stay exact
    tick = stream.time_base or Fraction(1, 1000)
    is_exact = (1 / _rate(stream) / tick).denominator == 1
    # Else times are rounded (Matroska's to 1 ms), and a frame may seem to start late.
    slack = 0 if is_exact else min(tick, Fraction(1, 1000)) / 2
    (start, held), num_shown = first, 0
    time = start
    for time, frame in timed:  # the last time is used below
        while start + num_shown * step < time - slack:
            yield held
            num_shown += 1
        held = frame
    end = time + 1 / _rate(stream)
    while start + num_shown * step < end - slack:
        yield held
        num_shown += 1


def _to_rgb(frame: VideoFrame) -> NDArray[np.uint8]:
    """Upright ``[H, W, 3]``."""
    colorspace = None
    if frame.colorspace == _UNSPECIFIED:  # what players take for granted
        colorspace = "ITU709" if min(frame.height, frame.width) >= 720 else "ITU601"
    pixels = frame.to_ndarray(format="rgb24", interpolation=_RGB_FLAGS, src_colorspace=colorspace)
    if frame.rotation % 90 == 0 and frame.rotation:
        pixels = np.rot90(pixels, k=frame.rotation // 90)  # both count anticlockwise
    return cast(NDArray[np.uint8], np.ascontiguousarray(pixels))


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the texts stored with a video, a PNG, or a folder or pattern of PNG frames.

    Works on a video whose writing was interrupted. The container's own entries (brands,
    encoder name) are left out; keys are in lower case.

    Raises:
        MediaError: The file is missing or is neither a video nor a PNG.
    """
    path = Path(path)
    if "%" in path.name and path.suffix.lower() == ".png":
        path = path.parent
    if path.is_dir():
        frames = sorted(path.glob("*.png"))
        if not frames:
            raise MediaError(f"folder {path} holds no PNG frames; check the path")
        path = frames[0]
    if not path.is_file():
        raise MediaError(f"{path} does not exist or is not a file; check the path")
    if path.suffix.lower() == ".png":
        return _read_png_texts(path)
    with _open_container(path) as container:
        metadata = {key.lower(): value for key, value in container.metadata.items()}
    return {key: value for key, value in metadata.items() if key not in _CONTAINER_KEYS}


def _read_png_texts(path: Path) -> dict[str, str]:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            texts: dict[str, Any] = getattr(image, "text", {})
            return {key.lower(): str(value) for key, value in texts.items()}
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise MediaError(f"{path} cannot be read as a PNG ({error}); check the file") from error
