"""One call of a training: the trainer run as far as it is asked for, and what is written then."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from swifti2v.training.engine.ranks import Ranks, save_model
from swifti2v.training.engine.run_config import PhaseConfig, RunConfig
from swifti2v.training.engine.run_log import OnStep
from swifti2v.training.engine.task import Task
from swifti2v.training.engine.trackers import Tracker
from swifti2v.training.engine.trainer import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """Directory, processes and length of a training."""

    directory: Path
    """Directory of the run."""
    ranks: Ranks
    """Processes that take part."""
    resume: bool = False
    """Whether to continue the directory's latest checkpoint; without one the training begins."""
    allows_changed_data: bool = False
    """Whether to continue although the data differs from that of the start."""
    max_steps: int | None = None
    """Number of steps in all after which to stop; None runs all phases."""
    trackers: Sequence[Tracker] = ()
    """Trackers besides ``metrics.jsonl``."""
    on_step: OnStep | None = None
    """See ``OnStep``."""


def train_task(
    task: Task[Any], run: RunConfig, phases: Sequence[PhaseConfig], session: Session
) -> Trainer:
    """Train, and leave the averaged weights in the model, in eval mode.

    Returns:
        The trainer: its ``step`` and ``phase`` tell how far the training is.

    Raises:
        SwiftI2VError: See ``Trainer.run``.
    """
    trainer = Trainer(task, run, phases, session.directory, session.ranks, session.trackers)
    trainer.run(resume=session.resume, max_steps=session.max_steps, on_step=session.on_step)
    trainer.take_average()
    return trainer


def save_trained(kind: type[nn.Module], model: nn.Module, name: str, session: Session) -> Path:
    """Write a model of ``kind`` after ``train_task`` beside its checkpoints; returns its directory.

    Raises:
        StorageError: It cannot be written.
    """
    path = session.directory / name
    save_model(kind, model, path, session.ranks)
    return path
