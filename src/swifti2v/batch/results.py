"""The folder of a batch: videos, a record of each, and what unfinished clips have done so far.

::

    lake.mp4            the videos
    results.jsonl       one line a clip, written when the batch ends
    records/lake.json   the same line, written as soon as the clip ends
    work/lake/          finished segments of a clip that is not finished
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from swifti2v.batch.rows import FILES, ClipRow, RowFiles
from swifti2v.config import parse_config, settings, to_dict
from swifti2v.errors import InputError, StorageError
from swifti2v.storage import encode_text, hash_file, only_user, require_same_settings, write_whole

MANIFEST = "results.jsonl"


@settings
class ClipRecord:
    """The end of one clip."""

    id: str
    status: Literal["completed", "failed"]
    row: dict[str, Any]
    """Fields of the ``ClipRow``."""
    video: str | None = None
    """Name of the video in the folder."""
    sha256: str | None = None
    """SHA-256 of the video's file."""
    num_bytes: int | None = None
    """Size of the video's file."""
    inputs_sha256: tuple[str, ...] = ()
    """SHA-256 of the photo, then of the clip if there is one."""
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: int | float | None = None
    seconds: dict[str, float] | None = None
    """Seconds of each stage in the last run, see ``RunReport``."""
    machine: str | None = None
    """Name of the machine that made it."""
    attempts: int = 1
    """Runs it took; more than one after a machine was lost."""
    error: str | None = None
    """Reason of a failure."""


class ResultFolder:
    """Results of a batch, on this machine, on a shared file system or in a store such as S3.

    Args:
        url: A path, or a URL that fsspec reads and writes. Its file system may need a package of
            its own, such as ``s3fs``.

    Raises:
        InputError: A URL of an unknown kind.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs: AbstractFileSystem
        try:
            self._fs, self._root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InputError(f"output folder {url} cannot be reached: {error}") from None
        self.is_local = isinstance(self._fs, LocalFileSystem)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder; on a local file system one batch at a time may use it.

        Raises:
            InputError: It cannot be written, or another batch uses it.
        """
        try:
            self._fs.makedirs(self._path("records"), exist_ok=True)
            self._fs.makedirs(self._path("work"), exist_ok=True)
            self._fs.pipe_file(self._path("work/.writable"), b"")
        except OSError as error:
            raise InputError(
                f"output folder {self.url} cannot be written ({error}); choose another one"
            ) from None
        if not self.is_local:
            yield
            return
        refusal = f"another batch writes to {self.url}; wait for its end or choose another folder"
        with only_user(Path(self._path("work/.lock")), refusal):
            yield

    def is_visible(self) -> bool:
        """Whether this machine sees the folder that ``open`` made."""
        return bool(self._fs.exists(self._path("work/.writable")))

    def find(self, row: ClipRow) -> ClipRecord | None:
        """The record of a clip that is finished; None where it has to be made.

        Raises:
            InputError: It was made from something else.
        """
        path = self._path(f"records/{row.id}.json")
        if not self._fs.exists(path):
            return None
        record = parse_config(ClipRecord, json.loads(self._fs.cat_file(path)), path)
        if record.status == "failed" or not self._is_whole(record):
            return None
        where, remedy = f"clip {row.id} in {self.url}", "another id or folder, or remove its record"
        require_same_settings(
            _without_files(record.row), _without_files(to_dict(row)), where, remedy
        )
        if self._have_changed(row, record):
            raise InputError(f"{where} was made from another photo or clip; use {remedy}")
        return record

    def save(self, record: ClipRecord) -> None:
        """Keep the record of a clip that has ended."""
        self._write(f"records/{record.id}.json", _line(record))

    def summarize(self, records: Sequence[ClipRecord]) -> str:
        """Write the manifest of results and return where it is."""
        self._write(MANIFEST, "".join(map(_line, records)))
        return self._path(MANIFEST)

    @contextmanager
    def workplace(self, row: ClipRow) -> Iterator["Workplace"]:
        """A folder on this machine to make a clip in; what earlier runs finished is there.

        It stays where the clip is not published.
        """
        if self.is_local:
            place = Path(self._path(f"work/{row.id}"))
            place.mkdir(exist_ok=True)
            yield Workplace(self, row, place)
            return
        with tempfile.TemporaryDirectory(prefix="swifti2v-") as name:
            place = Path(name)
            if self._fs.exists(self._path(f"work/{row.id}")):
                self._fs.get(self._path(f"work/{row.id}/"), f"{place}/", recursive=True)
            yield Workplace(self, row, place)

    def keep(self, file: Path, name: str) -> None:
        """Bring a file of a workplace to the store."""
        self._fs.put_file(str(file), self._path(name))

    def publish(self, row: ClipRow, video: Path) -> None:
        """Put a finished video in its place and forget what led to it."""
        if self.is_local:
            video.replace(self._path(video.name))
        else:
            self.keep(video, video.name)
        if self._fs.exists(self._path(f"work/{row.id}")):
            self._fs.rm(self._path(f"work/{row.id}"), recursive=True)

    def _is_whole(self, record: ClipRecord) -> bool:
        path = self._path(str(record.video))
        return bool(self._fs.exists(path)) and self._fs.size(path) == record.num_bytes

    def _have_changed(self, row: ClipRow, record: ClipRecord) -> bool:
        """Whether a file on this machine is another one than the clip was made from."""
        names = [row.image, *([row.motion] if row.motion else [])]
        pairs = zip(names, record.inputs_sha256, strict=True)
        return any("://" not in name and hash_file(Path(name)) != known for name, known in pairs)

    def _write(self, name: str, text: str) -> None:
        try:
            if self.is_local:
                write_whole(Path(self._path(name)), text)
            else:
                self._fs.pipe_file(self._path(name), encode_text(text))
        except OSError as error:
            raise StorageError(f"{self._path(name)} cannot be written ({error})") from None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class Workplace:
    """A folder on this machine in which one clip is made.

    Args:
        results: Where it goes.
        row: The clip.
        path: The folder.
    """

    def __init__(self, results: ResultFolder, row: ClipRow, path: Path) -> None:
        self._results = results
        self._row = row
        self.run = path / "run"
        """The work dir, see ``swifti2v.jobs.work_dir``."""
        self.video = path / f"{row.id}{'.mkv' if row.codec == 'ffv1' else '.mp4'}"
        motion = None if row.motion is None else self._fetch(row.motion, path)
        self.files = RowFiles(image=self._fetch(row.image, path), motion=motion)
        self._kept = set(self._list())

    def keep(self) -> None:
        """Bring what the run has finished to the results' store."""
        if self._results.is_local:
            return
        for file in self._list():
            if file not in self._kept:
                self._results.keep(file, f"work/{self._row.id}/run/{file.name}")
                self._kept.add(file)

    def publish(self) -> None:
        """Put the finished video in its place."""
        self._results.publish(self._row, self.video)

    def _list(self) -> list[Path]:
        return sorted(self.run.iterdir()) if self.run.is_dir() else []

    def _fetch(self, name: str, folder: Path) -> Path:
        """The file on this machine that a path or a URL names.

        Raises:
            InputError: There is nothing.
        """
        if "://" not in name:
            return Path(name)
        file = folder / Path(name).name
        try:
            fs, path = url_to_fs(name)
            fs.get_file(path, str(file))
        except (ImportError, ValueError, OSError) as error:
            raise InputError(f"{name} cannot be read: {error}") from None
        return file


def _without_files(row: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a row but the places of photo and clip, whose hashes are compared."""
    return {name: value for name, value in row.items() if name not in FILES}


def _line(record: ClipRecord) -> str:
    return json.dumps(to_dict(record), ensure_ascii=False) + "\n"
