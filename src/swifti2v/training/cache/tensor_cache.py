"""Expensive results on disk for repeated use: embeddings, latents, facts about files."""

import json
import logging
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swifti2v.errors import InputError, LoadingError, MediaError
from swifti2v.storage import UNFINISHED, require_same_settings, whole_file
from swifti2v.units import MB

logger = logging.getLogger(__name__)

FINGERPRINT_NAME = "fingerprint.json"
SHARD_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".index.jsonl"
SHARD_BYTES = 256 * MB
"""A shard is written when so many bytes wait."""
_KEY_CHARACTERS = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ._-")


class CachedTensors(NamedTuple):
    """Content of a key."""

    record: dict[str, Any]
    """Plain JSON values, such as what the tensors were made from."""
    tensors: dict[str, Tensor]
    """Tensors by name; may be empty."""


class _Place(NamedTuple):
    """Place of an entry."""

    shard: str
    names: tuple[str, ...]
    record: dict[str, Any]


class TensorCache:
    """A directory of safetensors shards, and which entry is in which of them.

    An entry holds tensors and a record of plain values. Entries wait in memory until they fill a shard; a shard is written under another name, synced
    and renamed, so that one under its own name is whole. Each process writes shards and an index
    of its own, so many may write into one directory at once; what others wrote shows after
    ``refresh``. Each shard says itself what it holds and of which settings: indexes only save
    reading it, and a missing one does not matter. A shard whose size is wrong is passed over with
    a warning and listed in ``damaged``: its entries count as missing and can be made again.

    An instance can be pickled and handed to worker processes; entries that wait are not copied.

    What a 2K clip takes: the latents of 81 frames of 2560x1408 are 48x21x88x160 values, 27 MB in
    bfloat16, target and reference 54 MB, so 90,000 clips 4,760 GB. Of a pair, the window of one
    segment (anchor, one context frame, three target frames: 5 of 21) is 12.9 MB, about a quarter;
    with two context and four target frames it is a third. Cache one window of each clip rather
    than whole clips, and the embeddings of a prompt without its padding.

    Args:
        directory: Made with the first shard.
        fingerprint: All that decides the values besides the source, as plain JSON values: VAE
            (see ``fingerprint_model``), size, dtype, version of the code.
        shard_bytes: Bytes of tensors to collect before a shard is written.

    Raises:
        InputError: The directory is of another fingerprint (the message names the fields that
            differ), is a file, or a value is out of range.

    Example:
        >>> cache = TensorCache(Path("cache"), {"vae": fingerprint_model(vae), "dtype": "bfloat16"})
        >>> key = make_key(hash_source(path), start, num_frames)
        >>> if (entry := cache.get(key)) is None:
        ...     cache.put(key, {"latents": latents}, {"source": path.name})
    """

    def __init__(
        self, directory: Path, fingerprint: Mapping[str, Any], shard_bytes: int = SHARD_BYTES
    ) -> None:
        if shard_bytes < 1:
            raise InputError(f"shard_bytes is {shard_bytes}; it must be at least 1")
        if directory.exists() and not directory.is_dir():
            raise InputError(f"cache {directory} is a file; name a directory")
        self.directory = directory
        self.fingerprint = _to_plain(fingerprint)
        self.shard_bytes = shard_bytes
        self.damaged: tuple[str, ...] = ()
        """Names of shards that could not be used."""
        self._places: dict[str, _Place] = {}
        self._waiting: dict[str, CachedTensors] = {}
        self._start_writer()
        _require_same(directory, self.fingerprint)
        self.refresh()

    def get(self, key: str) -> CachedTensors | None:
        """An entry, its tensors on the CPU and in memory of their own; None if it is not there.

        Raises:
            LoadingError: Its shard was deleted or damaged after this instance had looked.
        """
        self._own_writer()
        if (waiting := self._waiting.get(key)) is not None:
            tensors = {name: tensor.clone() for name, tensor in waiting.tensors.items()}
            return CachedTensors(dict(waiting.record), tensors)
        if (place := self._places.get(key)) is None:
            return None
        if not place.names:
            return CachedTensors(dict(place.record), {})
        path = self.directory / place.shard
        try:
            with safe_open(path, framework="pt") as file:
                # Copied: what is mapped from a file is not aligned, and kernels round differently.
                tensors = {name: file.get_tensor(f"{key}/{name}").clone() for name in place.names}
        except (SafetensorError, OSError) as error:
            raise LoadingError(
                f"cache shard {path} cannot be read ({error}); delete it and run again, its "
                "entries are then made anew"
            ) from None
        return CachedTensors(dict(place.record), tensors)

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of an entry, without reading its tensors; None if it is not there."""
        self._own_writer()
        found = self._waiting.get(key) or self._places.get(key)
        return None if found is None else dict(found.record)

    def require(self, key: str, name: str, origin: Mapping[str, Any], remedy: str) -> CachedTensors:
        """An entry that must be there, made from ``origin``; errors say ``name`` and ``remedy``.

        Raises:
            InputError: It is not there or stale; the message names it and what differs.
            LoadingError: See ``get``.
        """
        if (entry := self.get(key)) is None:
            raise InputError(f"cache {self.directory} does not hold {name}; {remedy}")
        stale = [
            f"{field} is {entry.record.get(field)!r} there and {value!r} now"
            for field, value in _to_plain(origin).items()
            if entry.record.get(field) != value
        ]
        if stale:
            raise InputError(
                f"cache {self.directory}: its entry of {name} is stale ({'; '.join(stale)}); {remedy}"
            )
        return entry

    def put(
        self, key: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None = None
    ) -> None:
        """Add an entry; one of the same record stays as it is, one of another is replaced.

        Args:
            key: Up to 128 letters, digits, dots, dashes and underscores, see ``make_key``.
            tensors: Tensors by name; copied, so they may change afterwards.
            record: Plain JSON values, kept in the index: few and short.

        Raises:
            InputError: The key is not valid, or the entry holds nothing.
            MediaError: A shard was full and could not be written.
        """
        if not 0 < len(key) <= 128 or not _KEY_CHARACTERS.issuperset(key):
            raise InputError(f"cache key {key!r} is not valid; make it with make_key")
        if not tensors and not record:
            raise InputError(f"cache entry {key} holds nothing; give a tensor or a record")
        self._own_writer()
        if self.record(key) == (kept := _to_plain(record or {})):
            return
        own = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        self._waiting[key] = CachedTensors(kept, own)
        self._waiting_bytes += sum(tensor.nbytes for tensor in own.values())
        if self._waiting_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits; other instances can see it then.

        Raises:
            MediaError: The shard cannot be written; its entries wait on.
            InputError: Another fingerprint took the directory meanwhile.
        """
        self._own_writer()
        if not self._waiting:
            return
        shard = f"{self._writer}-{self._num_shards:05d}{SHARD_SUFFIX}"
        waiting = self._waiting.items()
        entries = {key: [sorted(entry.tensors), entry.record] for key, entry in waiting}
        tensors = {f"{key}/{n}": t for key, entry in waiting for n, t in entry.tensors.items()}
        metadata = {"entries": json.dumps(entries), "fingerprint": json.dumps(self.fingerprint)}
        path = self.directory / shard
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _claim(self.directory, self.fingerprint)
            with whole_file(path) as unfinished:
                save_file(tensors, unfinished, metadata)
            line = {"shard": shard, "bytes": path.stat().st_size, "entries": entries}
            with (self.directory / f"{self._writer}{INDEX_SUFFIX}").open("a") as file:
                file.write(json.dumps(line) + "\n")
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MediaError(
                f"cache {self.directory} cannot be written ({reason}): make room, or choose "
                "another directory"
            ) from error
        self._places |= _places_in(shard, entries)
        self._num_shards += 1
        self._waiting, self._waiting_bytes = {}, 0

    def refresh(self) -> None:
        """Look at the directory again: what other processes wrote, and what was deleted."""
        listed = _read_indexes(self.directory)
        places: dict[str, _Place] = {}
        damaged = []
        for path in sorted(self.directory.glob(f"*{SHARD_SUFFIX}")):
            try:
                entries = _read_entries(path, listed.get(path.name))
            except LoadingError as error:
                logger.warning("%s", error)
                damaged.append(path.name)
                continue
            places |= _places_in(path.name, entries)
        self._places, self.damaged = places, tuple(damaged)

    def __contains__(self, key: object) -> bool:
        return key in self._places or key in self._waiting

    def __len__(self) -> int:
        return len(self._places.keys() | self._waiting.keys())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()  # after an error too: an entry is whole or not there

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("directory", "fingerprint", "shard_bytes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _start_writer(self) -> None:
        # In the order of time: of two shards with an entry of one key, the later one counts.
        self._writer, self._process = f"{time.time_ns():x}-{uuid.uuid4().hex[:8]}", os.getpid()
        self._num_shards, self._waiting_bytes = 0, 0
        self._waiting = {}

    def _own_writer(self) -> None:
        if self._process != os.getpid():  # a fork: its parent writes what waits
            self._start_writer()


def _to_plain(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(fingerprint), sort_keys=True))
    except (TypeError, ValueError) as error:
        raise InputError(f"the fingerprint must hold plain JSON values ({error})") from None
    return plain


def _require_same(directory: Path, fingerprint: Mapping[str, Any]) -> None:
    if (stored := _read_fingerprint(directory)) is not None:
        remedy = "name another directory, or delete this one to fill it anew"
        require_same_settings(stored, fingerprint, f"cache {directory}", remedy)


def _read_fingerprint(directory: Path) -> dict[str, Any] | None:
    path = directory / FINGERPRINT_NAME
    if path.is_file():
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path} is damaged ({error}); delete it: the shards tell the fingerprint too"
            ) from None
    for shard in sorted(directory.glob(f"*{SHARD_SUFFIX}")):
        try:
            return dict(json.loads(_read_metadata(shard)["fingerprint"]))
        except LoadingError as error:
            logger.warning("%s", error)
    return None


def _claim(directory: Path, fingerprint: Mapping[str, Any]) -> None:
    """Store the fingerprint unless another process was first; then it must be the same."""
    path = directory / FINGERPRINT_NAME
    if not path.exists():
        aside = directory / f"{uuid.uuid4().hex}{UNFINISHED}"
        aside.write_text(json.dumps(fingerprint, indent=2) + "\n", encoding="utf-8")
        try:
            os.link(aside, path)  # unlike a rename this replaces nothing
        except FileExistsError:
            pass
        finally:
            aside.unlink()
    _require_same(directory, fingerprint)


def _read_indexes(directory: Path) -> dict[str, dict[str, Any]]:
    """Lines of all indexes by shard; a line that is cut off counts as missing."""
    listed = {}
    for path in sorted(directory.glob(f"*{INDEX_SUFFIX}")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                values = json.loads(line)
                listed[str(values["shard"])] = {key: values[key] for key in ("bytes", "entries")}
            except (ValueError, KeyError, TypeError):
                logger.debug("%s: cut off line %r", path, line[:40])
    return listed


def _read_entries(path: Path, listed: dict[str, Any] | None) -> Mapping[str, Any]:
    """Names and record of each entry of a shard, from its index line or its own header."""
    if listed is None:
        return dict(json.loads(_read_metadata(path)["entries"]))
    if (size := path.stat().st_size) != listed["bytes"]:
        raise _damaged(path, f"{size} of {listed['bytes']} bytes")
    return dict(listed["entries"])


def _places_in(shard: str, entries: Mapping[str, Any]) -> dict[str, _Place]:
    return {key: _Place(shard, tuple(names), record) for key, (names, record) in entries.items()}


def _read_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from None
    if not {"entries", "fingerprint"} <= metadata.keys():
        raise _damaged(path, "it belongs to another cache")
    return metadata


def _damaged(path: Path, reason: str) -> LoadingError:
    return LoadingError(
        f"cache shard {path} is damaged ({reason}) and passed over; delete it, its entries are "
        "made again"
    )
