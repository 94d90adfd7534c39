"""Motion as displacement: read, enlarged, and the photo moved by it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swifti2v.pipelines.camera_moves import SHIFT, CameraMove
from swifti2v.pipelines.course import draw_course, even_course, stack_courses
from swifti2v.pipelines.displacement import (
    FRAMES_AT_ONCE,
    enlarge,
    leave_out_faint,
    move_photo,
    read_displacement,
)
from swifti2v.shapes import NUM_WAYS


def picture(height: int = 24, width: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, 1, height, width, generator=generator) * 2 - 1


def whole(frames: int, height: int, width: int, right: float, down: float) -> Tensor:
    field = torch.tensor([right, down]).view(1, 2, 1, 1, 1)
    return field.expand(-1, -1, frames, height, width)


ways = st.floats(-2, 2)


@settings(max_examples=40, deadline=None)
@given(
    own=st.tuples(*[ways] * NUM_WAYS),
    other=st.tuples(*[ways] * NUM_WAYS),
    seed=st.integers(0, 2**40),
    cells=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_a_camera_that_all_cells_tell_is_that_move(own, other, seed, cells):
    """Displacement of every clip by its own course."""
    height, width = cells
    output = torch.zeros(2, NUM_WAYS + 3, 3, height, width)
    output[:, NUM_WAYS:] = 9  # what to add is no displacement
    output[:, :NUM_WAYS] = torch.tensor([own, other])[..., None, None, None]
    courses = [draw_course(9, seed), draw_course(9, seed + 1)]
    displacement = read_displacement(output, stack_courses(courses), time=4, cell=4)

    row, column = ((torch.arange(n) + 0.5 - n / 2) * 4 for n in cells)
    points = torch.stack(torch.meshgrid(column, row, indexing="xy"), dim=-1)
    for found, amounts, course in zip(displacement, (own, other), courses, strict=True):
        pan, tilt, zoom, roll, sway = amounts
        move = CameraMove(pan=pan, tilt=tilt, zoom=zoom, roll=roll, sway=sway)
        expected = move.displace(course, torch.tensor(0.5), points, (4 * height, 4 * width))
        torch.testing.assert_close(found, expected.permute(3, 0, 1, 2), atol=1e-4, rtol=1e-5)


def test_cameras_of_latent_frames_blend_in_between():
    output = torch.zeros(1, NUM_WAYS + 3, 4, 2, 2)
    output[:, 0, 1, 0, 1] = 1  # a pan of one cell, which ends in the next latent frame
    output[:, 0, 0] = 7  # the photo has no camera
    displacement = read_displacement(output, even_course(13), time=4, cell=4)
    pan = torch.tensor([0, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0])
    expected = torch.zeros_like(displacement)
    expected[0, 0, :, 0, 1] = SHIFT * 8 * pan * torch.arange(13) / 12
    torch.testing.assert_close(displacement, expected)


def test_displacement_is_float32_even_of_bfloat16():
    output = torch.ones(1, 7, 1, 2, 3, dtype=torch.bfloat16)
    assert read_displacement(output, draw_course(1, 0), 4, 4).dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(
    slopes=st.tuples(*[st.floats(-2, 2)] * 6),
    cells=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    factor=st.sampled_from([1, 2, 4, 8]),
)
def test_affine_fields_are_enlarged_exactly_to_the_borders(slopes, cells, factor):
    def sample(rows: int, columns: int) -> Tensor:
        """The field at the centres of cells of the unit square."""
        y = (torch.arange(rows) + 0.5)[:, None] / rows
        x = (torch.arange(columns) + 0.5)[None] / columns
        own = [a + b * x + c * y for a, b, c in (slopes[:3], slopes[3:])]
        return torch.stack([own[0].expand(rows, columns), own[1].expand(rows, columns)])

    few = torch.stack([sample(*cells), 2 * sample(*cells)], dim=1)[None]  # two frames
    size = (cells[0] * factor, cells[1] * factor)
    large = enlarge(few, *size)

    assert large.shape == (1, 2, 2, *size)
    torch.testing.assert_close(large[0, :, 0], sample(*size), atol=1e-5, rtol=0)
    torch.testing.assert_close(large[0, :, 1], 2 * sample(*size), atol=1e-5, rtol=0)


def test_frames_and_samples_are_enlarged_on_their_own():
    fields = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    together = enlarge(fields, 16, 20)
    for sample in range(2):
        for frame in range(3):
            alone = enlarge(fields[sample : sample + 1, :, frame : frame + 1], 16, 20)
            assert torch.equal(together[sample, :, frame], alone[0, :, 0])


def test_without_displacement_the_photo_stays_as_it_is():
    photo = picture()
    moved = move_photo(photo, torch.zeros(1, 2, 5, 24, 40))

    assert moved.shape == (1, 3, 5, 24, 40)
    torch.testing.assert_close(moved, photo.expand_as(moved), atol=2e-5, rtol=0)


@settings(max_examples=30, deadline=None)
@given(right=st.integers(-40, 40), down=st.integers(-24, 24))
def test_whole_pixels_shift_the_photo_and_its_edges_are_mirrored(right, down):
    photo = picture()
    moved = move_photo(photo, whole(2, 24, 40, right, down))
    mirrored = torch.cat([photo.flip(-1), photo, photo.flip(-1)], dim=-1)
    mirrored = torch.cat([mirrored.flip(-2), mirrored, mirrored.flip(-2)], dim=-2)
    expected = mirrored[..., 24 + down : 48 + down, 40 + right : 80 + right]

    torch.testing.assert_close(moved, expected.expand_as(moved), atol=1e-4, rtol=0)


@pytest.mark.parametrize("batch", [1, 2])
def test_each_photo_is_moved_by_its_own_frames(batch):
    photos = torch.cat([picture(seed=k) for k in range(batch)])
    ways = torch.cat([
        torch.cat([whole(1, 24, 40, k, 0), whole(1, 24, 40, 0, k + 1)], dim=2) for k in range(batch)
    ])  # fmt: skip
    moved = move_photo(photos, ways)
    for k in range(batch):
        alone = move_photo(photos[k : k + 1], ways[k : k + 1])
        torch.testing.assert_close(moved[k], alone[0])
        torch.testing.assert_close(alone[0, :, 1, :-4], photos[k, :, 0, k + 1 : 20 + k + 1],
                                   atol=1e-4, rtol=0)  # fmt: skip


def test_a_faint_addition_is_left_out_and_a_clear_one_stays():
    photo = torch.rand(1, 3, 1, 24, 32) - 0.5
    num_frames = FRAMES_AT_ONCE + 5  # more than one part
    displacement = torch.full((1, 2, num_frames, 6, 8), 0.7)
    moved = move_photo(photo, enlarge(displacement, 24, 32))
    level = 1 / 127.5
    grid = torch.ones(24, 32)
    grid[::2, ::4] = -1
    faint = leave_out_faint(moved + 0.3 * level * grid, photo, displacement) - moved
    assert faint.abs().max() < 0.02 * level
    clear = leave_out_faint(moved + 30 * level * grid, photo, displacement) - moved
    assert (clear - 30 * level * grid).abs().max() < 0.1 * level
    part = torch.zeros(24, 32)
    part[:, 20:] = 30 * level  # an uncovered border beside a part where nothing is to be added
    both = leave_out_faint(moved + part + 0.3 * level * grid, photo, displacement) - moved
    assert both[..., :15].abs().max() < 0.02 * level
    assert (both[..., 22:] - part[:, 22:]).abs().max() < 0.5 * level
