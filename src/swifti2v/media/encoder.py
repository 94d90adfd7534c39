"""Encoding of a clip piece by piece, each piece a complete stretch of the file.

Every piece gets its own encoder and muxer. What they give is cut to what may follow the pieces
before (MP4 fragments, Matroska clusters), so a file is playable after every piece, whatever
happens next.
"""

import io
import os
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, NamedTuple, TypedDict

import av
import numpy as np
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream
from numpy.typing import NDArray

from swifti2v.errors import MediaError
from swifti2v.media.container import matroska_clusters, mp4_fragments, muxer_name

CodecName = Literal["h264", "h265", "av1", "ffv1", "png"]


class EncodingOptions(TypedDict, total=False):
    """Compression of a video; missing keys take their defaults."""

    codec: CodecName
    """Default ``h264``. ``ffv1`` is lossless and needs ``.mkv``; ``png`` is a folder of images."""
    crf: int
    """Constant quality, default 16, lower is better: 0 to 51, 63 with ``av1``."""
    ten_bit: bool
    """10-bit 4:2:0 instead of 8-bit; default False. Not with ``ffv1``."""


class _Codec(NamedTuple):
    encoders: tuple[str, ...]  # FFmpeg's names, the first one there is is taken
    suffixes: tuple[str, ...]
    max_crf: int


_CODECS: dict[str, _Codec] = {
    "h264": _Codec(("libx264",), (".mp4", ".mkv"), 51),
    "h265": _Codec(("libx265",), (".mp4", ".mkv"), 51),
    "av1": _Codec(("libsvtav1", "libaom-av1"), (".mp4", ".mkv"), 63),
    "ffv1": _Codec(("ffv1",), (".mkv",), 51),
}
# Without B-frames (and their like) decoding order is display order, so pieces join exactly.
_ENCODER_OPTIONS = {
    "libx264": {"preset": "medium"},
    "libx265": {"preset": "medium", "x265-params": "log-level=error:bframes=0"},
    "libsvtav1": {"preset": "8"},
    "libaom-av1": {"cpu-used": "6", "row-mt": "1"},
    "ffv1": {"level": "3", "slicecrc": "1"},
}
_YUV_FLAGS = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
_BT709, _RGB = 1, 0  # ITU-T H.273, tables 2 to 4
_LIMITED, _FULL = 1, 2  # FFmpeg's AVCOL_RANGE_MPEG and _JPEG
_KEYFRAME_SECONDS = 2


def require_codec_fits(suffix: str, codec: str) -> None:
    """Refuse a codec that is unknown, is not built in, or that the file type cannot hold.

    Raises:
        MediaError: The codec is refused; the message names one that works.
    """
    if codec not in _CODECS:
        raise MediaError(f"codec {codec!r} is unknown; use one of {', '.join(_CODECS)}")
    if suffix.lower() not in _CODECS[codec].suffixes:
        raise MediaError(
            f"output suffix {suffix!r} does not fit codec {codec}; "
            f"use {' or '.join(_CODECS[codec].suffixes)}"
        )
    if not set(_CODECS[codec].encoders) & av.codecs_available:
        raise MediaError(f"this build of PyAV has no encoder for {codec}; use h264")


@dataclass
class PieceEncoder:
    """Encodes consecutive pieces of one clip; joined in order they are one file."""

    suffix: str
    """``.mp4`` or ``.mkv``."""
    height: int
    """Pixels, even."""
    width: int
    """Pixels, even."""
    rate: Fraction
    """Frames per second."""
    metadata: dict[str, str]
    """Texts for the header, which comes with the first piece."""
    codec: CodecName = "h264"
    crf: int = 16
    ten_bit: bool = False
    _num_pieces: int = field(default=0, init=False)
    _num_frames: int = field(default=0, init=False)
    _parameters: bytes | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        require_codec_fits(self.suffix, self.codec)
        limit = _CODECS[self.codec].max_crf
        if not 0 <= self.crf <= limit:
            raise MediaError(f"crf {self.crf} does not fit; {self.codec} takes 0 (best) to {limit}")
        if self.ten_bit and self.codec == "ffv1":
            raise MediaError("ten_bit does not go with ffv1, which keeps the 8-bit frames exactly")
        if self.height % 2 or self.width % 2:
            raise MediaError(
                f"size {self.width}x{self.height} does not fit; both sides must be even"
            )
        self._encoder = next(
            name for name in _CODECS[self.codec].encoders if name in av.codecs_available
        )

    def encode(self, frames: NDArray[np.uint8]) -> bytes:
        """Encode the next piece.

        Args:
            frames: ``[T, height, width, 3]``, at least one frame.

        Returns:
            Bytes to append to the file; those of the first piece start with the header.

        Raises:
            MediaError: The encoder refused.
        """
        buffer = io.BytesIO()
        try:
            with av.open(
                buffer, "w", format=self._format, options=self._muxer_options()
            ) as container:
                container.metadata.update(self.metadata)
                self._encode_into(container, frames)
        except av.FFmpegError as error:
            raise MediaError(
                f"{self._encoder} cannot encode {self.width}x{self.height} ({error.strerror}); "
                "try codec h264"
            ) from error
        data = buffer.getvalue()
        if self._num_pieces:
            data = mp4_fragments(data) if self._format == "mp4" else matroska_clusters(data)
        self._num_pieces += 1
        self._num_frames += len(frames)
        return data

    @property
    def _format(self) -> str:
        return muxer_name(self.suffix)

    def _muxer_options(self) -> dict[str, str]:
        if self._format == "matroska":
            # Sizes stay open, so that clusters can be appended; equal frames give equal bytes.
            return {"live": "1", "fflags": "+bitexact"}
        flags = "frag_keyframe+empty_moov+default_base_moof+skip_trailer+use_metadata_tags"
        if self._num_pieces:
            flags += "+frag_discont"  # times go on from the pieces before
        return {
            "movflags": flags,
            "fragment_index": str(self._num_pieces + 1),
            "avoid_negative_ts": "disabled",  # else every piece would start at time zero
        }

    def _encode_into(self, container: OutputContainer, frames: NDArray[np.uint8]) -> None:
        stream = self._add_stream(container)
        for index, frame in enumerate(frames):
            picture = self._to_picture(frame)
            picture.pts, picture.time_base = self._num_frames + index, 1 / self.rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        parameters = bytes(stream.codec_context.extradata or b"")
        if self._parameters not in (None, parameters):  # the header describes all pieces
            raise MediaError(f"{self._encoder} changed its parameters mid-clip; try codec h264")
        self._parameters = parameters

    def _add_stream(self, container: OutputContainer) -> VideoStream:
        options = dict(_ENCODER_OPTIONS[self._encoder])
        if self.codec != "ffv1":
            options["crf"] = str(self.crf)
        if self._encoder == "libsvtav1":
            os.environ.setdefault("SVT_LOG", "1")  # the only switch for its chatter on stderr
        stream = container.add_stream(self._encoder, rate=self.rate, options=options)
        assert isinstance(stream, VideoStream)
        context = stream.codec_context
        context.width, context.height = self.width, self.height
        context.pix_fmt = self._pixel_format
        context.time_base = 1 / self.rate
        context.max_b_frames = 0
        context.gop_size = max(1, round(_KEYFRAME_SECONDS * self.rate))
        context.color_primaries = context.color_trc = _BT709
        context.colorspace = _RGB if self.codec == "ffv1" else _BT709
        context.color_range = _FULL if self.codec == "ffv1" else _LIMITED
        if self.codec == "h265" and self._format == "mp4":
            context.codec_tag = "hvc1"  # Apple players show no other
        return stream

    @property
    def _pixel_format(self) -> str:
        if self.codec == "ffv1":
            return "bgr0"
        return "yuv420p10le" if self.ten_bit else "yuv420p"

    def _to_picture(self, frame: NDArray[np.uint8]) -> VideoFrame:
        source = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        if self.codec == "ffv1":
            picture = source.reformat(format=self._pixel_format)
            picture.colorspace, picture.color_range = _RGB, _FULL
        else:
            picture = source.reformat(
                format=self._pixel_format,
                dst_colorspace="ITU709",
                dst_color_range="MPEG",
                interpolation=_YUV_FLAGS,
            )
            picture.colorspace, picture.color_range = _BT709, _LIMITED
        picture.color_primaries = picture.color_trc = _BT709
        return picture
