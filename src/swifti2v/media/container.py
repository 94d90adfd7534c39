"""The outermost structure of MP4, Matroska and AVI files: just enough to cut, join and check."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_EBML_HEADER = 0x1A45DFA3
_MATROSKA_SEGMENT = 0x18538067
_MATROSKA_CLUSTER = 0x1F43B675


def muxer_name(suffix: str) -> str:
    """FFmpeg's name of the format that a video file's suffix asks for."""
    return "mp4" if suffix.lower() == ".mp4" else "matroska"


def mp4_fragments(data: bytes) -> bytes:
    """The ``moof`` and ``mdat`` boxes of a fragmented MP4: what may follow another one's."""
    boxes, position = [], 0
    while position < len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        if size == 1:  # a 64-bit size follows (ISO/IEC 14496-12, section 4.2)
            (size,) = struct.unpack_from(">Q", data, position + 8)
        if kind in (b"moof", b"mdat"):
            boxes.append(data[position : position + size])
        position += size
    return b"".join(boxes)


def matroska_clusters(data: bytes) -> bytes:
    """All from the first cluster of a live Matroska file: what may follow another one's."""
    position = 0
    while True:
        kind, position_of_size = _vint(data, position, keep_marker=True)
        if kind == _MATROSKA_CLUSTER:
            return data[position:]
        size, body = _vint(data, position_of_size)
        position = body if kind == _MATROSKA_SEGMENT else body + size


def _vint(data: bytes, position: int, keep_marker: bool = False) -> tuple[int, int]:
    """A variable-length integer (RFC 8794, section 4) and the position after it."""
    length = 9 - data[position].bit_length()
    value = int.from_bytes(data[position : position + length], "big")
    return value if keep_marker else value & ((1 << 7 * length) - 1), position + length


def is_cut_off(path: Path) -> bool:
    """Whether the file's own structure says that it should be longer than it is."""
    file_size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if head[4:8] == b"ftyp":
            ends = _mp4_box_ends(file, file_size)
        elif head[:4] == b"RIFF":
            ends = iter([8 + int.from_bytes(head[4:8], "little")])
        elif head[:4] == _EBML_HEADER.to_bytes(4, "big"):
            ends = _matroska_end(head)
        else:
            return False
        return any(end > file_size for end in ends)


def _mp4_box_ends(file: BinaryIO, file_size: int) -> Iterator[int]:
    position = 0
    while position < file_size:
        file.seek(position)
        head = file.read(16).ljust(16, b"\0")
        size, _, large_size = struct.unpack(">I4sQ", head)
        size = large_size if size == 1 else size
        if size == 0:  # the last box: it goes on to the end of the file
            return
        position += max(8, size)
        yield position


def _matroska_end(head: bytes) -> Iterator[int]:
    if len(head) < 5:  # not even the size of the first element is there
        yield 5
        return
    size, body = _vint(head, 4)
    position = body + size
    if position + 12 > len(head):
        return
    kind, position = _vint(head, position, keep_marker=True)
    size, body = _vint(head, position)
    is_unknown = size == (1 << 7 * (body - position)) - 1
    if kind == _MATROSKA_SEGMENT and not is_unknown:
        yield body + size
