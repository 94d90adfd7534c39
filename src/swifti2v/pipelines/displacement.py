"""Motion as displacement: where each point of a frame was in the photo, and the photo moved so."""

import torch
from torch import Tensor
from torch.nn import functional as F

from swifti2v.pipelines.camera_moves import move_points
from swifti2v.pipelines.course import Course
from swifti2v.shapes import NUM_WAYS

FAINT = 1 / 127.5
"""Root mean square of what is added, around a pixel, of which half is left out; range [-1, 1]."""
FAINT_SIDE = 9
"""Side in pixels of the square around it."""
FRAMES_AT_ONCE = 16
"""Frames that are moved again at a time."""


def read_displacement(output: Tensor, course: Course, time: int, cell: int) -> Tensor:
    """The displacement that a transformer's first output channels hold.

    Each cell of each latent frame tells the camera that it is seen by at its last pixel frame; between
    two of them cameras blend, so that nothing jumps. A camera moves as the course goes: what all cells
    and frames agree on is one steady move.

    Args:
        output: ``[B, 5 + C, F, h, w]``: the camera, then what to add.
        course: Course of the T = time * (F - 1) + 1 pixel frames, of one clip or of B.
        time: Pixel frames of a latent frame; the first latent frame has but one.
        cell: Pixels of a latent cell's side.

    Returns:
        ``[B, 2, T, h, w]`` float32 columns and rows in pixels, at the cells' centres; 0 in the first
        frame.
    """
    height, width = output.shape[-2:]
    row, column = (
        (torch.arange(number, device=output.device) + 0.5 - number / 2) * cell
        for number in (height, width)
    )
    points = torch.stack(torch.meshgrid(column, row, indexing="xy"), dim=-1)
    ways = _blend_cameras(output[:, :NUM_WAYS].float(), time).unbind(1)
    moved = move_points(ways, course.to(output.device), points, (height * cell, width * cell))
    return moved.permute(0, 4, 1, 2, 3)


def _blend_cameras(ways: Tensor, time: int) -> Tensor:
    """Cameras ``[B, 5, F, h, w]`` of latent frames at their pixel frames, ``[B, 5, T, h, w]``.

    The first latent frame, the photo, has no camera: it takes the second one's.
    """
    if ways.shape[2] == 1:
        return ways
    ends = torch.cat([ways[:, :, 1:2], ways[:, :, 1:]], dim=2)
    part = torch.arange(1, time + 1, device=ways.device)[:, None, None] / time
    before, after = ends[:, :, :-1, None], ends[:, :, 1:, None]
    return torch.cat([ends[:, :, :1], torch.lerp(before, after, part).flatten(2, 3)], dim=2)


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


def go_on_from(before: Tensor, displacement: Tensor, cell: int) -> Tensor:
    """Places in the photo of points whose places in a later frame are known.

    Args:
        before: ``[1, 2, h, w]`` displacement of that frame; beyond the outermost cells its slope goes
            on, so that what has left the picture is found again.
        displacement: ``[1, 2, T, h, w]`` from each frame to that one, in pixels.
        cell: Pixels of a cell's side.

    Returns:
        ``[1, 2, T, h, w]`` from each frame to the photo.
    """
    rows, columns = before.shape[-2:]
    column = torch.arange(columns, device=before.device) + displacement[0, 0] / cell
    row = torch.arange(rows, device=before.device)[:, None] + displacement[0, 1] / cell
    left, top = (
        place.floor().clamp(0, number - 2).long()
        for place, number in ((column, columns), (row, rows))
    )
    across, down = column - left, row - top
    corners = [before[0][:, top + i, left + j] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))]
    upper, lower = (torch.lerp(corners[n], corners[n + 1], across) for n in (0, 2))
    return displacement + torch.lerp(upper, lower, down)[None]


def leave_out_faint(video: Tensor, photo: Tensor, displacement: Tensor) -> Tensor:
    """A clip without what it adds to the moved photo where that is fainter than can be meant.

    What a transformer adds where nothing is to be added is a fraction of a grey level. In 8 bits that
    would be a grid of steps, which shows on a white ground.

    Args:
        video: ``[B, 3, T, H, W]`` in [-1, 1]; not changed.
        photo: ``[B, 3, 1, H, W]``.
        displacement: ``[B, 2, T, h, w]``, of cells or pixels.
    """
    height, width = photo.shape[-2:]
    parts = []
    for place in range(0, video.shape[2], FRAMES_AT_ONCE):
        part = slice(place, place + FRAMES_AT_ONCE)
        moved = move_photo(photo, enlarge(displacement[:, :, part], height, width)).clamp(-1, 1)
        added = video[:, :, part] - moved
        power = added.square().mean(dim=1, keepdim=True)
        window, padding = (1, FAINT_SIDE, FAINT_SIDE), (0, FAINT_SIDE // 2, FAINT_SIDE // 2)
        near = F.avg_pool3d(power, window, 1, padding, count_include_pad=False)
        parts.append(moved + added * (near**2 / (near**2 + FAINT**4)))
    return torch.cat(parts, dim=2)


def sample_mirrored(images: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """Images ``[N, C, H, W]`` at places ``[N, a, b]`` in pixels, mirrored at their edges."""
    height, width = images.shape[-2:]
    grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], dim=-1)
    return F.grid_sample(
        images, grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )
