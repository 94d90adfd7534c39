"""Counts of the noise levels that a training has seen."""

from typing import Any

import torch
from torch import Tensor

from swifti2v.errors import InputError

NUM_BINS = 20


class SigmaHistogram:
    """Counts of the noise levels a training has seen, in 20 bins over (0, 1].

    Bin k holds the levels in ``(k / 20, (k + 1) / 20]``. ``counts`` is ``[20]`` int64 on the CPU;
    of several ranks, the sum of all is the histogram of the training.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(NUM_BINS, dtype=torch.int64)
        self._upper = torch.arange(1, NUM_BINS + 1, dtype=torch.float64).div(NUM_BINS).float()

    def add(self, sigmas: Tensor) -> None:
        """Count noise levels.

        Raises:
            InputError: A level is outside (0, 1].
        """
        levels = sigmas.detach().float().cpu().flatten()
        if not ((levels > 0) & (levels <= 1)).all():
            raise InputError(
                f"noise levels from {levels.min()} to {levels.max()}; they must be in (0, 1]"
            )
        self.counts += torch.bincount(torch.bucketize(levels, self._upper), minlength=NUM_BINS)

    def state_dict(self) -> dict[str, Any]:
        """The counts, as a copy."""
        return {"counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the counts of ``state``."""
        self.counts.copy_(state["counts"])

    def to_dict(self) -> dict[str, int]:
        """Counts by the range of their bin, as ``0.60-0.65``."""
        return {
            f"{k / NUM_BINS:.2f}-{(k + 1) / NUM_BINS:.2f}": count
            for k, count in enumerate(self.counts.tolist())
        }
