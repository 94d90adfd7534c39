"""A finished video file in the form that players and editors expect: with length and index."""

from pathlib import Path
from typing import TYPE_CHECKING

import av

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer

# The index comes before the frames, so that a browser seeks in what it has not loaded yet.
_MUXER_OPTIONS = {
    "mp4": {"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact"},
    "matroska": {"fflags": "+bitexact"},
}


def index_file(source: Path, target: Path, metadata: dict[str, str]) -> None:
    """Copy the packets of an MP4 or Matroska file that was written piece by piece.

    Frames, colours and times stay as they are; equal files give equal copies.

    Args:
        source: File that ``PieceEncoder`` made.
        target: File to write, of the same format whatever its name.
        metadata: Texts for its header.

    Raises:
        OSError: It cannot be written.
    """
    with av.open(f"file:{source.absolute()}") as grown:
        kind = "mp4" if "mp4" in grown.format.name else "matroska"
        with av.open(
            f"file:{target.absolute()}", "w", format=kind, options=_MUXER_OPTIONS[kind]
        ) as whole:
            whole.metadata.update(metadata)
            _copy(grown, whole)


def _copy(grown: "InputContainer", whole: "OutputContainer") -> None:
    stream = grown.streams.video[0]
    copy = whole.add_stream_from_template(stream, opaque=True)  # what decodes AV1 does not encode
    copy.codec_tag = stream.codec_tag
    for packet in grown.demux(stream):
        if packet.size:
            packet.stream = copy
            whole.mux(packet)
