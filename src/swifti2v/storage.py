"""Files and directories that are there whole or not at all, also after a kill or a power cut."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".writing"
"""In the name of what is not whole yet."""


@contextmanager
def whole_file(path: Path, ending: str = "") -> Iterator[Path]:
    """A name to write a file under; at the end of the block it takes the place of ``path``.

    After an error nothing of it is left, and what was at ``path`` stays.

    Args:
        path: Where the file shall be.
        ending: Of the other name, for writers that go by it, such as ``.mkv``.
    """
    unfinished = path.with_name(f"{path.name}{UNFINISHED}{ending}")
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

    After an error nothing of it is left, and what was at ``path`` stays.

    Args:
        path: Where the directory shall be.
    """
    unfinished = path.with_name(f"{path.name}{UNFINISHED}")
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
    """Put a whole file in place, or leave what was there; text is written as UTF-8."""
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content if isinstance(content, bytes) else content.encode())


def sync(path: Path) -> None:
    """Make a file's content, or a directory's names, survive a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
