"""Summaries of a series with one number a frame."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

MAX_PSNR_DB = 60.0
"""Equal frames count as this in means: 8-bit rounding alone leaves 58.9 dB. Source: VMAF's tool."""
SLOPE_FRAMES = 16
"""Slopes are changes over so many frames: one second of a clip."""


def mean(values: Tensor | Sequence[float]) -> float:
    """Mean without NaN; NaN of nothing."""
    known = _known(values)[1]
    return float(known.mean()) if len(known) else math.nan


def mean_psnr(values: Tensor | Sequence[float]) -> float:
    """Mean of PSNRs in dB, each limited to 60, without NaN."""
    return mean(limit_psnr(values))


def limit_psnr(values: Tensor | Sequence[float]) -> list[float]:
    """PSNRs in dB with all above 60, infinity too, set to 60; NaN stays."""
    return [float(value) for value in np.minimum(np.asarray(values, np.float64), MAX_PSNR_DB)]


def slope(values: Tensor | Sequence[float]) -> float:
    """Change over 16 frames of the line that fits best; NaN with fewer than two known values."""
    frames, known = _known(values)
    if len(known) < 2:
        return math.nan
    centred = frames - frames.mean()
    return float((centred * known).sum() / (centred**2).sum() * SLOPE_FRAMES)


def _known(values: Tensor | Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    array = np.asarray(values, np.float64)
    frames = np.flatnonzero(~np.isnan(array))
    return frames, array[frames]
