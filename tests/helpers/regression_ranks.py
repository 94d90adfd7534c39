"""Started by ``torchrun`` in tests of the trainer: ``regression_ranks.py train|fail|hybrid|look DIRECTORY``."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from swifti2v.errors import InputError, NumericalError
from swifti2v.training.data.buckets import BucketRules
from swifti2v.training.data.clips import DataConfig, ManifestConfig
from swifti2v.training.data.phases import ClipsPhase, find_clips
from swifti2v.training.engine.averages import trained_weights
from swifti2v.training.engine.draws import Draw
from swifti2v.training.engine.ranks import gather_weights, join_ranks
from swifti2v.training.engine.run_config import RunConfig
from swifti2v.training.engine.trainer import Trainer
from tests.helpers.regression import (
    AdapterTask,
    NoisyNumbersTask,
    NumbersBatch,
    NumbersTask,
    WindowsTask,
    make_trainer,
)


class UnreadableTask(NumbersTask):
    """The second rank cannot read its samples of the fifth step."""

    def load_batch(self, draw: Draw) -> NumbersBatch:
        if draw.step == 4 and draw.indices[0] > 0:
            raise InputError("a file cannot be read")
        return super().load_batch(draw)


def fail_alone(directory: Path) -> None:
    with join_ranks(torch.device("cpu")) as ranks:
        make_trainer(directory, UnreadableTask(), ranks=ranks, checkpoint_steps=2).run()


def train(directory: Path) -> None:
    """All runs of one way to divide a model: processes join the ranks once in their life."""
    num_replicas = {"sharded": 1, "replicated": 2}[directory.name]
    with join_ranks(torch.device("cpu"), num_replicas) as ranks:
        make_trainer(directory, NoisyNumbersTask(), ranks=ranks, validation_steps=4).run(
            max_steps=6
        )
        make_trainer(directory / "micro", ranks=ranks, num_micro_batches=2).run(max_steps=6)
        micro: Any = {"num_micro_batches": 2, "gradient_sync": "micro_batch"}
        make_trainer(directory / "synced", ranks=ranks, **micro).run(max_steps=6)
        make_trainer(directory / "continued", ranks=ranks).run(resume=True, max_steps=6)
        windows = make_trainer(
            directory / "windows", WindowsTask(), ranks=ranks, precision="bfloat16"
        )
        windows.run(max_steps=6)
        adapter = make_trainer(
            directory / "adapter", AdapterTask(), ranks=ranks, precision="bfloat16"
        )
        adapter.run(max_steps=6)
        save_whole(adapter, directory / "adapter.pt")
        bad = make_trainer(directory / "bad", NumbersTask(bad_step=3), ranks=ranks)
        try:
            bad.run()
        except NumericalError as error:
            (directory / f"bad-{ranks.rank}.txt").write_text(str(error))


def save_whole(trainer: Trainer, path: Path) -> None:
    """Trained weights, put together again."""
    state = gather_weights(dict(trained_weights(trainer.model)))
    if trainer.ranks.is_first:
        torch.save(state, path)


def train_hybrid(directory: Path) -> None:
    """Two copies, each divided over two ranks (HSDP)."""
    with join_ranks(torch.device("cpu"), 2) as ranks:
        trainer = make_trainer(directory / "hybrid", ranks=ranks, num_micro_batches=2)
        trainer.run(max_steps=6)
        save_whole(trainer, directory / "hybrid.pt")
        make_trainer(directory / "continued", ranks=ranks).run(resume=True, max_steps=6)


def look(directory: Path) -> None:
    """The clips of a manifest in ``directory``."""
    manifest = ManifestConfig(path=str(directory / "clips.jsonl"))
    rules = BucketRules(buckets=((5, 32, 48),))
    phases = (ClipsPhase(steps=1, data=DataConfig(manifests=(manifest,), rules=rules)),)
    with join_ranks(torch.device("cpu")) as ranks:
        (clips,) = find_clips(phases, 0, RunConfig(batch_size=2), directory / "run", ranks)
        (directory / f"{ranks.rank}.json").write_text(json.dumps(sorted(clips.placements)))


if __name__ == "__main__":
    {"train": train, "fail": fail_alone, "hybrid": train_hybrid, "look": look}[sys.argv[1]](
        Path(sys.argv[2])
    )
