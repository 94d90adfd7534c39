"""Clips: read frames and metadata of a video file with PyAV."""

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from swifti2v.errors import MediaError
from swifti2v.media.pixels import Color, PixelReader, UnusableClipError
from swifti2v.media.timing import change_rate, exact_rate, make_even
from swifti2v.media.tracks import (
    ClipInfo,
    Track,
    explained,
    find_decoder,
    find_track,
    open_container,
    packets_of,
)

_CONTAINER_KEYS = {"major_brand", "minor_version", "compatible_brands", "encoder"}


class Clip(NamedTuple):
    """A whole clip in memory."""

    frames: NDArray[np.uint8]
    """``[T, H, W, 3]``."""
    fps: float
    """Frames per second."""


def probe_clip(path: str | Path, *, background: Color | None = None) -> ClipInfo:
    """Look at a clip's packets and first frame.

    All frames are decoded where packets do not tell how many there are (old codecs, interlaced
    H.264), and where one may be see-through without a ``background``.

    Args:
        path: A video file.
        background: As for ``iter_frames``.

    Raises:
        MediaError: The clip cannot be used, for the reasons given at ``iter_frames``.
    """
    return find_track(Path(path), background).info


def read_clip(
    path: str | Path,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    min_frames: int = 2,
    background: Color | None = None,
) -> Clip:
    """Read a clip into memory; arguments, result and errors are those of ``iter_frames``.

    Returns:
        The frames and their rate: ``fps``, or that of ``probe_clip`` where it is None.
    """
    frames = iter_frames(
        path, fps, max_frames=max_frames, min_frames=min_frames, background=background
    )
    rate = probe_clip(path, background=background).fps if fps is None else fps
    return Clip(np.stack(list(frames)), rate)


def iter_frames(
    path: str | Path,
    fps: float | None = None,
    *,
    first: int = 0,
    max_frames: int | None = None,
    min_frames: int = 2,
    background: Color | None = None,
) -> Iterator[NDArray[np.uint8]]:
    """Read a clip frame by frame, as a player shows it, without ever holding it.

    Frames are upright, with square pixels. Where their rate varies they are brought to a constant
    one: at each step the last frame that has started is shown, so frames are repeated or left out,
    never mixed. ``probe_clip`` says so in its notes.

    Args:
        path: A video file (MP4, MOV, MKV, WebM, AVI, GIF, MPEG ...).
        fps: Frames per second to resample to, in the same way. None keeps the rate that
            ``probe_clip`` tells.
        first: Frame of the result to begin with; where the file allows it, what lies before is not
            decoded.
        max_frames: Stop after so many; None reads to the end.
        min_frames: Refuse a clip that has fewer.
        background: RGB colour, 0 to 255, to put behind a see-through clip. None refuses one.

    Returns:
        ``[H, W, 3]`` uint8 each. The file is checked before the first one is asked for.

    Raises:
        MediaError: The file is missing, empty, not a video, cut off or damaged (which may show
            only after some frames), has fewer than ``min_frames``, is HDR or see-through without a
            ``background``, or ``fps`` or ``max_frames`` is not above 0.
    """
    path = Path(path)
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise MediaError(f"fps is {fps:g}; it must be above 0")
    if max_frames is not None and max_frames < 1:
        raise MediaError(f"max_frames is {max_frames}; it must be at least 1")
    track = find_track(path, background)
    shown = _to_pixels(path, track, fps, background, first)
    return _require_enough(
        path, islice(shown, max_frames), min(min_frames, max_frames or min_frames)
    )


def _require_enough(
    path: Path, frames: Iterator[NDArray[np.uint8]], min_frames: int
) -> Iterator[NDArray[np.uint8]]:
    num_frames = 0
    for frame in frames:
        num_frames += 1
        yield frame
    if num_frames < min_frames:
        raise MediaError(
            f"clip {path} gives {num_frames} frame(s), at least {min_frames} are needed; "
            "give a longer clip, or use the picture as a photo"
        )


def _to_pixels(
    path: Path, track: Track, fps: float | None, background: Color | None, first: int
) -> Iterator[NDArray[np.uint8]]:
    reader = PixelReader(track.pixel_aspect, background)
    with explained(path):
        for frame in _show(path, track, fps, first):
            pixels = reader.read(frame)
            if pixels.shape[:2] != (track.info.height, track.info.width):
                raise UnusableClipError("changes its frame size midway; export it again")
            yield pixels


def _show(path: Path, track: Track, fps: float | None, first: int) -> Iterator[VideoFrame]:
    """Frames at a constant rate, from one of them on."""
    timing = track.timing
    rate = timing.rate if fps is None else exact_rate(fps)
    start = int(first * timing.rate // rate)
    if timing.is_even:
        frames = _decode_even(path, track, start)
    else:
        frames = islice(make_even(_decode(path, track), timing), start, None)
    return frames if fps is None else change_rate(frames, timing.rate, rate, first)


def _decode_even(path: Path, track: Track, start: int) -> Iterator[VideoFrame]:
    """Frames of a constant rate from one of them on; what lies before it is skipped if it can be."""
    half = 1 / (2 * track.timing.rate)
    if start and track.can_seek and not track.timing.jitter:
        target = track.start + start / track.timing.rate
        timed = _decode(path, track, target)
        reached = next(timed, None)
        if reached is not None and reached[0] <= target + half:
            wanted = (timed for timed in chain([reached], timed) if timed[0] > target - half)
            return (frame for _, frame in wanted)
    return (frame for _, frame in islice(_decode(path, track), start, None))


def _decode(
    path: Path, track: Track, target: Fraction | None = None
) -> Iterator[tuple[Fraction, VideoFrame]]:
    """Frames and the time in seconds at which each starts.

    Args:
        path: The file.
        track: Its video track.
        target: Seconds; begins with the last key frame before, or somewhere else where the file's
            index is wrong.
    """
    step = 1 / track.timing.rate
    time = -step
    with open_container(path) as container:
        stream = container.streams[track.stream]
        assert isinstance(stream, VideoStream)
        stream.thread_type = "AUTO"
        if target is not None and stream.time_base:
            container.seek(int(target / stream.time_base), stream=stream)
        decode = find_decoder(stream)
        for packet in packets_of(container, stream):
            for frame in decode(packet):
                if frame.pts is None or frame.time_base is None:
                    time += step
                else:
                    time = frame.pts * frame.time_base
                yield time, frame


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
    with open_container(path) as container:
        metadata = {key.lower(): value for key, value in container.metadata.items()}
    return {key: value for key, value in metadata.items() if key not in _CONTAINER_KEYS}


def _read_png_texts(path: Path) -> dict[str, str]:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            texts: dict[str, Any] = getattr(image, "text", {})
            return {key.lower(): str(value) for key, value in texts.items()}
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise MediaError(f"{path} cannot be read as a PNG ({error}); check the file") from error
