"""Motion as displacement: where each point of a frame was in the photo, and the photo moved so."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

UNIT = 1 / 16
"""What a transformer's output of 1 means, as a part of a frame's side (the root of its area)."""


def read_displacement(output: Tensor, time: int, cell: int) -> Tensor:
    """The displacement that a transformer's first output channels hold.

    Args:
        output: ``[B, 2 * time + C, F, h, w]``: for each of the frames of a latent frame columns and
            rows, then what to add.
        time: Pixel frames of a latent frame.
        cell: Pixels of a latent cell's side.

    Returns:
        ``[B, 2, time * F, h, w]`` float32 columns and rows in pixels, at the cells' centres.
    """
    batch, _, frames, height, width = output.shape
    values = output[:, : 2 * time].float().view(batch, time, 2, frames, height, width)
    unit = cell * math.sqrt(height * width) * UNIT
    return values.permute(0, 2, 3, 1, 4, 5).flatten(2, 3) * unit


def enlarge(displacement: Tensor, height: int, width: int) -> Tensor:
    """Displacement at every pixel; beyond the outermost cells' centres its slope goes on.

    Args:
        displacement: ``[B, 2, T, h, w]`` in pixels of the result.
        height: A multiple of h.
        width: A multiple of w.

    Returns:
        ``[B, 2, T, height, width]``.
    """
    batch, _, frames, rows, columns = displacement.shape
    cells = displacement.transpose(1, 2).flatten(0, 1)
    for _ in range(2):  # columns, then rows
        first, last = cells[..., :1], cells[..., -1:]
        cells = torch.cat(
            [2 * first - cells[..., 1:2], cells, 2 * last - cells[..., -2:-1]], dim=-1
        ).transpose(-1, -2)
    factor = (height // rows, width // columns)
    sides = ((rows + 2) * factor[0], (columns + 2) * factor[1])
    wide = F.interpolate(cells, sides, mode="bilinear", align_corners=False)
    inner = wide[..., factor[0] : -factor[0], factor[1] : -factor[1]]
    return torch.unflatten(inner, 0, (batch, frames)).transpose(1, 2)


def move_photo(photo: Tensor, displacement: Tensor) -> Tensor:
    """The photo as each frame shows it; beyond its edges it is mirrored.

    Args:
        photo: ``[B, 3, 1, H, W]``.
        displacement: ``[B, 2, T, H, W]`` columns and rows in pixels.

    Returns:
        ``[B, 3, T, H, W]``.
    """
    frames, height, width = displacement.shape[2:]
    column = torch.arange(width, device=photo.device) + displacement[:, 0]
    row = torch.arange(height, device=photo.device)[:, None] + displacement[:, 1]
    images = photo.expand(-1, -1, frames, -1, -1).transpose(1, 2).flatten(0, 1)
    moved = sample_mirrored(images, column.flatten(0, 1), row.flatten(0, 1))
    return torch.unflatten(moved, 0, (len(photo), frames)).transpose(1, 2)


def sample_mirrored(images: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """Images ``[N, C, H, W]`` at places ``[N, a, b]`` in pixels, mirrored at their edges."""
    height, width = images.shape[-2:]
    grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], dim=-1)
    return F.grid_sample(
        images, grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )
