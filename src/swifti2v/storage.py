"""Files and directories that are complete or absent, also after a kill or a power cut."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swifti2v.errors import InputError

UNFINISHED = ".writing"
"""Part of the name of an unfinished file or directory."""
MAX_NAME_BYTES = 255
"""Longest file name of usual file systems."""


@contextmanager
def whole_file(path: Path, ending: str = "") -> Iterator[Path]:
    """A name to write a file under; at the end of the block it takes the place of ``path``.

    After an error the temporary file is gone, and the old file at ``path`` stays.

    Args:
        path: Final path of the file.
        ending: Suffix of the temporary name, for writers that need one, such as ``.mkv``.
    """
    unfinished = _unfinished(path, ending)
    try:
        yield unfinished
        sync(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A name to make a directory under; at the end of the block it takes the place of ``path``.

    After an error the temporary directory is gone, and the old one at ``path`` stays.

    Args:
        path: Final path of the directory.
    """
    unfinished = _unfinished(path)
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        yield unfinished
        for part in (unfinished, *unfinished.rglob("*")):
            sync(part)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    unfinished.rename(path)  # if this fails, the new directory is all there is: it stays
    sync(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Put a complete file in place, or leave the old one; text is written by ``encode_text``."""
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content if isinstance(content, bytes) else encode_text(content))


def encode_text(text: str) -> bytes:
    """UTF-8; bytes of a file name that are not become escapes, which JSON reads back."""
    return text.encode(errors="backslashreplace")


def _unfinished(path: Path, ending: str = "") -> Path:
    """Another name beside a file's, no longer than a file system takes."""
    name = f"{path.name}{UNFINISHED}{ending}"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = f"{hashlib.sha256(os.fsencode(path.name)).hexdigest()}{UNFINISHED}{ending}"
    return path.with_name(name)


@contextmanager
def only_user(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock within the block; the end of the process frees it, too.

    Args:
        path: File of the lock, made if it is not there.
        refusal: Message of the error.

    Raises:
        InputError: Another process, or another block of this one, holds it.
    """
    with path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(refusal) from None
        yield


def sync(path: Path) -> None:
    """Make a file's content, or a directory's names, survive a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, or of all files of a directory in the order of their names."""
    digest = hashlib.sha256()
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(os.fsencode(file.relative_to(path)))
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def require_same_settings(
    stored: Mapping[str, Any], now: Mapping[str, Any], where: str, remedy: str
) -> None:
    """Refuse to continue work that began with other settings.

    Args:
        stored: Nested settings that JSON can hold.
        now: Requested settings.
        where: Name of the work, such as ``work dir out/run``.
        remedy: Advice besides giving the same settings again.

    Raises:
        InputError: Naming every setting that differs, and both values.
    """
    before, after = (json.loads(json.dumps(values)) for values in (stored, now))
    if differences := _differences(before, after):
        raise InputError(
            f"{where} was made with other settings: {'; '.join(differences)}; use the same "
            f"settings, or {remedy}"
        )


def _differences(stored: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        stored, now = dict(enumerate(stored)), dict(enumerate(now))
    if isinstance(stored, Mapping) and isinstance(now, Mapping):
        keys = [*now, *(key for key in stored if key not in now)]
        found = (_differences(stored.get(k), now.get(k), f"{name}.{k}".lstrip(".")) for k in keys)
        return [text for texts in found for text in texts]
    return [] if stored == now else [f"{name} is {stored!r} there and {now!r} now"]
