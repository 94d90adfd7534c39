"""The folder of a server: its database, its keys and one folder for each job."""

import errno
import os
import shutil
import sqlite3
from contextlib import AbstractContextManager
from pathlib import Path

from swifti2v.serving.clip_order import JobFolder
from swifti2v.storage import only_user

STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
"""Errors of a disk that takes nothing more."""


class DataDir:
    """Paths in the folder of a server; other users of the machine may not look into it.

    Args:
        path: Made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.database = self.path / "jobs.sqlite"
        self.keys = self.path / "keys.json"
        self.worker_lock = self.path / "worker.lock"
        self.jobs = self.path / "jobs"
        self.incoming = self.path / "incoming"
        """Folders of requests that are not accepted yet."""
        for folder in (self.jobs, self.incoming):
            folder.mkdir(exist_ok=True, mode=0o700)

    def only_server(self) -> AbstractContextManager[None]:
        """Hold the folder for one server within the block.

        Raises:
            InputError: Another server runs on it.
        """
        refusal = f"another server runs on {self.path}; choose another --data-dir"
        return only_user(self.path / "server.lock", refusal)

    def job(self, id: str) -> JobFolder:
        """The folder of an accepted job."""
        return JobFolder(self.jobs / id)

    def clear_job(self, id: str) -> None:
        """Remove the folder of a job."""
        shutil.rmtree(self.jobs / id, ignore_errors=True)

    def clear_leftovers(self, ids: set[str]) -> None:
        """Remove what a killed server left of requests, and folders of jobs that are forgotten.

        Args:
            ids: Jobs that are known.
        """
        leftovers = [
            *self.incoming.iterdir(),
            *(f for f in self.jobs.iterdir() if f.name not in ids),
        ]
        for folder in leftovers:
            shutil.rmtree(folder, ignore_errors=True)


def find_storage_fault(error: BaseException | None) -> str | None:
    """Say why a disk takes nothing more; None for any other error."""
    if isinstance(error, OSError) and error.errno in STORAGE:
        return os.strerror(error.errno)
    full_or_read_only = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR}
    if isinstance(error, sqlite3.Error) and _sqlite_code(error) in full_or_read_only:
        return str(error)
    return None


def _sqlite_code(error: sqlite3.Error) -> int:
    """Primary result code; errors that SQLite did not raise itself have none."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
