"""What ``torchrun`` starts for the tests of the trainer: ``regression_ranks.py train|fail DIRECTORY``."""

import sys
from pathlib import Path

import torch

from swifti2v.errors import InputError, NumericalError
from swifti2v.training.draws import Draw
from swifti2v.training.ranks import join_ranks
from tests.regression import NumbersBatch, NumbersTask, make_trainer


class UnreadableTask(NumbersTask):
    """The second rank cannot read its samples of the fifth step."""

    def load_batch(self, draw: Draw) -> NumbersBatch:
        if draw.step == 4 and draw.indices[0] > 0:
            raise InputError("a file cannot be read")
        return super().load_batch(draw)


def fail_alone(directory: Path) -> None:
    with join_ranks(torch.device("cpu")) as ranks:
        make_trainer(directory, UnreadableTask(), ranks=ranks, checkpoint_steps=2).run()


def main(directory: Path) -> None:
    for num_replicas, name in ((1, "sharded"), (2, "replicated")):
        with join_ranks(torch.device("cpu"), num_replicas) as ranks:
            own = directory / name
            make_trainer(own, ranks=ranks, validation_steps=4).run(max_steps=6)
            make_trainer(own / "micro", ranks=ranks, num_micro_batches=2).run(max_steps=6)
            make_trainer(own / "continued", ranks=ranks).run(resume=True, max_steps=6)
            make_trainer(own / "bfloat16", ranks=ranks, precision="bfloat16").run(max_steps=6)
            bad = make_trainer(own / "bad", NumbersTask(bad_step=3), ranks=ranks)
            try:
                bad.run()
            except NumericalError as error:
                (own / f"bad-{ranks.rank}.txt").write_text(str(error))


if __name__ == "__main__":
    {"train": main, "fail": fail_alone}[sys.argv[1]](Path(sys.argv[2]))
