"""Sound of a clip, copied unchanged beside the frames that are made from it."""

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet

from swifti2v.errors import MediaError
from swifti2v.media.container import muxer_name
from swifti2v.media.pixels import Color
from swifti2v.media.tracks import explained, find_track, open_container

PREROLL = Fraction(1, 10)
"""Seconds of sound that come before the first frame, as decoders need some to be right from it on:
Opus 80 ms (RFC 7845, section 4.6), AAC up to 2112 samples. Players do not play them."""


class Sound(NamedTuple):
    """Sound tracks of a clip."""

    path: Path
    """The clip."""
    codecs: tuple[str, ...]
    """FFmpeg's name of each track's format, such as ``aac``."""
    start: Fraction
    """Seconds, in the file's time, at which its first frame is shown."""


def find_sound(path: Path, background: Color | None = None) -> Sound | None:
    """Find the sound of a clip; None for a silent one.

    Args:
        path: A video file.
        background: As for ``iter_frames``.

    Raises:
        MediaError: The clip cannot be used, for the reasons given at ``iter_frames``.
    """
    start = find_track(path, background).start
    with open_container(path) as container, explained(path):
        codecs = tuple(stream.codec_context.name for stream in _tracks(container))
    return Sound(path, codecs, start) if codecs else None


def require_sound_fits(suffix: str, sound: Sound) -> None:
    """Refuse sound that a type of file cannot hold as it is.

    Args:
        suffix: ``.mp4`` or ``.mkv``.
        sound: Sound to copy.

    Raises:
        MediaError: The message names what works.
    """
    if not _fits(suffix, sound):
        other = "write an .mkv, or " if _fits(".mkv", sound) else ""
        raise MediaError(
            f"the sound of {sound.path} ({', '.join(sound.codecs)}) cannot be copied to an "
            f"{suffix.lower()}; {other}leave it out with --no-audio"
        )


def _fits(suffix: str, sound: Sound) -> bool:
    try:
        with (
            open_container(sound.path) as clip,
            av.open(io.BytesIO(), "w", format=muxer_name(suffix)) as trial,
        ):
            add_sound_tracks(clip, trial)
            trial.start_encoding()
    except (av.FFmpegError, ValueError):
        return False
    return True


def add_sound_tracks(clip: InputContainer, video: OutputContainer) -> dict[int, AudioStream]:
    """Add a track to a video for each sound track of a clip, by the latter's index."""
    return {
        stream.index: video.add_stream_from_template(stream, opaque=True)
        for stream in _tracks(clip)
    }


def sound_packets(
    clip: InputContainer, tracks: dict[int, AudioStream], start: Fraction, seconds: Fraction
) -> "Iterator[tuple[Fraction, Packet[Any]]]":
    """Packets of a clip's sound for the tracks of a video, each with its time of decoding.

    Args:
        clip: The clip, opened.
        tracks: See ``add_sound_tracks``.
        start: Seconds of the clip that become 0.
        seconds: Length of the video; sound behind it is left out.
    """
    for packet in clip.demux(*(clip.streams[index] for index in tracks)):
        if not packet.size or packet.dts is None or packet.pts is None:
            continue
        begins = packet.pts * packet.time_base - start
        if begins >= seconds or begins < -PREROLL:
            continue
        shift = round(start / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
        packet.stream = tracks[packet.stream_index]
        yield packet.dts * packet.time_base, packet


def _tracks(container: InputContainer) -> list[AudioStream]:
    return [stream for stream in container.streams.audio if stream.codec_context is not None]
