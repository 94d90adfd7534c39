"""Overlapping spatial tiles along one side of a frame, and the ramps that blend them."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

MIN_TILE = 4  # latent cells: the smallest tile of which a quarter is a whole cell


class Span(NamedTuple):
    """Where a tile lies along one side of the frame."""

    read: slice
    """Samples it takes from the input."""
    write: slice
    """Samples it covers of the output."""
    weight: Tensor
    """``[write.stop - write.start]`` share it has in them; over all spans the shares sum to 1."""


def plan_spans(
    length: int, tile: int | None, sides: tuple[int, int], device: torch.device
) -> list[Span]:
    """Cover one side of a frame with tiles of one size that overlap by a quarter and blend linearly.

    The last tile is moved back to end with the frame, so it may overlap more than a quarter.

    Args:
        length: Of the side, in latent cells.
        tile: Side of a tile in latent cells, at least ``MIN_TILE``; None, or not below ``length``,
            gives one tile of weight 1.
        sides: Samples along a latent cell before and after the codec.
        device: Where the weights go.
    """
    if tile is None or tile >= length:
        tile = length
    overlap = tile // 4 if tile < length else 0
    starts = [min(start, length - tile) for start in range(0, length - overlap, tile - overlap)]
    after = sides[1]
    centres = torch.arange(tile * after, device=device) + 0.5
    weights = [torch.ones(tile * after, device=device) for _ in starts]
    for left, (start, following) in enumerate(pairwise(starts)):
        shared = (start + tile - following) * after
        weights[left] = weights[left].minimum((tile * after - centres) / shared)
        weights[left + 1] = weights[left + 1].minimum(centres / shared)
    total = torch.zeros(length * after, device=device)
    for start, weight in zip(starts, weights, strict=True):
        total[start * after : (start + tile) * after] += weight
    spans = []
    for start, weight in zip(starts, weights, strict=True):
        read, write = (slice(start * side, (start + tile) * side) for side in sides)
        spans.append(Span(read, write, weight / total[write]))
    return spans
