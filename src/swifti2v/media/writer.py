"""Writing of frames while they are made: a video file or numbered PNGs, on a thread of its own."""

import logging
import math
import os
import queue
import re
import threading
from abc import ABC, abstractmethod
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Self, Unpack

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from swifti2v.errors import MediaError, ShapeError
from swifti2v.media.encoder import EncodingOptions, PieceEncoder, require_codec_fits
from swifti2v.media.indexing import index_file
from swifti2v.media.sound import Sound, require_sound_fits
from swifti2v.storage import whole_file

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".mkv")
_DEFAULT_PATTERN = "%05d.png"


def open_writer(
    path: str | Path,
    *,
    height: int,
    width: int,
    fps: float = 16,
    metadata: dict[str, str] | None = None,
    sound: Sound | None = None,
    queue_size: int = 2,
    **encoding: Unpack[EncodingOptions],
) -> "FrameWriter":
    """Open the writer that the path asks for.

    Args:
        path: ``.mp4`` or ``.mkv`` gives a ``VideoWriter``; a pattern such as
            ``frames/%05d.png``, or with codec ``png`` a folder, a ``PngSequenceWriter``.
        height: Pixels.
        width: Pixels.
        fps: Frames per second; not stored with PNGs.
        metadata: Texts to store.
        sound: Sound to copy beside the frames; PNGs have none.
        queue_size: Pieces that may wait to be written before ``write`` blocks.
        **encoding: ``codec``, ``crf`` and ``ten_bit``; PNGs do without the last two.

    Raises:
        MediaError: Nothing can be written at ``path``, or an option is out of range.
    """
    if is_png_target(Path(path), encoding.get("codec")):
        if "crf" in encoding or encoding.get("ten_bit"):
            raise MediaError("PNGs keep the 8-bit frames exactly; leave crf and ten_bit out")
        return PngSequenceWriter(
            path, height=height, width=width, metadata=metadata, queue_size=queue_size
        )
    return VideoWriter(
        path,
        height=height,
        width=width,
        fps=fps,
        metadata=metadata,
        sound=sound,
        queue_size=queue_size,
        **encoding,
    )


def require_writable(path: str | Path, codec: str = "h264") -> None:
    """Check that output can be written at a path, before any work; nothing is created.

    Args:
        path: As for ``open_writer``. An existing video file may be replaced; a folder must
            hold no PNGs yet.
        codec: Codec of the video file; the suffix must fit it.

    Raises:
        MediaError: The folder is missing or not writable, ``path`` is a folder where a file is
            meant, or the suffix does not fit.
    """
    path = Path(path)
    if is_png_target(path, codec):
        _require_png_target(path)
        return
    if path.is_dir():
        raise MediaError(
            f"output {path} is a folder; give a file name such as clip.mp4, or --codec png for PNGs"
        )
    if not path.suffix:
        raise MediaError(
            f"output {path} has no suffix; name a video, such as {path.name}.mp4, or give "
            "--codec png for a folder of PNGs"
        )
    require_codec_fits(path.suffix, codec)
    _require_folder(path.parent)
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise MediaError(f"output {path} cannot be replaced; choose another name")


def is_png_target(path: Path, codec: str | None) -> bool:
    """Whether frames become PNGs at this path, rather than a video file."""
    return codec == "png" or path.suffix.lower() == ".png"


def _png_folder_and_pattern(path: Path) -> tuple[Path, str]:
    if path.suffix.lower() == ".png" and not path.is_dir():
        return path.parent, path.name
    return path, _DEFAULT_PATTERN


def _require_png_target(path: Path) -> None:
    if path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir():
        raise MediaError(
            f"output {path} is a video; with codec png give a folder, or a name such as %05d.png"
        )
    folder, pattern = _png_folder_and_pattern(path)
    if not re.fullmatch(r"[^%]*%(0\d+)?d[^%]*", pattern):
        raise MediaError(f"output {path} names one PNG; give a folder or a name such as %05d.png")
    if folder.exists() or folder != path:
        _require_folder(folder)
    else:
        _require_folder(folder.parent)
    if next(folder.glob("*.png"), None) is not None:
        raise MediaError(f"output folder {folder} already holds PNGs; give an empty one")


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise MediaError(f"output folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MediaError(f"output folder {folder} is not writable; choose another one")


class FrameWriter(ABC):
    """A context manager that saves pieces of a clip in order, on a thread of its own.

    At most ``queue_size`` pieces wait, so memory does not grow with the clip. Leaving the
    context, by an error too, finishes the pieces that were handed over.
    """

    def __init__(self, path: Path, height: int, width: int, queue_size: int) -> None:
        if height < 1 or width < 1:
            raise ShapeError(
                f"size {width}x{height} is not possible; both sides must be at least 1"
            )
        if queue_size < 1:
            raise MediaError(f"queue_size is {queue_size}; it must be at least 1")
        self.path = path
        self._frame_shape = (height, width, 3)
        self._queue: queue.Queue[NDArray[np.uint8] | None] = queue.Queue(queue_size)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._is_closed = False
        self._num_frames_written = 0

    @property
    def num_frames_written(self) -> int:
        """Frames that are in the file by now and stay there if the process is killed."""
        return self._num_frames_written

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Hand over the next piece; waits while the queue is full.

        Args:
            frames: ``[T, height, width, 3]`` uint8, T at least 1. Must not be changed after.
                A piece starts with a key frame: hand over segments rather than single frames.

        Raises:
            ShapeError: ``frames`` is not as stated.
            MediaError: An earlier piece could not be written, or the writer is closed.
        """
        if self._is_closed:
            raise MediaError(f"output {self.path} is closed; nothing more can be written")
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != self._frame_shape:
            raise ShapeError(
                f"frames for {self.path} must be uint8 [T, {self._frame_shape[0]}, "
                f"{self._frame_shape[1]}, 3]; these are {frames.dtype} {frames.shape}"
            )
        if len(frames) == 0:
            raise ShapeError(f"a piece for {self.path} must hold at least one frame")
        if self._error is not None:
            raise self._error
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="frame-writer", daemon=True)
            self._thread.start()
        self._queue.put(frames)

    def close(self) -> None:
        """Wait until all is written and finish the output; a second call does nothing.

        Raises:
            MediaError: A piece could not be written (those before it are kept), or there
                was none.
        """
        if self._is_closed:
            return
        self._finish()
        if self._error is not None:
            raise self._error
        if self._num_frames_written == 0:
            raise MediaError(f"no frames were written to {self.path}; it was not created")
        self._complete()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, _: object) -> None:
        if kind is None:
            self.close()
            return
        self._finish()
        if self._error is not None and self._error is not error:
            logger.warning("%s", self._error)

    def _finish(self) -> None:
        self._is_closed = True
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        self._close_output()

    def _run(self) -> None:
        # After an error the queue is still emptied, so that ``write`` never waits for ever.
        while (frames := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._save(frames)
                except BaseException as error:
                    self._error = error

    def _to_media_error(self, error: OSError) -> MediaError:
        return MediaError(
            f"writing {self.path} failed ({error.strerror}); its first "
            f"{self._num_frames_written} frames are kept; make room or choose another place"
        )

    @abstractmethod
    def _save(self, frames: NDArray[np.uint8]) -> None:
        """Write a piece and count its frames."""

    def _close_output(self) -> None:
        """Release the resources of the output."""
        return

    def _complete(self) -> None:
        """Add what only a whole clip can have."""
        return


class DiscardingWriter(FrameWriter):
    """Counts frames and writes none: of a process that shares a clip with the one that writes.

    Args:
        path: The video of that one.
        height: Pixels.
        width: Pixels.
    """

    def __init__(self, path: Path, height: int, width: int) -> None:
        super().__init__(path, height, width, queue_size=1)

    def _save(self, frames: NDArray[np.uint8]) -> None:
        self._num_frames_written += len(frames)


class VideoWriter(FrameWriter):
    """Writes an MP4 or MKV that is playable after every piece.

    Colours are BT.709, limited range, tagged so; ``ffv1`` keeps RGB exactly. A piece is
    encoded on its own and appended whole, so neither an error nor a killed process costs
    pieces written before. The same pieces give the same decoded frames. ``close`` puts a file
    with the same frames, its length and an index in the place of the one that grew.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        height: int,
        width: int,
        fps: float = 16,
        metadata: dict[str, str] | None = None,
        sound: Sound | None = None,
        queue_size: int = 2,
        **encoding: Unpack[EncodingOptions],
    ) -> None:
        """Check everything; the file is created, or replaced, with the first piece.

        Args:
            path: ``.mp4`` or ``.mkv``.
            height: Pixels, even.
            width: Pixels, even.
            fps: Frames per second.
            metadata: Texts to store in the header (see ``read_metadata``).
            sound: Sound that ``close`` copies beside the frames, as far as they go.
            queue_size: Pieces that may wait before ``write`` blocks.
            **encoding: ``codec``, ``crf`` and ``ten_bit``.

        Raises:
            MediaError: Nothing can be written at ``path``, or an option is out of range.
        """
        super().__init__(Path(path), height, width, queue_size)
        if not (math.isfinite(fps) and 0 < fps <= 1000):
            raise MediaError(f"fps is {fps}; it must be above 0 and at most 1000")
        require_writable(self.path, encoding.get("codec", "h264"))
        self._encoder = PieceEncoder(
            suffix=self.path.suffix,
            height=height,
            width=width,
            rate=Fraction(fps).limit_denominator(1001),  # 30000/1001 and its like stay exact
            metadata=dict(metadata or {}),
            **encoding,
        )
        if sound is not None:
            require_sound_fits(self.path.suffix, sound)
        self._sound = sound
        self._file: BinaryIO | None = None

    def _save(self, frames: NDArray[np.uint8]) -> None:
        data = self._encoder.encode(frames)
        try:
            self._append(data)
        except OSError as error:
            raise self._to_media_error(error) from error
        self._num_frames_written += len(frames)

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self._file = self.path.open("wb", buffering=0)
        size = self._file.tell()
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(size)  # the older part stays playable
            raise

    def _close_output(self) -> None:
        if self._file is not None:
            self._file.close()
            if self._num_frames_written == 0:
                self.path.unlink(missing_ok=True)

    def _complete(self) -> None:
        try:
            with whole_file(self.path) as unfinished:
                seconds = self._num_frames_written / self._encoder.rate
                index_file(self.path, unfinished, self._encoder.metadata, seconds, self._sound)
        except (OSError, av.FFmpegError, MediaError) as error:
            logger.warning(
                "%s is complete, but has no %s: %s",
                self.path,
                "sound, and no index" if self._sound else "index for players to seek by",
                getattr(error, "strerror", error),
            )


class PngSequenceWriter(FrameWriter):
    """Writes numbered PNGs, from 0; each one is there whole or not at all."""

    def __init__(
        self,
        path: str | Path,
        *,
        height: int,
        width: int,
        metadata: dict[str, str] | None = None,
        queue_size: int = 2,
    ) -> None:
        """Check everything; a folder is created with the first piece.

        Args:
            path: A folder, or a pattern in an existing folder such as ``frames/%05d.png``.
            height: Pixels.
            width: Pixels.
            metadata: Texts to store in every PNG (see ``read_metadata``).
            queue_size: Pieces that may wait before ``write`` blocks.

        Raises:
            MediaError: Nothing can be written at ``path``, or it holds PNGs already.
        """
        super().__init__(Path(path), height, width, queue_size)
        _require_png_target(self.path)
        self._folder, self._pattern = _png_folder_and_pattern(self.path)
        self._texts = PngImagePlugin.PngInfo()
        for key, value in (metadata or {}).items():
            self._texts.add_itxt(key, value)

    def _save(self, frames: NDArray[np.uint8]) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
            for frame in frames:
                self._save_frame(frame)
        except OSError as error:
            raise self._to_media_error(error) from error

    def _save_frame(self, frame: NDArray[np.uint8]) -> None:
        path = self._folder / (self._pattern % self._num_frames_written)
        with whole_file(path) as unfinished:
            Image.fromarray(frame).save(unfinished, format="PNG", pnginfo=self._texts)
        self._num_frames_written += 1
