"""A training killed again and again: ``regression_killed.py DIRECTORY``.

Every second kill comes while a checkpoint is written. Prints how many kills there were of both
kinds. All trainings are forks of one process, which spares the imports.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from swifti2v.training.engine.run_config import PhaseConfig
from swifti2v.training.engine.trainer import Trainer
from tests.helpers.regression import OPTIMIZER, NumbersTask, make_trainer

NUM_STEPS = 120
"""So many that no training ends between two kills."""
NUM_KILLS = 4


def make_long_trainer(directory: Path, seed: int = 0) -> Trainer:
    phases = (PhaseConfig(steps=NUM_STEPS, optimizer=OPTIMIZER),)
    return make_trainer(directory, NumbersTask(width=300, seed=seed), phases, checkpoint_steps=1)


def train(directory: Path) -> None:
    make_long_trainer(directory).run(resume=True)


def start(directory: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        train(directory)
    except BaseException as error:
        sys.stderr.write(repr(error))
        os._exit(1)
    os._exit(0)


def is_writing(directory: Path) -> bool:
    return any(directory.glob("checkpoints/*.writing"))


def has_ended(child: int) -> int | None:
    """Exit status of a child that ended by itself."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return status if pid else None


def main(directory: Path) -> None:
    rng = random.Random(0)
    kills = {"in_save": 0, "anywhere": 0}
    while True:
        child = start(directory)
        wants_save = kills["in_save"] <= kills["anywhere"]
        until = time.monotonic() + rng.uniform(0.05, 0.4)
        status = None
        has_begun = False
        while status is None:
            status = has_ended(child)
            has_begun = has_begun or not is_writing(directory)  # what an earlier kill left is gone
            if status is None and time.monotonic() > until and sum(kills.values()) < NUM_KILLS:
                if wants_save and not (has_begun and is_writing(directory)):
                    continue
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills["in_save" if wants_save else "anywhere"] += 1
                break
        if status is not None:
            break
    sys.stdout.write(json.dumps({**kills, "status": status}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
