"""The arithmetic of the ``lite`` dimensions: numbers in, numbers out.

Source: VBench, ``vbench2_beta_i2v/i2v_subject.py``, ``vbench/subject_consistency.py`` and
``vbench/dynamic_degree.py``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from swifti2v.errors import ShapeError

MAX_WEIGHT, MEAN_WEIGHT, MIN_WEIGHT = 0.4, 0.3, 0.3
FASTEST_SHARE = 0.05
"""Part of the pixels whose flow counts: the fastest ones."""
MOVING_PX, MOVING_SIDE_PX = 6.0, 256.0
"""A pair of frames moves if its fastest pixels do by more than 6 pixels at 256 pixels a side."""
DYNAMIC_PAIRS, DYNAMIC_FRAMES = 4, 16
"""A clip is dynamic if 4 pairs in 16 frames move."""
SAMPLING_FPS = 8
"""Frames a second that flow is measured at."""


def photo_similarity(features: Tensor, photo: Tensor) -> float:
    """Similarity of a clip to its photo.

    Args:
        features: ``[T, D]`` of the frames, T at least 2.
        photo: ``[D]`` of the photo.

    Returns:
        ``0.4 max_t cos(photo, f_t) + 0.3 mean_t d_t + 0.3 min_t d_t`` with
        ``d_t = cos(f_{t-1}, f_t)``; negative cosines count as 0.

    Raises:
        ShapeError: Fewer than two frames.
    """
    steps = _cosines(features[:-1], features[1:])
    to_photo = _cosines(features, photo.expand_as(features))
    value = MAX_WEIGHT * to_photo.max() + MEAN_WEIGHT * steps.mean() + MIN_WEIGHT * steps.min()
    return float(value)


def consistency(features: Tensor) -> float:
    """Similarity of the frames ``[T, D]`` of a clip to each other.

    Returns:
        Mean over ``t >= 1`` of ``(cos(f_{t-1}, f_t) + cos(f_0, f_t)) / 2``; negative cosines
        count as 0.

    Raises:
        ShapeError: Fewer than two frames.
    """
    steps = _cosines(features[:-1], features[1:])
    to_first = _cosines(features[:1].expand_as(features[1:]), features[1:])
    return float(((steps + to_first) / 2).mean())


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    if not len(first):
        raise ShapeError("a clip of one frame has no neighbours; give at least two frames")
    return F.cosine_similarity(first.double(), second.double(), dim=-1).clamp(min=0)


def fastest_flow(flow: Tensor) -> float:
    """Mean length of the longest 5 % of a flow field ``[2, H, W]``, in pixels."""
    lengths = flow.double().norm(dim=0).flatten()
    return float(lengths.topk(int(len(lengths) * FASTEST_SHARE)).values.mean())


def is_dynamic(fastest: Sequence[float], num_frames: int, height: int, width: int) -> bool:
    """Whether a clip moves."""
    threshold = MOVING_PX * min(height, width) / MOVING_SIDE_PX
    num_moving = sum(value > threshold for value in fastest)
    needed = round(DYNAMIC_PAIRS * num_frames / DYNAMIC_FRAMES)
    return bool(fastest) and num_moving >= needed


def sampling_step(fps: float) -> int:
    """Distance in frames between two measurements of flow."""
    return max(1, round(fps / SAMPLING_FPS))


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Mean of values that count by their weights."""
    weighting = torch.tensor(weights, dtype=torch.float64)
    return float((torch.tensor(values, dtype=torch.float64) * weighting).sum() / weighting.sum())
