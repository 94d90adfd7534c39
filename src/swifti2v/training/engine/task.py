"""Interface between the trainer and a task, and reading samples ahead."""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from swifti2v.training.engine.draws import Draw, draws_of_step

Parts = list[list[list[int]]]
"""``[micro-batch][rank]`` lists of sample indices, see ``split_batch``."""


class Batch(Protocol):
    """Samples that a task loads for a micro-batch; they may cross processes."""

    ids: Sequence[str]
    """Names of the samples, for messages."""
    num_replaced: int
    """Samples that could not be read and were replaced."""


BatchT = TypeVar("BatchT", bound=Batch)


class Task(Protocol[BatchT]):
    """A model to train, with its samples and loss."""

    @property
    def model(self) -> nn.Module:
        """Whole; what has ``requires_grad`` is trained."""

    def enter_phase(self, phase: int) -> None:
        """Take the data and the objective of a phase; called before it and when it is resumed."""

    def load_batch(self, draw: Draw) -> BatchT:
        """Read a micro-batch; runs in a worker process where there are some."""

    def loss(self, batch: BatchT, draw: Draw) -> Tensor:
        """``[b]`` loss of each sample, on the model's device."""

    def validate(self, directory: Path) -> Mapping[str, float]:
        """Measure the model as it is now; files go to ``directory``, on the first rank only."""


@runtime_checkable
class NoiseTask(Protocol):
    """A task that trains at noise levels: the trainer counts them."""

    def draw_sigma(self, draw: Draw) -> Tensor:
        """``[b]`` noise levels of a micro-batch in (0, 1], from the draw alone."""


class _MicroBatches(Dataset[tuple[Draw, Any]]):
    """Micro-batches of one rank, counted over all steps; a data loader reads them ahead."""

    def __init__(self, task: Task[Any], seed: int, parts: Parts, rank: int) -> None:
        self.task, self.seed, self.parts, self.rank = task, seed, parts, rank

    def __getitem__(self, number: int) -> tuple[Draw, Any]:
        step, place = divmod(number, len(self.parts))
        draw = draws_of_step(self.seed, step, self.parts, self.rank)[place]
        return draw, self.task.load_batch(draw)


def read_ahead(
    task: Task[Any], seed: int, parts: Parts, rank: int, steps: range, num_workers: int
) -> Iterator[tuple[Draw, Any]]:
    """Micro-batches of one rank, one after the other: a large step is never held whole.

    Each of the processes is one ahead; 0 processes read when asked.
    """
    number = len(parts)
    loader: Any = DataLoader(
        _MicroBatches(task, seed, parts, rank),
        batch_size=None,
        sampler=range(steps.start * number, steps.stop * number),
        num_workers=num_workers,
        prefetch_factor=1 if num_workers else None,
    )
    # What only the collector frees stays with this process: a forked one must not free what belongs
    # to threads that it does not have, such as decoders', and would copy the pages it looks at.
    gc.collect()
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()


class StepFeed:
    """The micro-batches of one step as they come, and what is known of them at its end.

    Args:
        batches: Yields those of this step first.
        number: Micro-batches of the step.
    """

    def __init__(self, batches: Iterator[tuple[Draw, Any]], number: int) -> None:
        self._batches, self._number = batches, number
        self.ids: list[str] = []
        """Names of the samples so far."""
        self.num_replaced = 0
        """Samples so far that could not be read and were replaced."""
        self.wait_seconds = 0.0
        """Time spent waiting for them."""

    def __iter__(self) -> Iterator[tuple[Draw, Any]]:
        for _ in range(self._number):
            start = time.perf_counter()
            draw, batch = next(self._batches)
            self.wait_seconds += time.perf_counter() - start
            self.ids += batch.ids
            self.num_replaced += batch.num_replaced
            yield draw, batch
            del batch  # or two are held while the next one is read
