"""Tensors that cost much to compute and come again every epoch, on disk: embeddings and latents."""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from swifti2v.errors import InputError, LoadingError, MediaError

logger = logging.getLogger(__name__)

FINGERPRINT_NAME = "fingerprint.json"
SHARD_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".index.jsonl"
TEMPORARY_SUFFIX = ".writing"
SHARD_BYTES = 256 * 2**20
"""A shard is written when so many bytes wait."""
ENDS_BYTES = 2**20
"""Of the head and of the tail of a file that ``hash_source`` reads."""
SAMPLED_VALUES = 65536
"""Values of a weight that ``fingerprint_model`` reads; larger weights are sampled evenly."""
_KEY_CHARACTERS = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ._-")


class _Place(NamedTuple):
    """Where an entry is."""

    shard: str
    names: tuple[str, ...]


class TensorCache:
    """A directory of safetensors shards, and which entry is in which of them.

    Entries wait in memory until they fill a shard; a shard is written under another name, synced
    and renamed, so that one under its own name is whole. Each process writes shards and an index
    of its own, so many may write into one directory at once; what others wrote shows after
    ``refresh``. Each shard says itself what it holds and of which settings: indexes only save
    reading it, and a missing one does not matter. A shard whose size is wrong is passed over with
    a warning and listed in ``damaged``: its entries count as missing and can be made again.

    An instance can be pickled and handed to worker processes; entries that wait are not copied.

    What a 2K clip takes: the latents of 81 frames of 2560x1408 are 48x21x88x160 values, 28 MB in
    bfloat16, target and reference 57 MB, so 90,000 clips 5.1 TB. Of a pair, the window of one
    segment (anchor, one context frame, three target frames: 5 of 21) is 13.5 MB, about a quarter;
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
        ...     cache.put(key, {"latents": latents})
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
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._start_writer()
        _require_same(directory, self.fingerprint)
        self.refresh()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Tensors of an entry, on the CPU and in memory of their own; None if it is not there.

        Raises:
            LoadingError: Its shard was deleted or damaged after this instance had looked.
        """
        self._own_writer()
        if key in self._waiting:
            return {name: tensor.clone() for name, tensor in self._waiting[key].items()}
        if (place := self._places.get(key)) is None:
            return None
        path = self.directory / place.shard
        try:
            with safe_open(path, framework="pt") as file:
                # Copied: what is mapped from a file is not aligned, and kernels round differently.
                return {name: file.get_tensor(f"{key}/{name}").clone() for name in place.names}
        except (SafetensorError, OSError) as error:
            raise LoadingError(
                f"cache shard {path} cannot be read ({error}); delete it and run again, its "
                "entries are then made anew"
            ) from None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Add an entry; one that is there already stays as it is.

        Args:
            key: Up to 128 letters, digits, dots, dashes and underscores, see ``make_key``.
            tensors: By name; copied, so they may change afterwards.

        Raises:
            InputError: Such a key cannot be, or there is no tensor.
            MediaError: A shard was full and could not be written.
        """
        if not 0 < len(key) <= 128 or not _KEY_CHARACTERS.issuperset(key):
            raise InputError(f"cache key {key!r} cannot be; use make_key")
        if not tensors:
            raise InputError(f"cache entry {key} holds no tensor; give at least one")
        self._own_writer()
        if key in self:
            return
        entry = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        self._waiting[key] = entry
        self._waiting_bytes += sum(tensor.nbytes for tensor in entry.values())
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
        names = {key: sorted(entry) for key, entry in self._waiting.items()}
        tensors = {
            f"{k}/{name}": t for k, entry in self._waiting.items() for name, t in entry.items()
        }
        metadata = {"entries": json.dumps(names), "fingerprint": json.dumps(self.fingerprint)}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _claim(self.directory, self.fingerprint)
            num_bytes = _write_shard(self.directory / shard, tensors, metadata)
            line = json.dumps({"shard": shard, "bytes": num_bytes, "entries": names})
            with (self.directory / f"{self._writer}{INDEX_SUFFIX}").open("a") as file:
                file.write(line + "\n")
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MediaError(
                f"cache {self.directory} cannot be written ({reason}): make room, or choose "
                "another directory"
            ) from error
        self._places |= {key: _Place(shard, tuple(own)) for key, own in names.items()}
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
            places |= {key: _Place(path.name, tuple(names)) for key, names in entries.items()}
        self._places, self.damaged = places, tuple(damaged)

    def __contains__(self, key: object) -> bool:
        return key in self._places or key in self._waiting

    def __len__(self) -> int:
        return len(self._places.keys() | self._waiting.keys())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.flush()  # after an error too: an entry is whole or not there

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("directory", "fingerprint", "shard_bytes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _start_writer(self) -> None:
        self._writer, self._process = uuid.uuid4().hex[:12], os.getpid()
        self._num_shards, self._waiting_bytes = 0, 0
        self._waiting = {}

    def _own_writer(self) -> None:
        if self._process != os.getpid():  # a fork: its parent writes what waits
            self._start_writer()


def hash_source(path: Path) -> str:
    """SHA-256 of a file's size, first and last MiB: changes with any export, costs one read.

    Raises:
        OSError: The file cannot be read.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} ".encode())
    with path.open("rb") as file:
        digest.update(file.read(ENDS_BYTES))
        if size > ENDS_BYTES:
            file.seek(max(ENDS_BYTES, size - ENDS_BYTES))
            digest.update(file.read(ENDS_BYTES))
    return digest.hexdigest()


def hash_text(text: str) -> str:
    """SHA-256 of a prompt, exactly as it is given."""
    return hashlib.sha256(text.encode()).hexdigest()


def make_key(*parts: str | int | float) -> str:
    """Key of an entry that depends on several things, such as a source's hash and a window."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def fingerprint_model(model: nn.Module) -> str:
    """SHA-256 of a model's configuration and weights, for a cache's fingerprint.

    Weights of up to 65536 values count whole, larger ones at as many evenly spaced places. The
    dtype counts; where the model came from and the device do not.

    Raises:
        LoadingError: The weights are not in memory (``meta``).
    """
    config: Any = getattr(model, "config", {})
    values = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    own = {key: value for key, value in values.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        if weight.is_meta:
            raise LoadingError(f"weight {name} is not in memory; take the fingerprint when it is")
        flat = weight.detach().reshape(-1)
        count = min(len(flat), SAMPLED_VALUES)
        places = torch.arange(count) * (len(flat) - 1) // max(1, count - 1)
        sample = flat[places.to(flat.device)].cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _to_plain(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(fingerprint), sort_keys=True))
    except (TypeError, ValueError) as error:
        raise InputError(f"the fingerprint must hold plain JSON values ({error})") from None
    return plain


def _require_same(directory: Path, fingerprint: Mapping[str, Any]) -> None:
    stored = _read_fingerprint(directory)
    if stored is None or stored == fingerprint:
        return
    fields = [
        f"{name} is {stored.get(name)!r} there and {fingerprint.get(name)!r} now"
        for name in sorted(stored.keys() | fingerprint.keys())
        if stored.get(name) != fingerprint.get(name)
    ]
    raise InputError(
        f"cache {directory} was made with other settings: {'; '.join(fields)}; use those settings "
        "again, name another directory, or delete this one to fill it anew"
    )


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
        aside = directory / f"{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
        aside.write_text(json.dumps(fingerprint, indent=2) + "\n", encoding="utf-8")
        try:
            os.link(aside, path)  # unlike a rename this replaces nothing
        except FileExistsError:
            pass
        finally:
            aside.unlink()
    _require_same(directory, fingerprint)


def _write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> int:
    aside = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        save_file(tensors, aside, metadata)
        sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)
    return path.stat().st_size


def sync(path: Path) -> None:
    """Make a file's content, or a directory's names, survive a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


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


def _read_entries(path: Path, listed: dict[str, Any] | None) -> Mapping[str, Iterable[str]]:
    """Keys of a shard and the names of their tensors, from its index line or its own header."""
    entries: Mapping[str, Iterable[str]]
    if listed is None:
        entries = json.loads(_read_metadata(path)["entries"])
    else:
        size, entries = path.stat().st_size, listed["entries"]
        if size != listed["bytes"]:
            raise _damaged(path, f"{size} of {listed['bytes']} bytes")
    return entries


def _read_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from None
    if not {"entries", "fingerprint"} <= metadata.keys():
        raise _damaged(path, "it is none of this cache")
    return metadata


def _damaged(path: Path, reason: str) -> LoadingError:
    return LoadingError(
        f"cache shard {path} is damaged ({reason}) and passed over; delete it, its entries are "
        "made again"
    )
