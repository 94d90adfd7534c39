"""A finished video file in the form that players and editors expect: with length, index and sound."""

import heapq
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av

from swifti2v.media.sound import Sound, add_sound_tracks, sound_packets
from swifti2v.media.tracks import open_container

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

# The index comes before the frames, so that a browser seeks in what it has not loaded yet.
_MUXER_OPTIONS = {
    "mp4": {"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact"},
    "matroska": {"fflags": "+bitexact"},
}


def index_file(
    source: Path,
    target: Path,
    metadata: dict[str, str],
    seconds: Fraction,
    sound: Sound | None = None,
) -> None:
    """Copy the packets of an MP4 or Matroska file that was written piece by piece.

    Frames, colours and times stay as they are; equal files give equal copies.

    Args:
        source: File that ``PieceEncoder`` made.
        target: File to write, of the same format whatever its name.
        metadata: Texts for its header.
        seconds: Length of the video, at which the sound ends.
        sound: Sound to copy beside the frames.

    Raises:
        OSError: It cannot be written, or the sound is damaged.
    """
    with ExitStack() as files:
        grown = files.enter_context(av.open(f"file:{source.absolute()}"))
        kind = "mp4" if "mp4" in grown.format.name else "matroska"
        whole = files.enter_context(
            av.open(f"file:{target.absolute()}", "w", format=kind, options=_MUXER_OPTIONS[kind])
        )
        whole.metadata.update(metadata)
        stream = grown.streams.video[0]
        # What decodes AV1 does not encode: opaque.
        copy = whole.add_stream_from_template(stream, opaque=True)
        copy.codec_tag = stream.codec_tag
        if stream.average_rate is not None:  # Matroska rounds times to 1 ms: they tell no rate
            copy.codec_context.framerate = stream.average_rate
        tracks = [_video_packets(grown, copy)]
        if sound is not None:
            clip = files.enter_context(open_container(sound.path))
            copies = add_sound_tracks(clip, whole)
            tracks.append(sound_packets(clip, copies, sound.start, seconds))
        for _, packet in heapq.merge(*tracks, key=itemgetter(0)):
            whole.mux(packet)


def _video_packets(
    grown: "InputContainer", copy: "VideoStream"
) -> "Iterator[tuple[Fraction, Packet[Any]]]":
    for packet in grown.demux(grown.streams.video[0]):
        if packet.size:
            time = (packet.dts or 0) * packet.time_base
            packet.stream = copy
            yield time, packet
