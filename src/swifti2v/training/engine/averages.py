"""The weights that are trained, and their moving average."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def trained_weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that require a gradient, by name."""
    return [(name, value) for name, value in model.named_parameters() if value.requires_grad]


def cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the trained weights another dtype, in place."""
    for _, value in trained_weights(model):
        value.data = value.data.to(dtype)


class MovingAverage:
    """Moving average of a model's trained weights; a limit of None keeps no average.

    The model is divided over the ranks already, where it is.
    """

    def __init__(self, model: nn.Module, limit: float | None) -> None:
        self._model, self._limit = model, limit
        self.weights = {} if limit is None else _copy(model, torch.float32)
        """Averaged weights by name, float32; empty without an average. A checkpoint holds them."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights of a finished step, from 1."""
        if self._limit is None:
            return
        # Rises from 2/11, so that the average forgets the start as fast as it can.
        decay = min(self._limit, (1 + step) / (10 + step))
        for name, value in trained_weights(self._model):
            self.weights[name].lerp_(value.float(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights within the block, if there is an average."""
        own = _copy(self._model, None) if self.weights else {}
        self.take()
        try:
            yield
        finally:
            if own:
                _load(self._model, own)

    def take(self) -> None:
        """Give the model the averaged weights for good, where there is an average."""
        if self.weights:
            _load(self._model, self.weights)


def _copy(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {n: value.detach().to(dtype, copy=True) for n, value in trained_weights(model)}


@torch.no_grad()
def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, value in trained_weights(model):
        value.copy_(weights[name])
