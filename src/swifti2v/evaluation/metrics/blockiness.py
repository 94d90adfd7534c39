"""Are the blocks of a codec visible as steps on a regular grid?"""

import torch
from torch import Tensor

from swifti2v.errors import ShapeError
from swifti2v.evaluation.metrics.frames import FramePieces, iterate_frames, luma, to_unit_range

LARGEST_STEP = 8 / 255
"""Limit of a step's height: a larger step is an edge in the picture."""
INVISIBLE_STEP = 1e-4
"""Value added above and below the ratio (1/40 of an 8-bit step), so that a flat frame scores 1."""


def blockiness(frames: FramePieces, block: int = 8) -> Tensor:
    """Mean step across the edges of blocks over the mean step within them, frame by frame.

    A step is the difference of two neighbouring pixels of luma minus the mean of the differences
    before and after it: slopes count nothing. Rows and columns count alike. Pixels beside an edge
    are left out, for they see half of its step. The grid begins at the upper left corner.

    Returns:
        ``[T]`` float64: 1 without blocks; 1.05 is about the least that is seen in a smooth sky.

    Raises:
        ShapeError: Blocks below 5 pixels, or frames that hold no edge between blocks.
    """
    if block < 5:
        raise ShapeError(f"block is {block}; a step needs pixels on both sides: at least 5")
    planes = (luma(to_unit_range(frame)) for frame in iterate_frames(frames))
    return torch.tensor([_frame_ratio(plane, block) for plane in planes], dtype=torch.float64)


def _frame_ratio(plane: Tensor, block: int) -> float:
    if min(plane.shape) < block + 2:
        raise ShapeError(
            f"frames are {plane.shape[1]}x{plane.shape[0]}; blockiness needs sides of at least "
            f"{block + 2} pixels"
        )
    across, within, num_across, num_within = 0.0, 0.0, 0, 0
    for lines in (plane, plane.T):
        difference = lines.diff(dim=1)  # [n, m - 1], at x the step from x to x + 1
        beside = (difference[:, :-2] + difference[:, 2:]) / 2
        steps = (difference[:, 1:-1] - beside).abs().clamp(max=LARGEST_STEP).double()
        place = (torch.arange(steps.shape[1]) + 2) % block  # 0 where the step leads into a block
        is_edge, is_inner = place == 0, (place >= 2) & (place <= block - 2)
        across += float(steps[:, is_edge].sum())
        within += float(steps[:, is_inner].sum())
        num_across += steps[:, is_edge].numel()
        num_within += steps[:, is_inner].numel()
    return (across / num_across + INVISIBLE_STEP) / (within / num_within + INVISIBLE_STEP)
