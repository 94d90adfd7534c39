"""A run on disk: its plan, embeddings, motion reference and finished segments, safe against a kill.

Every file is written under another name, synced and then renamed, so a file under its own name
is complete. Latents and motion reference are stored exactly, with a checksum.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from swifti2v.config import GenerationConfig, parse_config, to_dict
from swifti2v.errors import ConfigError, InputError, MediaError
from swifti2v.pipelines.stage1 import Conditions
from swifti2v.pipelines.transition import MotionReference
from swifti2v.storage import UNFINISHED, require_same_settings, write_whole

logger = logging.getLogger(__name__)

PLAN = "plan.json"
CONDITIONS = "conditions.safetensors"
MOTION_REFERENCE = "motion_reference.safetensors"


class WorkDir:
    """The directory of one run: a ``swifti2v.pipelines.store.SegmentStore``; ``start`` makes it.

    ``resume`` continues the run in it, instead of refusing one that is not empty.

    Raises:
        InputError: The directory holds a run and ``resume`` is not set, or holds other things.
    """

    def __init__(self, directory: Path, *, resume: bool) -> None:
        self.directory = directory
        self.stored_plan = _read_plan(directory)
        """Plan of the stored run; empty for a new one."""
        if self.stored_plan and not resume:
            raise InputError(
                f"work dir {directory} holds a run already: continue it with --resume, "
                "or name another directory"
            )

    def require_same(self, plan: Mapping[str, Any]) -> None:
        """Refuse a plan, all that decides the latents, that differs from the stored one.

        Raises:
            InputError: The plans differ; the message names every difference.
        """
        if self.stored_plan:
            where = f"work dir {self.directory}"
            stored, now = _fill_in(self.stored_plan), _fill_in(plan)
            require_same_settings(stored, now, where, "another work dir")

    def forget_other(self, plan: Mapping[str, Any]) -> None:
        """Empty the directory of a run with another plan, so that the new one begins there."""
        try:
            self.require_same(plan)
        except InputError as error:
            logger.warning("%s; it begins anew", error)
            shutil.rmtree(self.directory)
            self.stored_plan = {}

    def start(self, plan: Mapping[str, Any]) -> None:
        """Make the directory, clear away half-written files and store the plan."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.directory, error) from error
        for leftover in self.directory.glob(f"*{UNFINISHED}"):
            leftover.unlink()
        _write(self.directory / PLAN, json.dumps(plan, indent=2).encode())

    @property
    def num_finished(self) -> int:
        """Segments that are stored."""
        return sum(1 for _ in self.directory.glob("segment_*.safetensors"))

    def save_segment(self, index: int, latents: Tensor) -> None:
        """Store the latents ``[1, C, F, h, w]`` of a finished segment."""
        _write_tensors(_segment_path(self.directory, index), tensor=latents)

    def load_segment(self, index: int) -> Tensor | None:
        """Return a finished segment's latents; None if missing or damaged (logged)."""
        tensors = _read_tensors(_segment_path(self.directory, index))
        return None if tensors is None else tensors["tensor"]

    def save_conditions(self, conditions: Conditions) -> None:
        """Store the embeddings of prompt and photo."""
        found = {name: getattr(conditions, name) for name in Conditions.__slots__}
        tensors = {name: value for name, value in found.items() if value is not None}
        _write_tensors(self.directory / CONDITIONS, **tensors)

    def load_conditions(self) -> Conditions | None:
        """Return the embeddings; None if they are missing or damaged (logged)."""
        tensors = _read_tensors(self.directory / CONDITIONS)
        return None if tensors is None else Conditions(**tensors)

    def save_piece(self, index: int, motion: MotionReference) -> None:
        """Store the new frames of a piece of Stage I's."""
        _write_motion(self.directory / f"stage1_{index:04d}.safetensors", motion)

    def load_piece(self, index: int) -> MotionReference | None:
        """Return the new frames of a piece; None if they are missing or damaged (logged)."""
        return _read_motion(self.directory / f"stage1_{index:04d}.safetensors")

    def save_motion_reference(self, motion: MotionReference) -> None:
        """Store Stage I's output."""
        _write_motion(self.directory / MOTION_REFERENCE, motion)

    def load_motion_reference(self) -> MotionReference | None:
        """Return Stage I's output; None if it is missing or damaged (logged)."""
        return _read_motion(self.directory / MOTION_REFERENCE)


def _read_plan(directory: Path) -> dict[str, Any]:
    if not directory.exists():
        return {}
    if not directory.is_dir():
        raise InputError(f"work dir {directory} is a file; name a directory")
    # A run killed before its plan was stored leaves half-written files only.
    if all(path.name.endswith(UNFINISHED) for path in directory.iterdir()):
        return {}
    path = directory / PLAN
    if not path.is_file():
        raise InputError(
            f"work dir {directory} is not empty and holds no {PLAN}, so it is not a run; "
            "name another directory"
        )
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); start again in another work dir") from None
    if not isinstance(plan, dict) or not plan:
        raise InputError(f"{path} is not the plan of a run; start again in another work dir")
    return plan


def _fill_in(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """A plan with the defaults of settings that it does not name: it may be older than these."""
    try:
        config = parse_config(GenerationConfig, plan["config"], PLAN)
    except (ConfigError, KeyError):
        return plan  # the comparison says what differs
    return {**plan, "config": to_dict(config)}


def _segment_path(directory: Path, index: int) -> Path:
    return directory / f"segment_{index:04d}.safetensors"


def _write_motion(path: Path, motion: MotionReference) -> None:
    displacement = motion.displacement
    others = {} if displacement is None else {"displacement": displacement}
    _write_tensors(path, tensor=torch.from_numpy(motion.frames), **others)


def _read_motion(path: Path) -> MotionReference | None:
    tensors = _read_tensors(path)
    if tensors is None:
        return None
    return MotionReference(tensors["tensor"].numpy(), tensors.get("displacement"))


def _write_tensors(path: Path, **tensors: Tensor) -> None:
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write(path, save(stored, {"sha256": _checksum(stored)}))


def _read_tensors(path: Path) -> dict[str, Tensor] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in list(file.keys())}
            stored = (file.metadata() or {}).get("sha256")
            if stored in (_checksum(tensors), _checksum(tensors, is_old=True)):
                return tensors
    except (SafetensorError, OSError) as error:
        logger.debug("%s: %s", path, error)
    logger.warning("%s is damaged: it is deleted and made again", path)
    path.unlink()
    return None


def _checksum(tensors: Mapping[str, Tensor], *, is_old: bool = False) -> str:
    """SHA-256 of names, types, shapes and values; of values alone as older versions stored it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items(), reverse=True):
        if not is_old:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> MediaError:
    return MediaError(
        f"{path} cannot be written ({error.strerror}): make room, or choose another work dir"
    )
