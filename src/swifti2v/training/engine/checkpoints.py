"""Checkpoints of a training: written aside, put in place in one go, the last ones kept.

``DIRECTORY/step-00000010/`` holds the distributed checkpoint (weights, average, optimizer) and
``state.json``; the file ``DIRECTORY/latest`` names the newest whole one. A process that is killed
at any moment leaves ``latest`` valid.
"""

import json
import logging
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from swifti2v.errors import LoadingError, StorageError
from swifti2v.storage import UNFINISHED, write_whole
from swifti2v.training.engine.ranks import Ranks

logger = logging.getLogger(__name__)

STATE_NAME = "state.json"
LATEST_NAME = "latest"


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Any],
    state: Mapping[str, Any],
    ranks: Ranks,
    num_kept: int,
) -> Path:
    """Write a checkpoint of nested state dicts and JSON values; returns its directory.

    All ranks take part, with the same JSON values. Older checkpoints beyond ``num_kept`` in all are
    removed.

    Raises:
        StorageError: It cannot be written; the last one is untouched.
    """
    final = directory / f"step-{step:08d}"
    aside = directory / f"{final.name}{UNFINISHED}"
    try:
        if ranks.is_first:
            directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
        ranks.wait()
        with _single_process_is_meant():
            save(dict(tensors), checkpoint_id=aside, no_dist=ranks.mesh is None)
        if ranks.is_first:
            write_whole(aside / STATE_NAME, json.dumps(dict(state)))
            if final.exists():
                shutil.rmtree(final)
            aside.rename(final)
            write_whole(directory / LATEST_NAME, final.name)
            _remove_old(final, num_kept)
    except (OSError, CheckpointException) as error:
        _let_interruption_through(error)
        raise StorageError(
            f"checkpoint {final} cannot be written ({_last_line(error)}); free space or choose "
            "another directory, then --resume from the last one"
        ) from None
    ranks.wait()
    logger.info("checkpoint %s", final)
    return final


def find_latest(directory: Path) -> Path | None:
    """Find the newest complete checkpoint, or None.

    Raises:
        LoadingError: ``latest`` names a missing checkpoint.
    """
    pointer = directory / LATEST_NAME
    if not pointer.is_file():
        return None
    path = directory / pointer.read_text(encoding="utf-8").strip()
    if not (path / STATE_NAME).is_file():
        raise LoadingError(
            f"{pointer} names {path.name}, which is missing or damaged; write the name of another "
            "checkpoint of that directory into it"
        )
    return path


def read_state(path: Path) -> dict[str, Any]:
    """The JSON values of a checkpoint.

    Raises:
        LoadingError: They are damaged.
    """
    try:
        state: dict[str, Any] = json.loads((path / STATE_NAME).read_text(encoding="utf-8"))
    except ValueError as error:
        raise _refuse(path, error) from None
    return state


def load_tensors(path: Path, tensors: dict[str, Any], ranks: Ranks) -> None:
    """Overwrite nested state dicts with those of a checkpoint, whatever number of ranks wrote it.

    Raises:
        LoadingError: The checkpoint is damaged or of another model.
    """
    try:
        _require_same_keys(path, tensors)
        with _single_process_is_meant():
            load(tensors, checkpoint_id=path, no_dist=ranks.mesh is None)
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        EOFError,
        pickle.UnpicklingError,
        CheckpointException,
    ) as error:
        _let_interruption_through(error)
        raise _refuse(path, error) from None


def _require_same_keys(path: Path, tensors: Mapping[str, Any]) -> None:
    """Loading itself passes over what a checkpoint has too much, such as further blocks."""
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    if extra := sorted(set(saved) - set(flatten_state_dict(dict(tensors))[0])):
        raise ValueError(f"it holds {extra[0]} and {len(extra) - 1} more that are not in the model")


def _refuse(path: Path, error: BaseException) -> LoadingError:
    return LoadingError(
        f"{path} cannot be continued from ({_last_line(error)}); it is damaged or of another model: "
        "choose another output directory, or an older checkpoint in 'latest'"
    )


def _last_line(error: BaseException) -> str:
    """One line about what went wrong, of a full disk rather than of the writer's confusion."""
    causes = [error]
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        below: BaseException | None = cause
        while below is not None and not isinstance(below, OSError):
            below = below.__context__
        if below is not None:
            return str(below)
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _let_interruption_through(error: BaseException) -> None:
    """Distributed checkpoints wrap all that is raised in them, Ctrl-C too."""
    if isinstance(error, CheckpointException):
        for cause, _ in error.failures.values():
            if isinstance(cause, KeyboardInterrupt):
                raise cause


@contextmanager
def _single_process_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _remove_old(newest: Path, num_kept: int) -> None:
    # Those of later steps are of a run that was gone back from; the newest is not always the last.
    older = sorted(
        path
        for path in newest.parent.glob("step-*")
        if path.suffix != UNFINISHED and path.name < newest.name
    )
    for path in older[: max(0, len(older) + 1 - num_kept)]:
        shutil.rmtree(path)
