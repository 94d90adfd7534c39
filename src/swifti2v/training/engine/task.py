"""Interface between the trainer and a task, and reading samples ahead."""

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


class _Steps(Dataset[list[tuple[Draw, Any]]]):
    """Micro-batches of one rank, by step; a data loader reads them ahead."""

    def __init__(self, task: Task[Any], seed: int, parts: Parts, rank: int) -> None:
        self.task, self.seed, self.parts, self.rank = task, seed, parts, rank

    def __getitem__(self, step: int) -> list[tuple[Draw, Any]]:
        draws = draws_of_step(self.seed, step, self.parts, self.rank)
        return [(draw, self.task.load_batch(draw)) for draw in draws]


def read_ahead(
    task: Task[Any], seed: int, parts: Parts, rank: int, steps: range, num_workers: int
) -> Iterator[list[tuple[Draw, Any]]]:
    """Micro-batches of one rank, step by step; 0 processes read them when asked."""
    loader: Any = DataLoader(
        _Steps(task, seed, parts, rank),
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
    )
    return iter(loader)
