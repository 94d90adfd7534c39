"""Started by ``torchrun`` in tests of the trainer: ``regression_ranks.py train|fail DIRECTORY``."""

import sys
from pathlib import Path

import torch

from swifti2v.errors import InputError, NumericalError
from swifti2v.training.engine.draws import Draw
from swifti2v.training.engine.ranks import join_ranks
from tests.helpers.regression import (
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
        make_trainer(directory / "continued", ranks=ranks).run(resume=True, max_steps=6)
        windows = make_trainer(
            directory / "windows", WindowsTask(), ranks=ranks, precision="bfloat16"
        )
        windows.run(max_steps=6)
        bad = make_trainer(directory / "bad", NumbersTask(bad_step=3), ranks=ranks)
        try:
            bad.run()
        except NumericalError as error:
            (directory / f"bad-{ranks.rank}.txt").write_text(str(error))


if __name__ == "__main__":
    {"train": train, "fail": fail_alone}[sys.argv[1]](Path(sys.argv[2]))
