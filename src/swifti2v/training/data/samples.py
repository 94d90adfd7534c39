"""A training set: samples whose media lies in files, tar archives or datasets, and what was refused."""

import hashlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from swifti2v.errors import InputError, MediaError

NUM_PIECES, PIECE_BYTES = 8, 4096
"""Pieces of a clip that its fingerprint reads: a few milliseconds, where a whole clip takes a
second."""
MediaKind = Literal["video", "image"]
"""Kind of a sample's media."""


class Media(Protocol):
    """Place of a sample's media; picklable, and holds nothing open."""

    @property
    def name(self) -> str:
        """Name for messages."""
        ...

    def open(self) -> Path | BinaryIO:
        """A file's path, or its content as a seekable file that the caller closes.

        Raises:
            MediaError: It cannot be read any more.
        """
        ...

    def stamp(self) -> tuple[str | int, ...]:
        """Place, size and time of change: another stamp is another content.

        Raises:
            OSError: It is not there any more.
        """
        ...

    def fingerprint(self) -> str:
        """SHA-256 of the content's size and of pieces of it: a copy has the same.

        Raises:
            OSError: It cannot be read.
            MediaError: It is not what it was.
        """
        ...


@dataclass(frozen=True, slots=True)
class MediaFile:
    """A file of its own."""

    path: Path
    """Path of the file."""

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def open(self) -> Path:
        """The path; whether it can be read shows later."""
        return self.path

    def stamp(self) -> tuple[str | int, ...]:
        """Path, size and time of change of the file."""
        return _stamp_file(self.path)

    def fingerprint(self) -> str:
        """Fingerprint of the file."""
        with self.path.open("rb") as file:
            return _fingerprint(file, 0, file.seek(0, io.SEEK_END))


@dataclass(frozen=True, kw_only=True, slots=True)
class TarMember:
    """A member of an uncompressed tar archive."""

    archive: Path
    """The archive."""
    member: str
    """Name within it."""
    offset: int
    """Bytes before the content."""
    num_bytes: int
    """Size of the content."""

    @property
    def name(self) -> str:
        """Archive and member."""
        return f"{self.archive}/{self.member}"

    def open(self) -> BinaryIO:
        """The content, in memory.

        Raises:
            MediaError: The archive is gone or shorter than it was.
        """
        try:
            with self.archive.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.num_bytes)
        except OSError as error:
            raise MediaError(f"{self.archive} cannot be read: {error.strerror}") from error
        if len(data) != self.num_bytes:
            raise MediaError(f"{self.archive} is cut off within {self.member}; copy it again")
        return io.BytesIO(data)

    def stamp(self) -> tuple[str | int, ...]:
        """Stamp of the archive, with the place in it."""
        return *_stamp_file(self.archive), self.offset, self.num_bytes

    def fingerprint(self) -> str:
        """Fingerprint of the member; the archive's other members are not read."""
        with self.archive.open("rb") as file:
            return _fingerprint(file, self.offset, self.num_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetRow:
    """A cell of a dataset that Hugging Face ``datasets`` saved to disk."""

    directory: Path
    """Directory that ``save_to_disk`` wrote."""
    split: str | None
    """Split of a ``DatasetDict``; None for a plain ``Dataset``."""
    index: int
    """Row, from 0."""
    column: str
    """Column of bytes, or of records with ``bytes`` (features ``Video`` and ``Image``)."""

    @property
    def name(self) -> str:
        """Directory, split and row."""
        return f"{self.directory}/{self.split}/{self.index}".replace("/None/", "/")

    def open(self) -> BinaryIO:
        """The content, in memory.

        Raises:
            InputError: ``datasets`` is not installed.
            MediaError: The dataset is not what it was.
        """
        try:
            table = load_dataset(self.directory, self.split)[self.index : self.index + 1]
            cell = table.column(self.column)[0].as_py()
        except (OSError, KeyError, IndexError) as error:
            raise MediaError(f"{self.name} cannot be read ({error}); copy it again") from error
        data = cell["bytes"] if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            raise MediaError(f"{self.name} holds no bytes; the dataset has changed")
        return io.BytesIO(data)

    def stamp(self) -> tuple[str | int, ...]:
        """Stamp of the dataset's files, with the row."""
        folder = self.directory / (self.split or "")
        return *_stamp_file(folder / "state.json"), self.index, self.column

    def fingerprint(self) -> str:
        """Fingerprint of the cell."""
        with self.open() as file:
            return _fingerprint(file, 0, file.seek(0, io.SEEK_END))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One clip or picture with its prompt; picklable."""

    id: str
    """Unique within the manifest, and the same each time it is read."""
    media: Media
    """Place of the clip or picture."""
    kind: MediaKind
    """Kind of the media."""
    prompt: str
    """Never empty."""
    fps: float | None = None
    """Frames a second as the manifest states them; the file must agree."""
    start: float = 0.0
    """Seconds after the first frame at which the part to use begins."""
    end: float | None = None
    """Seconds after the first frame at which it ends; None goes to the end of the file."""
    width: int | None = None
    """Pixels as the manifest states them; the file must agree."""
    height: int | None = None
    """Pixels as the manifest states them; the file must agree."""
    split: str | None = None
    """Such as ``train``."""
    weight: float = 1.0
    """Weight in the draw beside other samples, above 0."""
    source: str | None = None
    """The collection it is from."""
    reference: Path | None = None
    """Small clip made from this one by Stage I (a stage-transition sample), beginning at ``start``.

    Source: SwiftI2V, arXiv:2605.06356, section 3.2 (stage-transition training).
    """

    def open(self) -> Path | BinaryIO:
        """The media: a path, or a seekable binary file that the caller closes."""
        return self.media.open()


@dataclass(frozen=True, slots=True)
class Remark:
    """Note on a sample for the user."""

    id: str
    """Id of the sample; the row if it has no id."""
    reason: str
    """``cause: detail``; the cause reads the same for all samples of its kind."""
    uncaptioned: Sample | None = None
    """Sample that it would be with a caption, if that alone is missing; its prompt is empty."""

    @property
    def cause(self) -> str:
        """The reason without its detail."""
        return self.reason.partition(": ")[0]


class Reject(Remark):
    """A sample that cannot be trained on."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that was listed: what can be used, and what cannot."""

    samples: tuple[Sample, ...]
    """Samples in the order of the manifest."""
    rejects: tuple[Reject, ...]
    """Refused while reading; media were not opened yet."""


@contextmanager
def local_media(sample: Sample) -> Iterator[Path]:
    """A path that a sample's media can be read from within the block.

    Media that are no file of their own are copied to a temporary one.

    Raises:
        MediaError: Also in place of those of the block, naming the sample.
    """
    path = None
    try:
        media = sample.open()
        if isinstance(media, Path):
            yield (path := media)
            return
        with tempfile.TemporaryDirectory(prefix="swifti2v-") as folder, media:
            path = Path(folder) / f"media{Path(sample.media.name).suffix}"
            with path.open("wb") as copy:
                shutil.copyfileobj(media, copy)
            yield path
    except MediaError as error:
        text = str(error) if path is None else str(error).replace(str(path), sample.media.name)
        raise MediaError(f"sample {sample.id}: {text}") from error


def _fingerprint(file: BinaryIO, start: int, size: int) -> str:
    """Fingerprint of a part of a file: its size, and evenly spaced pieces from head to tail."""
    digest = hashlib.sha256(f"{size} ".encode())
    last = max(0, size - PIECE_BYTES)
    for place in sorted({last * number // (NUM_PIECES - 1) for number in range(NUM_PIECES)}):
        file.seek(start + place)
        digest.update(file.read(min(PIECE_BYTES, size - place)))
    return digest.hexdigest()


def _stamp_file(path: Path) -> tuple[str | int, ...]:
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns


@lru_cache(maxsize=8)
def load_dataset(directory: Path, split: str | None) -> Any:
    """A ``datasets.Dataset`` saved to disk, in Arrow format: nothing is decoded.

    Raises:
        InputError: ``datasets`` is not installed.
    """
    loaded = import_extra("datasets").load_from_disk(str(directory))
    return (loaded if split is None else loaded[split]).with_format("arrow")


def import_extra(name: str) -> Any:
    """Import a module that only the extra ``train`` installs.

    Raises:
        InputError: It is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise InputError(
            f"this data needs {package}, which is not installed: pip install 'swifti2v[train]'"
        ) from error
