"""Heads of weight files, read without PyTorch: names, shapes, and whether the file is whole."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from swifti2v.errors import ConfigError, LoadingError

SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
"""End of a shard's name, without its suffix."""
GGUF = ".gguf"
CONTROL = ".aria2"
"""Suffix of the file that aria2 keeps beside one that it has not finished, which has its full size."""
MOST_BYTES = 100_000_000
"""Most of a safetensors header, as the library itself allows."""


class Header(NamedTuple):
    """Head of a safetensors file."""

    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """Number type, such as ``F8_E4M3``, and shape by name."""


def list_shards(index: Path) -> list[str]:
    """Files that an index of shards names; of a damaged one none, its reader says so."""
    if not index.name.endswith(".index.json"):
        return []
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []


def read_header(file: Path) -> Header:
    """Read the head of a safetensors file.

    Raises:
        LoadingError: It is not one, or shorter than its head says.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            values: Any = json.loads(stream.read(length)) if length <= MOST_BYTES else None
        metadata = values.pop("__metadata__", {})
        tensors = {key: (t["dtype"], tuple(t["shape"])) for key, t in values.items()}
        end = max((int(t["data_offsets"][1]) for t in values.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise LoadingError(
            f"{file} is no safetensors file, or cut short ({error}); fetch it again"
        ) from None
    size, wanted = file.stat().st_size, 8 + length + end
    if size != wanted:
        raise LoadingError(
            f"{file} has {size:,} bytes of {wanted:,}: its download did not finish; fetch it again"
        )
    return Header(metadata, tensors)


def open_gguf(file: Path) -> Any:
    """The ``gguf.GGUFReader`` of a file, which it maps into memory.

    Raises:
        ConfigError: The package ``gguf`` is missing.
        LoadingError: A damaged file, or a type of weights that the package does not know.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError(f"{file} needs the package gguf: pip install 'swifti2v[gguf]'") from None
    try:
        return gguf.GGUFReader(file, "c")  # pages are copied when written to, which nobody does
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
        if "GGMLQuantizationType" in str(error):
            raise LoadingError(
                f"{file} has weights of a type that this version of gguf does not know ({error}); "
                "update it with pip install -U gguf, or take another file, such as Q4_K_M or Q8_0"
            ) from None
        raise LoadingError(f"{file} is damaged or cut short ({error}); fetch it again") from None


def require_undamaged(place: Path) -> None:
    """Refuse files whose head says that they are longer; others are judged when they are read.

    Args:
        place: A file, or a folder with weights.

    Raises:
        LoadingError: See ``read_header`` and ``open_gguf``.
    """
    for file in [place] if place.is_file() else sorted(place.glob("*.safetensors")):
        if file.with_name(f"{file.name}{CONTROL}").exists():
            raise LoadingError(f"{file} is not finished: go on with aria2, or fetch it again")
        if file.suffix == ".safetensors":
            read_header(file)
        elif file.suffix == GGUF:
            open_gguf(file)
