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
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from swifti2v.errors import LoadingError, StorageError
from swifti2v.storage import UNFINISHED, write_whole
from swifti2v.training.engine.ranks import Ranks

logger = logging.getLogger(__name__)

STATE_NAME = "state.json"
LATEST_NAME = "latest"


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time, beside the training where it may.

    What is saved is copied to host memory first (pinned for a GPU), so that weights may change
    while a thread writes. Its collectives have a group of their own.

    Args:
        directory: Place of the checkpoints.
        ranks: All take part, with the same JSON values.
        num_kept: Newest ones kept.
        is_async: Whether to go on while one is written.
    """

    def __init__(self, directory: Path, ranks: Ranks, num_kept: int, *, is_async: bool) -> None:
        self.directory, self.ranks, self.num_kept = directory, ranks, num_kept
        self._is_async = is_async
        self._pending: _Pending | None = None
        self._stager: DefaultStager | None = None

    def save(self, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Begin a checkpoint of nested state dicts and JSON values, after the last one's end.

        Raises:
            StorageError: It, or the last one, cannot be written; the one before is untouched.
        """
        self.finish()
        final = self.directory / f"step-{step:08d}"
        with _told(final):
            if self.ranks.is_first:
                self.directory.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(_aside(final), ignore_errors=True)
            self.ranks.wait()
            self._pending = _Pending(final, dict(state), self._write(dict(tensors), _aside(final)))
        if not self._is_async:
            self.finish()

    def poll(self) -> None:
        """Put a checkpoint in place if it is written; no rank waits for another.

        Raises:
            StorageError: It could not be written.
        """
        if self._pending is not None and self._pending.written.done():
            self._put_in_place()

    def finish(self) -> None:
        """Wait until the last checkpoint is in place.

        Raises:
            StorageError: It could not be written.
        """
        if self._pending is not None:
            self._put_in_place()
            self.ranks.wait()

    def give_up(self) -> None:
        """End after an error: a checkpoint that all ranks began is put in place if it can be."""
        try:
            if self._pending is not None:
                self._put_in_place()
        except StorageError as error:
            logger.warning("%s", error)

    def _write(self, tensors: dict[str, Any], aside: Path) -> "Future[Any]":
        is_alone = self.ranks.mesh is None
        if is_alone:
            _mean_single_process()
        if not self._is_async:
            save(tensors, checkpoint_id=aside, no_dist=is_alone)
            return _done()
        written: Any = async_save(
            tensors,
            checkpoint_id=aside,
            process_group=self.ranks.host,
            async_stager=self._stage(),
            no_dist=is_alone,
        )
        future: Future[Any] = written
        return future

    def _stage(self) -> DefaultStager:
        """Host memory that is kept from one checkpoint to the next."""
        if self._stager is None:
            is_gpu = self.ranks.device.type == "cuda"
            self._stager = DefaultStager(StagingOptions(is_gpu, False, False, is_gpu))
        return self._stager

    def _put_in_place(self) -> None:
        assert self._pending is not None
        final, state, written = self._pending
        try:
            with _told(final):
                written.result()
                if self.ranks.is_first:
                    self._rename(final, state)
        finally:
            self._pending = None
        logger.info("checkpoint %s", final)

    def _rename(self, final: Path, state: Mapping[str, Any]) -> None:
        write_whole(_aside(final) / STATE_NAME, json.dumps(dict(state)))
        if final.exists():
            shutil.rmtree(final)
        _aside(final).rename(final)
        write_whole(self.directory / LATEST_NAME, final.name)
        _remove_old(final, self.num_kept)


class _Pending(NamedTuple):
    """A checkpoint that is being written."""

    final: Path
    state: dict[str, Any]
    written: "Future[Any]"


def _aside(final: Path) -> Path:
    return final.with_name(f"{final.name}{UNFINISHED}")


def _done() -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_result(None)
    return future


@contextmanager
def _told(final: Path) -> Iterator[None]:
    """Errors of writing as one that says what to do."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        _let_interruption_through(error)
        raise StorageError(
            f"checkpoint {final} cannot be written ({_last_line(error)}); free space or choose "
            "another directory, then --resume from the last one"
        ) from None


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
        if ranks.mesh is None:
            _mean_single_process()
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


def _mean_single_process() -> None:
    """Silence the remark that a single process saves alone, in all threads: one of them writes."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _remove_old(newest: Path, num_kept: int) -> None:
    # Those of later steps are of a run that was gone back from; the newest is not always the last.
    older = sorted(
        path
        for path in newest.parent.glob("step-*")
        if path.suffix != UNFINISHED and path.name < newest.name
    )
    for path in older[: max(0, len(older) + 1 - num_kept)]:
        shutil.rmtree(path)
