"""Video files opened, and looked through once: which track, how many frames, at which times."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from swifti2v.errors import MediaError
from swifti2v.media.container import is_cut_off
from swifti2v.media.pixels import (
    Color,
    UnusableClipError,
    may_be_see_through,
    require_sdr,
    square_size,
    to_pixels,
)
from swifti2v.media.timing import Timing, plan_timing

# No playlists and no network formats: a clip handed in must not make us open other files.
_FORMATS = "mov,mp4,matroska,webm,avi,gif,mpegts,mpeg,ogg,flv,asf,apng,yuv4mpegpipe"
_NO_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails
# A packet of these is a frame that is shown; frames of others are counted by decoding.
_FRAME_A_PACKET = frozenset(
    {"h264", "hevc", "av1", "vp8", "vp9", "ffv1", "mjpeg", "prores", "dnxhd"}
    | {"qtrle", "png", "apng", "gif", "rawvideo", "huffyuv", "utvideo"}
)
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders leave alpha out

MIN_RATE = Fraction(1, 1000)
"""Frames a second; slower clips have times that cannot be right."""
MAX_REPEATED = 100_000
"""Frames that repeating may give; more come from times that cannot be right."""
MAX_STEP_BACK = 1
"""Seconds between a packet and the next; more is a second clip behind the first one."""

Decode = Callable[["Packet[VideoStream]"], Sequence[VideoFrame]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipInfo:
    """Contents of a video file, and the frames that reading it gives."""

    height: int
    """Pixels, upright and square."""
    width: int
    """Pixels, upright and square."""
    fps: float
    """Frames a second that it is read at."""
    num_frames: int
    """Frames that it gives at ``fps``."""
    is_resampled: bool
    """Whether its own rate varies: frames are repeated or left out to reach ``fps``."""
    codec: str
    """FFmpeg's name of the format, for instance ``h264`` or ``av1``."""
    notes: tuple[str, ...] = ()
    """Changes made while reading that the user should know: ``cause: detail``."""


class Track(NamedTuple):
    """The video track of a file."""

    stream: int
    """Index among the file's streams."""
    timing: Timing
    """Times of its frames."""
    pixel_aspect: Fraction
    """Width over height of a pixel."""
    info: ClipInfo
    """Facts about the clip for callers."""
    start: Fraction = Fraction(0)
    """Seconds, in the file's time, at which its first frame is shown."""
    can_seek: bool = False
    """Whether a frame can be looked up by its time."""


@contextmanager
def open_container(path: Path) -> Iterator[InputContainer]:
    """Open a file as a video.

    Raises:
        MediaError: The file is not a video, or it is damaged.
    """
    try:
        # The prefix keeps a colon in the name from being taken for a protocol.
        container = av.open(
            f"file:{path.absolute()}",
            options={"format_whitelist": _FORMATS},
            metadata_errors="replace",
        )
    except (av.FFmpegError, UnicodeError) as error:
        reason = getattr(error, "strerror", error)
        raise MediaError(
            f"{path} cannot be read as a video ({reason}); export it as an MP4 (H.264)"
        ) from error
    with container:
        yield container


def find_track(path: Path, background: Color | None) -> Track:
    """Look through a clip: all its packets, and as few of its frames as will do.

    The result is remembered as long as the file does not change.

    Raises:
        MediaError: The clip cannot be used, for the reasons given at ``iter_frames``.
    """
    if not path.is_file():
        raise MediaError(f"clip {path} does not exist or is not a file; check the path")
    status = path.stat()
    if status.st_size == 0:
        raise MediaError(f"clip {path} is empty (0 bytes); export or copy it again")
    stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return _look_through(path, background, stamp)


@lru_cache(maxsize=2**15)
def _look_through(path: Path, background: Color | None, _stamp: tuple[int, ...]) -> Track:
    if is_cut_off(path):
        raise MediaError(f"clip {path} is cut off before its end; export or copy it again")
    with open_container(path) as container, explained(path):
        tracks = _video_tracks(container)
        index = tracks[0].index if len(tracks) == 1 else _first_that_moves(path)
        stream = container.streams[index]
        assert isinstance(stream, VideoStream)
        if stream.codec_context is None:  # whatever the type stubs say
            raise UnusableClipError("has an unknown codec; export it as an MP4 (H.264)")
        first, shown = _scan(container, stream, background)
        timing = _time(shown, stream)
        _require_possible(timing, len(shown))
        pixel_aspect = Fraction(stream.sample_aspect_ratio or 1)
        height, width = to_pixels(first, pixel_aspect, background).shape[:2]
        info = ClipInfo(
            height=height,
            width=width,
            fps=float(timing.rate),
            num_frames=timing.num_frames,
            is_resampled=not timing.is_even,
            codec=stream.codec.canonical_name,
            notes=tuple(_notes(timing, first, pixel_aspect, len(tracks), index)),
        )
        times = [one.time for one in shown if one.time is not None]
        has_times = len(times) == len(shown) and stream.time_base is not None
        has_index = bool({"mp4", "matroska"} & {*container.format.name.split(",")})
        start = min(times, default=0) * (stream.time_base or Fraction(0))
    return Track(index, timing, pixel_aspect, info, start, has_index and has_times)


def _video_tracks(container: InputContainer) -> list[VideoStream]:
    videos = container.streams.video
    tracks = [stream for stream in videos if not stream.disposition & _NO_VIDEO]
    if not tracks:
        kind = "only a cover picture" if videos else "no video stream"
        raise UnusableClipError(f"has {kind}; give a video, not a sound file")
    return tracks


def _first_that_moves(path: Path) -> int:
    """The track that has a second frame first, or else the first one."""
    with open_container(path) as container:
        tracks = _video_tracks(container)
        num_packets = dict.fromkeys((stream.index for stream in tracks), 0)
        for packet in container.demux(*tracks):
            num_packets[packet.stream.index] += packet.size > 0
            if num_packets[packet.stream.index] > 1:
                return packet.stream.index
        return tracks[0].index


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors of reading a clip within the block into errors that name it.

    Raises:
        MediaError: Takes the place of ``UnusableClipError`` and of FFmpeg's errors.
    """
    try:
        yield
    except UnusableClipError as error:
        raise MediaError(f"clip {path} {error}") from error
    except av.FFmpegError as error:
        raise MediaError(
            f"clip {path} is damaged ({error.strerror}); export or copy it again"
        ) from error


def packets_of(container: InputContainer, stream: VideoStream) -> Iterator["Packet[VideoStream]"]:
    """All packets of a track, the last one empty to flush a decoder.

    Raises:
        UnusableClipError: One is damaged, or times start again.
    """
    latest = -math.inf
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise UnusableClipError("is cut off or damaged; export or copy it again")
        if packet.dts is not None:
            if (latest - packet.dts) * float(stream.time_base or 0) > MAX_STEP_BACK:
                raise UnusableClipError("has times that start again midway; export it as one clip")
            latest = packet.dts
        yield packet


def find_decoder(stream: VideoStream) -> Decode:
    """Return a decoder that turns a track's packets into frames, with their transparency.

    Raises:
        UnusableClipError: No decoder in this build of PyAV keeps transparency.
    """
    codec = stream.codec.canonical_name
    if stream.metadata.get("alpha_mode") != "1" or codec not in _WITH_ALPHA:
        return lambda packet: packet.decode()
    if _WITH_ALPHA[codec] not in av.codecs_available:
        raise UnusableClipError("is see-through; export it without transparency")
    context: Any = av.CodecContext.create(_WITH_ALPHA[codec], "r")
    # An empty packet of the demuxer says the end; this decoder takes None for it.
    return lambda packet: context.decode(packet if packet.size else None)


class _Shown(NamedTuple):
    """Start and duration of a frame in ticks of its track; None and 0 if unknown."""

    time: int | None
    duration: int


def _scan(
    container: InputContainer, stream: VideoStream, background: Color | None
) -> tuple[VideoFrame, list[_Shown]]:
    """The first frame, and when each is shown.

    Packets tell that of most codecs. Else all frames are decoded, and also where one of them may
    be see-through and that is refused.
    """
    require_sdr(stream.codec_context.color_trc)
    has_no_times = container.format.name == "avi"  # its times of showing are guesses
    packets: list[_Shown] = []
    frames: list[_Shown] = []
    decode, first, decodes = find_decoder(stream), None, True
    for packet in packets_of(container, stream):
        if packet.size and not packet.is_discard and _is_shown(packet, stream):
            time = packet.dts if has_no_times else packet.pts
            packets.append(_Shown(time, packet.duration or 0))
        for frame in decode(packet) if decodes else ():
            first = first or frame
            frames.append(_Shown(frame.pts, frame.duration or 0))
            may_fail = background is None and may_be_see_through(frame)
            if may_fail:
                to_pixels(frame, Fraction(1), None)
            decodes = may_fail or not _is_a_packet(stream, frame)
    if first is None:
        raise UnusableClipError("holds no frame that decodes; export it again")
    if has_no_times:
        return first, packets if not decodes or len(packets) == len(frames) else frames
    if decodes:
        return first, frames
    # Earlier frames need frames that were cut off: no decoder shows them.
    start = -math.inf if first.pts is None else first.pts
    return first, [one for one in packets if one.time is None or one.time >= start]


def _is_shown(packet: "Packet[VideoStream]", stream: VideoStream) -> bool:
    # RFC 6386, section 9.1: bit 4 of a VP8 frame is ``show_frame``; hidden ones are references.
    return stream.codec.canonical_name != "vp8" or bool(bytes(packet)[0] & 16)


def _is_a_packet(stream: VideoStream, frame: VideoFrame) -> bool:
    """Whether every packet is a frame; of interlaced H.264 each field may be a packet."""
    codec = stream.codec.canonical_name
    return codec in _FRAME_A_PACKET and not (codec == "h264" and frame.interlaced_frame)


def _time(shown: Sequence[_Shown], stream: VideoStream) -> Timing:
    claims = [rate for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate) if rate]
    tick = stream.time_base
    times = [(start.time, start.duration) for start in shown if start.time is not None]
    if len(times) < len(shown) or tick is None:  # nothing but a claim tells
        return plan_timing(range(len(shown)), 1 / next(iter(claims), Fraction(25)))
    times.sort()
    return plan_timing([time for time, _ in times], tick, claims, times[-1][1])


def _require_possible(timing: Timing, num_shown: int) -> None:
    num_repeated = 0 if timing.is_even else timing.num_frames - num_shown
    if timing.rate < MIN_RATE or num_repeated > max(MAX_REPEATED, 10 * num_shown):
        raise UnusableClipError(
            f"shows a frame for {timing.longest:.0f} s, not possible; export it at a constant rate"
        )


def _notes(
    timing: Timing, first: VideoFrame, pixel_aspect: Fraction, num_tracks: int, index: int
) -> Iterator[str]:
    if not timing.is_even:
        yield (
            f"its frame rate varies: a frame is shown for {1000 * timing.shortest:.0f} to "
            f"{1000 * timing.longest:.0f} ms; it is read at a constant {float(timing.rate):g} fps"
        )
    if timing.jitter:
        yield (
            f"its frames come unevenly: up to {1000 * timing.jitter:.0f} ms early or late; they "
            f"are shown evenly at {float(timing.rate):g} fps"
        )
    width, height = square_size(first, pixel_aspect)
    if (width, height) != (first.width, first.height):
        yield (
            f"its pixels are not square: {first.width}x{first.height} is enlarged to "
            f"{width}x{height}"
        )
    if first.interlaced_frame:
        yield "it is interlaced: its lines are kept as they are; deinterlace it first if it combs"
    if num_tracks > 1:
        yield f"it has several video tracks: {num_tracks}, of which stream {index} is read"
