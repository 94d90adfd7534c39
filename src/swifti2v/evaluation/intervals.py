"""A measured mean or share, and how far it can be trusted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MIN_ITEMS = 3
"""Fewer measurements than this say nothing about their spread."""
NUM_RESAMPLES = 10_000
"""Draws of the bootstrap; the ends of an interval then repeat to about 1 % of its width."""
NORMAL_975 = 1.959964
"""97.5 % quantile of the normal distribution: both tails together are 5 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    """Mean or share; NaN without measurements."""
    low: float | None
    """Lower end; None with fewer than three measurements, or where the mean is infinite."""
    high: float | None
    """Upper end; None where ``low`` is."""
    num_items: int
    """Measurements behind it."""


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean with the percentile interval of the bootstrap, one value an item; NaN is left out.

    With three to five values the interval is close to their range: read it as such.
    """
    known = np.array([value for value in values if not math.isnan(value)], np.float64)
    if not len(known):
        return Estimate(value=math.nan, low=None, high=None, num_items=0)
    mean = float(known.mean())
    if len(known) < MIN_ITEMS or math.isinf(mean):
        return Estimate(value=mean, low=None, high=None, num_items=len(known))
    draws = np.random.default_rng(seed).integers(len(known), size=(NUM_RESAMPLES, len(known)))
    low, high = np.quantile(known[draws].mean(axis=1), [0.025, 0.975])
    return Estimate(value=mean, low=float(low), high=float(high), num_items=len(known))


def wilson_share(num_successes: int, num_trials: int) -> Estimate:
    """Share of successes with Wilson's score interval, which fits near 0 and 1 as well.

    Raises:
        ValueError: ``num_successes`` is not in ``0 .. num_trials``.

    Source:
        E. B. Wilson, "Probable inference", JASA 22(158), 1927.
    """
    if not 0 <= num_successes <= num_trials:
        raise ValueError(f"{num_successes} successes in {num_trials} trials are not possible")
    if num_trials == 0:
        return Estimate(value=math.nan, low=None, high=None, num_items=0)
    share, square = num_successes / num_trials, NORMAL_975**2 / num_trials
    centre = (share + square / 2) / (1 + square)
    spread = math.sqrt(square * share * (1 - share) + square**2 / 4) / (1 + square)
    return Estimate(
        value=share,
        low=max(0.0, min(share, centre - spread)),
        high=min(1.0, max(share, centre + spread)),
        num_items=num_trials,
    )


def bootstrap_grid(values: npt.NDArray[np.float64], seed: int = 0) -> Estimate:
    """Mean over ``[runs, clips]``, no NaN, with a bootstrap that draws both anew.

    It asks what other seeds on other clips would have given, so it is wider than one over all
    values at once.
    """
    num_runs, num_clips = values.shape
    mean = float(values.mean())
    if num_runs < MIN_ITEMS or num_clips < MIN_ITEMS:
        return Estimate(value=mean, low=None, high=None, num_items=values.size)
    rng = np.random.default_rng(seed)
    runs = rng.integers(num_runs, size=(NUM_RESAMPLES, num_runs, 1))
    clips = rng.integers(num_clips, size=(NUM_RESAMPLES, 1, num_clips))
    low, high = np.quantile(values[runs, clips].mean(axis=(1, 2)), [0.025, 0.975])
    return Estimate(value=mean, low=float(low), high=float(high), num_items=values.size)
