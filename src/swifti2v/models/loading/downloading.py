"""Fetch what a preset needs: the total and the room for it first, then file by file.

A stopped download goes on where it ended. ``huggingface_hub`` 2.4 throws away what it has of a file
when it is stopped, so large files come through a file of our own beside the cache's, and enter the
cache when their hash is that on the Hub.
"""

import io
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from swifti2v.errors import LoadingError, StorageError
from swifti2v.models.loading.availability import RemoteFiles
from swifti2v.models.loading.sources import PEFT_CONFIG, cache_folder, parent
from swifti2v.storage import hash_file
from swifti2v.units import format_bytes

progress = logging.getLogger("swifti2v.progress")
LARGE = 20_000_000
"""Bytes from which a file is gone on with."""
MARGIN = 500_000_000
"""Bytes that must stay free."""


class Download(NamedTuple):
    """One file to fetch."""

    repo_id: str
    file: str
    commit: str
    num_bytes: int
    sha256: str | None
    """Hash of a large file."""

    def unfinished(self) -> Path:
        """Path of what is there of a large file."""
        return cache_folder(self.repo_id) / "blobs" / f"{self.sha256}.swifti2v-part"

    def missing_bytes(self) -> int:
        """Bytes that are still to come."""
        part = self.unfinished()
        return self.num_bytes - (part.stat().st_size if part.is_file() else 0)


def list_downloads(missing: Sequence[RemoteFiles]) -> list[Download]:
    """Ask the Hub for the files of what is missing, without those that are in the cache.

    Raises:
        LoadingError: The Hub cannot be reached, or has no such files.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    found: dict[tuple[str, str], Download] = {}
    for remote in missing:
        with _naming(remote.repo_id):
            info = HfApi().model_info(remote.repo_id, files_metadata=True)
        files = {file.rfilename: file for file in info.siblings or []}
        patterns = None
        if remote.pattern:
            beside = f"{parent(remote.pattern)}{PEFT_CONFIG}"
            patterns = [remote.pattern, f"{remote.pattern}/*", beside]
        names = list(filter_repo_objects(files, allow_patterns=patterns))
        if not [name for name in names if not name.endswith(PEFT_CONFIG)]:
            raise LoadingError(f"the Hub's {remote.repo_id!r} has no {remote.pattern}")
        for name in names:
            size, lfs = files[name].size or 0, files[name].lfs
            found[remote.repo_id, name] = Download(
                remote.repo_id, name, str(info.sha), size, lfs.sha256 if lfs else None
            )
    return [file for file in found.values() if not _is_cached(file)]


def _is_cached(file: Download) -> bool:
    return (cache_folder(file.repo_id) / "snapshots" / file.commit / file.file).is_file()


def require_room(files: Sequence[Download]) -> None:
    """Refuse to start if the disk of the cache cannot take all files.

    Raises:
        StorageError: Naming the bytes that are needed and free, and the variable that moves the
            cache.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    needed, free = sum(file.missing_bytes() for file in files), shutil.disk_usage(place).free
    if needed + MARGIN > free:
        raise StorageError(
            f"{format_bytes(needed)} are to be downloaded to {HF_HUB_CACHE}, which has "
            f"{format_bytes(free)} free; make room, set HF_HOME to a larger disk, or take a smaller "
            "--variant"
        )


def download(files: Sequence[Download], on_bytes: Callable[[int], None]) -> None:
    """Fetch files into the Hub's cache, telling of each; call it again to go on after a stop.

    Args:
        files: See ``list_downloads``.
        on_bytes: Called with the bytes that have come of all files.

    Raises:
        LoadingError: The Hub cannot be reached, or a file came with another hash.
        StorageError: The disk is full.
    """
    from huggingface_hub import hf_hub_download

    done = 0
    for number, file in enumerate(files, 1):
        size = format_bytes(file.num_bytes)
        progress.info("%d of %d: %s/%s, %s", number, len(files), file.repo_id, file.file, size)
        with _naming(file.repo_id):
            if file.sha256 is not None and file.num_bytes >= LARGE:
                _fetch_large(file, partial(_add, on_bytes, done))
            hf_hub_download(file.repo_id, file.file)
        done += file.num_bytes
        on_bytes(done)
    for repo_id, folder in {(file.repo_id, parent(file.file)) for file in files}:
        _note_absence(repo_id, f"{folder}{PEFT_CONFIG}")


def _add(on_bytes: Callable[[int], None], before: int, num_bytes: int) -> None:
    on_bytes(before + num_bytes)


class _Counted(io.BufferedWriter):
    """A file that says how many bytes have been written to it since it was opened."""

    def __init__(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._on_bytes, self._num_bytes = on_bytes, 0

    def write(self, data: Any) -> int:
        written = super().write(data)
        self._num_bytes += written
        self._on_bytes(self._num_bytes)
        return written


def _fetch_large(file: Download, on_bytes: Callable[[int], None]) -> None:
    """Bring a file to its place among the cache's blobs; ``hf_hub_download`` then links it."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import get_hf_file_metadata, http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    part = file.unfinished()
    blob = part.with_name(str(file.sha256))
    if blob.exists():
        return
    part.parent.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(file.repo_id, file.file, revision=file.commit)
    location = get_hf_file_metadata(url).location
    is_elsewhere = location.split("/")[2] != url.split("/")[2]
    headers = {
        k: v for k, v in build_hf_headers().items() if not is_elsewhere or k != "authorization"
    }
    with _Counted(part, on_bytes) as stream:
        http_get(
            location,
            stream,
            resume_size=stream.tell(),
            headers=headers,
            expected_size=file.num_bytes,
            displayed_filename=file.file,
        )
    if hash_file(part) != file.sha256:
        part.unlink()
        raise LoadingError(
            f"{file.repo_id}/{file.file} came with another SHA-256 than the Hub says and was "
            "deleted; run the same command again"
        )
    part.rename(blob)


def _note_absence(repo_id: str, file: str) -> None:
    """Let the cache remember that the Hub has no such file, so that no run asks for it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        hf_hub_download(repo_id, file)
    except (EntryNotFoundError, HfHubHTTPError, OSError):
        return


@contextmanager
def _naming(repo_id: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into ours."""
    try:
        yield
    except (LoadingError, StorageError):
        raise
    except OSError as error:
        if error.errno == 28:  # no space left on device
            raise StorageError(
                f"the disk is full while {repo_id} comes ({error}); make room and run the same "
                "command again, it goes on"
            ) from None
        raise _unreachable(repo_id, error) from None
    except Exception as error:  # of the HTTP library that the Hub's client uses, which varies
        raise _unreachable(repo_id, error) from None


def _unreachable(repo_id: str, error: Exception) -> LoadingError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return LoadingError(
        f"{repo_id} cannot be had from the Hub ({reason}); run the same command again, it goes on "
        "where it stopped"
    )
