"""A run on disk: its plan, its motion reference and its finished segments, safe against a kill.

Every file is written under another name, synced and then renamed, so a file under its own name
is whole. Latents and motion reference are stored exactly, with a checksum.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from swifti2v.errors import InputError

logger = logging.getLogger(__name__)

Frames = NDArray[np.uint8]
"""``[T, H, W, 3]`` RGB."""

PLAN = "plan.json"
MOTION_REFERENCE = "motion_reference.safetensors"
TEMPORARY_SUFFIX = ".writing"


class WorkDir:
    """The directory of one run.

    Args:
        directory: Made by ``start``, not before.
        plan: All that decides the latents: plain JSON values.
        resume: Continue what is there, instead of refusing a directory that is not empty.

    Raises:
        InputError: The directory cannot be used for this plan; nothing was written.
    """

    def __init__(self, directory: Path, plan: Mapping[str, Any], *, resume: bool) -> None:
        self.directory = directory
        self._plan = dict(plan)
        if not _is_empty(directory):
            if not resume:
                raise InputError(
                    f"work dir {directory} is not empty: continue it with --resume, "
                    "or name another one"
                )
            _require_same(read_plan(directory), self._plan, directory)

    def start(self) -> None:
        """Make the directory, clear away half-written files and store the plan."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(f"*{TEMPORARY_SUFFIX}"):
            leftover.unlink()
        _write(self.directory / PLAN, json.dumps(self._plan, indent=2).encode())

    @property
    def finished(self) -> "FinishedSegments":
        """Latents of the segments on disk."""
        return FinishedSegments(self.directory)

    def save_segment(self, index: int, latents: Tensor) -> None:
        """Store the latents ``[1, C, F, h, w]`` of a finished segment."""
        _write_tensor(_segment_path(self.directory, index), latents)

    def save_motion_reference(self, frames: Frames) -> None:
        """Store Stage I's ``[T, h, w, 3]`` frames."""
        _write_tensor(self.directory / MOTION_REFERENCE, torch.from_numpy(frames))

    def load_motion_reference(self) -> Frames | None:
        """Stage I's frames, or None if they are not there or damaged (which is logged)."""
        frames = _read_tensor(self.directory / MOTION_REFERENCE)
        return None if frames is None else frames.numpy()


class FinishedSegments(Mapping[int, Tensor]):
    """Segment index to latents, read from disk when asked for; a damaged file counts as none."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __getitem__(self, index: int) -> Tensor:
        latents = _read_tensor(_segment_path(self._directory, index))
        if latents is None:
            raise KeyError(index)
        return latents

    def __contains__(self, index: object) -> bool:
        return (
            isinstance(index, int)
            and _read_tensor(_segment_path(self._directory, index)) is not None
        )

    def __iter__(self) -> Iterator[int]:
        files = sorted(self._directory.glob("segment_*.safetensors"))
        return (index for index in (int(file.stem[8:]) for file in files) if index in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def read_plan(directory: Path) -> dict[str, Any]:
    """The plan of a work dir; empty if it holds nothing.

    Raises:
        InputError: The directory holds other things, or its plan is damaged.
    """
    if _is_empty(directory):
        return {}
    path = directory / PLAN
    if not path.is_file():
        raise InputError(f"{directory} is no work dir: it has files but no {PLAN}; name another")
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); start again in another work dir") from None
    if not isinstance(plan, dict):
        raise InputError(f"{path} is no plan of a run; start again in another work dir")
    return plan


def _is_empty(directory: Path) -> bool:
    """Whether nothing is kept there; a run killed before its plan was stored leaves nothing."""
    if not directory.exists():
        return True
    if not directory.is_dir():
        raise InputError(f"work dir {directory} is a file; name a directory")
    return all(path.name.endswith(TEMPORARY_SUFFIX) for path in directory.iterdir())


def _require_same(stored: Mapping[str, Any], plan: Mapping[str, Any], directory: Path) -> None:
    old, new = flatten(stored), flatten(json.loads(json.dumps(plan)))
    for key in [*new, *(key for key in old if key not in new)]:
        if old.get(key) != new.get(key):
            raise InputError(
                f"work dir {directory} is of another run: {key} is {old.get(key)!r} there and "
                f"{new.get(key)!r} now; use the same settings or another work dir"
            )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _segment_path(directory: Path, index: int) -> Path:
    return directory / f"segment_{index:04d}.safetensors"


def _write_tensor(path: Path, tensor: Tensor) -> None:
    tensor = tensor.detach().cpu().contiguous()
    _write(path, save({"tensor": tensor}, {"sha256": _checksum(tensor)}))


def _read_tensor(path: Path) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor("tensor")
            if (file.metadata() or {}).get("sha256") == _checksum(tensor):
                return tensor
    except (SafetensorError, OSError) as error:
        logger.debug("%s: %s", path, error)
    logger.warning("%s is damaged: it is deleted and made again", path)
    path.unlink()
    return None


def _checksum(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Put a whole file in place, or leave what was there."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name, too, must survive a power cut
    finally:
        os.close(directory)
