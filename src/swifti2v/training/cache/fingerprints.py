"""Keys of files and entries, so that a cache never returns an entry of another file."""

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from swifti2v.units import MB

ENDS_BYTES = MB
"""Bytes of the head and of the tail of a file that ``hash_source`` reads."""


def hash_source(source: Path | BinaryIO) -> str:
    """SHA-256 of a file's size, first and last MB: changes with any export, costs one read.

    Raises:
        OSError: The file cannot be read.
    """
    if isinstance(source, Path):
        with source.open("rb") as file:
            return hash_source(file)
    size = source.seek(0, 2)
    digest = hashlib.sha256(f"{size} ".encode())
    source.seek(0)
    digest.update(source.read(ENDS_BYTES))
    if size > ENDS_BYTES:
        source.seek(max(ENDS_BYTES, size - ENDS_BYTES))
        digest.update(source.read(ENDS_BYTES))
    return digest.hexdigest()


def make_key(*parts: str | int | float) -> str:
    """Key of a cache's entry that depends on several things, such as a clip and a window."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
