"""Random draws of a training as a function of the seed, the step and the sample, without state.

A stopped run needs only its step number to go on with the same draws, and a step's samples do not
depend on how many ranks or micro-batches they are divided over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_SHARED, _SAMPLE, _UNIFORM, _NOISE, _GROUP = range(5)

Option = TypeVar("Option")


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """A micro-batch of one step on one rank."""

    seed: int
    """Seed of the run."""
    step: int
    """Index of the step, from 0."""
    batch_size: int
    """Samples of the whole step, on all ranks."""
    indices: tuple[int, ...]
    """Indices of the step's samples in this micro-batch."""

    def shared(self) -> np.random.Generator:
        """Generator for draws that all samples of a step share, such as its segment."""
        return self._generator(_SHARED)

    def samples(self) -> list[np.random.Generator]:
        """One source for each sample of the micro-batch."""
        return [self._generator(_SAMPLE, index) for index in self.indices]

    def group(self, index: int) -> np.random.Generator:
        """Generator for draws that a group of a step's samples shares, by the group's number."""
        return self._generator(_GROUP, index)

    def uniforms(self) -> Tensor:
        """``[b]`` float32 in [0, 1), one for each sample of the micro-batch."""
        values = [
            self._generator(_UNIFORM, index).random(dtype=np.float32) for index in self.indices
        ]
        return torch.tensor(values)

    def noise_like(self, tensor: Tensor) -> Tensor:
        """Standard normal of the shape and on the device of ``tensor``, ``[b, ...]``.

        It is drawn on the CPU, so a device does not change it.
        """
        return torch.stack(
            [
                torch.randn(tensor.shape[1:], generator=self._torch_generator(index))
                for index in self.indices
            ]
        ).to(tensor.device)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.step, *key))

    def _torch_generator(self, index: int) -> torch.Generator:
        number = self._generator(_NOISE, index).integers(2**63 - 1)
        return torch.Generator().manual_seed(int(number))


def split_batch(batch_size: int, num_micro_batches: int, world_size: int) -> list[list[list[int]]]:
    """Divide the samples of a step over micro-batches and ranks.

    The result is ``[micro-batch][rank]`` lists of sample indices, all of one length.

    Raises:
        ValueError: ``batch_size`` is not a multiple of micro-batches times ranks.
    """
    parts = num_micro_batches * world_size
    if batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of {num_micro_batches} micro-batches times "
            f"{world_size} ranks"
        )
    size = batch_size // parts
    starts = range(0, batch_size, size)
    pieces = [list(range(start, start + size)) for start in starts]
    return [pieces[m * world_size : (m + 1) * world_size] for m in range(num_micro_batches)]


def draws_of_step(
    seed: int, step: int, parts: Sequence[Sequence[Sequence[int]]], rank: int
) -> list[Draw]:
    """The micro-batches of one step on one rank; ``parts`` come from ``split_batch``."""
    batch_size = sum(len(piece) for micro in parts for piece in micro)
    return [
        Draw(seed=seed, step=step, batch_size=batch_size, indices=tuple(micro[rank]))
        for micro in parts
    ]


def choose(options: Sequence[Option], rng: np.random.Generator) -> Option:
    """One of some options, each as likely."""
    return options[int(rng.integers(len(options)))]


def draw_share(shares: Mapping[Option, float], rng: np.random.Generator) -> Option:
    """One of some options, by their shares, which need not add up to 1."""
    parts = np.array(list(shares.values()))
    return list(shares)[int(rng.choice(len(parts), p=parts / parts.sum()))]
