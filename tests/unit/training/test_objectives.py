"""Training losses: targets only, clean frames untouched, parameterizations agree."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from swifti2v.sampling import Parameterization
from swifti2v.segments import Segment, plan_segments
from swifti2v.training.objectives import (
    FRAME_SIDE,
    SLOPE_WEIGHT,
    ErrorMeasure,
    displacement_loss,
    flow_loss,
    segment_flow_loss,
)

PARAMETERIZATIONS: tuple[Parameterization, ...] = get_args(Parameterization)
CHANNELS, SIDE, FRAMES, BATCH = 3, 2, 9, 2


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, reference, noise ``[B, C, F, h, w]`` and sigma ``[B]``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, CHANNELS, FRAMES, SIDE, SIDE)
    latents, reference, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    return latents, reference, noise, torch.rand(BATCH, generator=generator) * 0.9 + 0.1


def fixed(output: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda hidden_states, sigma: output


segments = st.builds(
    lambda size, context, index: plan_segments(FRAMES, size, context)[
        index % len(plan_segments(FRAMES, size, context))
    ],
    st.integers(1, 8),
    st.integers(0, 3),
    st.integers(0, 7),
)
seeds = st.integers(0, 1000)


@settings(max_examples=20, deadline=None)
@given(segment=segments, seed=seeds)
def test_gradient_is_exactly_zero_outside_the_target(segment: Segment, seed: int) -> None:
    latents, reference, noise, sigma = draw(seed)
    output = torch.zeros(BATCH, CHANNELS, len(segment.window), SIDE, SIDE, requires_grad=True)
    for parameterization in PARAMETERIZATIONS:
        loss = segment_flow_loss(
            fixed(output), latents, reference, segment, sigma, noise,
            parameterization=parameterization,
        )  # fmt: skip
        assert loss.shape == (BATCH,)
        (gradient,) = torch.autograd.grad(loss.sum(), output)
        num_given = len(segment.window) - len(segment.target)
        assert torch.equal(gradient[:, :, :num_given], torch.zeros_like(gradient[:, :, :num_given]))
        assert (gradient[:, :, num_given:] != 0).any(dim=(1, 3, 4)).all()


@settings(max_examples=20, deadline=None)
@given(segment=segments, seed=seeds)
def test_clean_frames_reach_the_model_bit_identical_with_sigma_0(
    segment: Segment, seed: int
) -> None:
    latents, reference, noise, sigma = draw(seed)
    seen = []

    def model(hidden_states: Tensor, levels: Tensor) -> Tensor:
        seen.append((hidden_states, levels))
        return torch.zeros_like(hidden_states[:, :CHANNELS])

    segment_flow_loss(model, latents, reference, segment, sigma, noise)
    ((hidden_states, levels),) = seen
    window, num_given = list(segment.window), len(segment.window) - len(segment.target)
    noisy, condition = hidden_states.tensor_split(2, dim=1)
    assert torch.equal(noisy[:, :, :num_given], latents[:, :, window[:num_given]])
    assert torch.equal(condition, reference[:, :, window])
    assert torch.equal(levels[:, :num_given], torch.zeros(BATCH, num_given))
    assert torch.equal(levels[:, num_given:], sigma[:, None].expand(-1, len(segment.target)))
    level = sigma[:, None, None, None, None]
    target = list(segment.target)
    expected = (1 - level) * latents[:, :, target] + level * noise[:, :, target]
    torch.testing.assert_close(noisy[:, :, num_given:], expected)


@settings(max_examples=20, deadline=None)
@given(segment=segments, seed=seeds)
def test_what_is_not_in_the_loss_does_not_change_it(segment: Segment, seed: int) -> None:
    latents, reference, noise, sigma = draw(seed)
    output = torch.randn(BATCH, CHANNELS, len(segment.window), SIDE, SIDE)
    others = [frame for frame in range(FRAMES) if frame not in segment.target]
    before = segment_flow_loss(fixed(output), latents, reference, segment, sigma, noise)
    flipped = [tensor.clone() for tensor in (latents, reference, noise)]
    for tensor in flipped:
        tensor[:, :, others] *= -1
    changed = output.clone()
    changed[:, :, : len(segment.window) - len(segment.target)] *= -1
    after = segment_flow_loss(fixed(changed), flipped[0], flipped[1], segment, sigma, flipped[2])
    assert torch.equal(before, after)


@settings(max_examples=20, deadline=None)
@given(segment=segments, seed=seeds)
def test_parameterizations_agree_on_the_same_prediction(segment: Segment, seed: int) -> None:
    latents, reference, noise, sigma = (value.double() for value in draw(seed))
    residual = torch.randn(BATCH, CHANNELS, len(segment.window), SIDE, SIDE, dtype=torch.float64)
    weight = torch.tensor([0.5, 1.0, 1.5])

    def velocity(hidden_states: Tensor, levels: Tensor) -> Tensor:
        noisy, condition = hidden_states.tensor_split(2, dim=1)
        level = levels[:, None, :, None, None].clamp(min=1e-6)
        clean: Tensor = condition + residual
        return (noisy - clean) / level

    losses = [
        segment_flow_loss(
            model, latents, reference, segment, sigma, noise,
            parameterization=name, measure=ErrorMeasure(weight),
        )
        for model, name in zip((velocity, fixed(residual)), PARAMETERIZATIONS, strict=True)
    ]  # fmt: skip
    # The loss is taken in float32: relative rounding of 1e-6 at most over some hundred terms.
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_a_perfect_model_has_no_loss_and_its_samples_are_independent(
    name: Parameterization,
) -> None:
    latents, reference, noise, sigma = draw(0)
    segment = plan_segments(FRAMES, 3, 1)[1]
    window = list(segment.window)
    perfect = (
        (noise - latents)[:, :, window]
        if name == "velocity"
        else (latents - reference)[:, :, window]
    )
    loss = segment_flow_loss(
        fixed(perfect), latents, reference, segment, sigma, noise, parameterization=name
    )
    torch.testing.assert_close(loss, torch.zeros(BATCH), atol=1e-8, rtol=0)
    wrong = perfect.clone()
    wrong[1] += 1
    loss = segment_flow_loss(
        fixed(wrong), latents, reference, segment, sigma, noise, parameterization=name
    )
    assert loss[0] < 1e-8 < loss[1]


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_loss_on_the_window_counts_given_frames_as_if_they_were_noise(
    name: Parameterization,
) -> None:
    latents, reference, noise, sigma = draw(3)
    segment = plan_segments(FRAMES, 3, 1)[1]
    window, num_given = list(segment.window), 2
    clean, condition, drawn = (value[:, :, window] for value in (latents, reference, noise))
    perfect = drawn - clean if name == "velocity" else clean - condition
    output = perfect.clone()
    output[:, :, :num_given] += 1  # wrong by 1 where the frames are given clean, right elsewhere
    arguments = (fixed(output), latents, reference, segment, sigma, noise)
    on_target = segment_flow_loss(*arguments, parameterization=name)
    on_window = segment_flow_loss(
        *arguments, parameterization=name, measure=ErrorMeasure(frames="window")
    )
    torch.testing.assert_close(on_target, torch.zeros(BATCH), atol=1e-8, rtol=0)
    torch.testing.assert_close(on_window, torch.full((BATCH,), num_given / len(window)))


@pytest.mark.parametrize("error_of", ["velocity", "clean"])
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_the_loss_of_whole_clips_by_hand(
    name: Parameterization, error_of: Literal["velocity", "clean"]
) -> None:
    latents, reference, noise, sigma = draw(1)
    output, weight = torch.randn(latents.shape), torch.tensor([0.5, 1.0, 1.5])
    seen = []

    def model(hidden_states: Tensor, levels: Tensor) -> Tensor:
        seen.append((hidden_states, levels))
        return output

    loss = flow_loss(
        model, latents, reference, sigma, noise,
        parameterization=name, error_of=error_of, channel_weight=weight,
    )  # fmt: skip
    ((noisy, levels),) = seen
    assert torch.equal(levels, sigma[:, None].expand(-1, FRAMES))
    for sample in range(BATCH):
        level = sigma[sample]
        expected = (1 - level) * latents[sample] + level * noise[sample]
        torch.testing.assert_close(noisy[sample], expected)
        clean = expected - level * output[sample]
        if name == "reference_residual":
            clean = reference[sample] + output[sample]
        error = clean - latents[sample]
        if error_of == "velocity":
            error = error / level
        by_hand = (weight[:, None, None, None] * error**2).mean()
        torch.testing.assert_close(loss[sample], by_hand, rtol=1e-4, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_the_loss_of_a_whole_clip_is_that_of_a_segment_where_they_meet(seed: int) -> None:
    """A segment of all frames but the first, and a first frame that is right, differ by its share."""
    latents, reference, noise, sigma = draw(seed)
    (segment,) = plan_segments(FRAMES, FRAMES, 0)
    velocity = noise - latents
    velocity[:, :, 1:] += torch.randn(BATCH, CHANNELS, FRAMES - 1, SIDE, SIDE)
    whole = flow_loss(fixed(velocity), latents, reference, sigma, noise)
    part = segment_flow_loss(fixed(velocity), latents, reference, segment, sigma, noise)
    torch.testing.assert_close(whole * FRAMES / (FRAMES - 1), part)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_a_perfect_model_has_no_loss_on_whole_clips(name: Parameterization) -> None:
    latents, reference, noise, sigma = draw(0)
    perfect = noise - latents if name == "velocity" else latents - reference
    loss = flow_loss(fixed(perfect), latents, reference, sigma, noise, parameterization=name)
    torch.testing.assert_close(loss, torch.zeros(BATCH), atol=1e-8, rtol=0)
    wrong = perfect.clone()
    wrong[1] += 1
    loss = flow_loss(fixed(wrong), latents, reference, sigma, noise, parameterization=name)
    assert loss[0] < 1e-8 < loss[1]


def test_bfloat16_outputs_are_compared_in_float32() -> None:
    latents, reference, noise, sigma = draw(2)
    output = torch.randn(latents.shape).bfloat16()
    (segment,) = plan_segments(FRAMES, FRAMES, 0)
    for loss in (
        flow_loss(fixed(output), latents, reference, sigma, noise),
        segment_flow_loss(fixed(output), latents, reference, segment, sigma, noise),
    ):
        assert loss.dtype == torch.float32


def test_a_displacement_that_is_true_at_the_cells_costs_nothing() -> None:
    truth = torch.randn(2, 2, 5, 8, 12)
    cells = F.avg_pool3d(truth, (1, 4, 4))
    assert not displacement_loss(cells, truth).any()
    assert displacement_loss(cells + 0.1, truth).min() > 0
    assert not displacement_loss(truth, truth).any()  # cells of a pixel


@pytest.mark.parametrize(
    ("error", "expected"),
    [(0.2, 0.2**2 / 0.8), (0.4, 0.2), (-0.4, 0.2), (3.0, 2.8), (-3.0, 2.8)],
)
def test_a_displacements_error_is_squared_where_small_and_absolute_where_large(
    error: float, expected: float
) -> None:
    """In a frame of 160x96; in a smaller one the same part of its side costs the same."""
    truth, side = torch.zeros(2, 2, 5, 8, 12), math.sqrt(8 * 12)
    wrong = torch.zeros(2, 2, 5, 2, 3)
    wrong[1] = error
    wrong *= side / FRAME_SIDE
    torch.testing.assert_close(displacement_loss(wrong, truth), torch.tensor([0, expected]))
    wrong[1, 1] = 0  # columns alone: half of all
    torch.testing.assert_close(displacement_loss(wrong, truth), torch.tensor([0, expected / 2]))


def test_neighbours_that_err_differently_cost_more_than_those_that_err_alike() -> None:
    truth = torch.zeros(1, 2, 5, 8, 12)
    alike = torch.full((1, 2, 5, 2, 3), 0.2 * math.sqrt(8 * 12) / FRAME_SIDE)
    bent = alike * torch.tensor([1.0, -1.0, 1.0])
    more = displacement_loss(bent, truth) - displacement_loss(alike, truth)
    torch.testing.assert_close(more, torch.tensor([SLOPE_WEIGHT * (0.4 - 0.05)]))


def test_the_first_frame_has_no_displacement_to_be_wrong() -> None:
    truth, own = torch.zeros(1, 2, 5, 8, 12), torch.zeros(1, 2, 5, 2, 3)
    own[:, :, 0] = 7
    assert not displacement_loss(own, truth).any()
    own[:, :, 4] = math.sqrt(8 * 12) / FRAME_SIDE  # one of four frames that count
    jerk = SLOPE_WEIGHT * 0.95 / 3  # one of the three steps between them
    torch.testing.assert_close(displacement_loss(own, truth), torch.tensor([0.8 / 4 + jerk]))


@pytest.mark.parametrize("weight", [None, torch.linspace(0.5, 1.5, CHANNELS)])
def test_errors_are_measured_by_all_values_or_by_cells(weight: Tensor | None) -> None:
    errors = torch.randn(BATCH, CHANNELS, FRAMES, SIDE, SIDE)
    by_channel = 1 if weight is None else weight[:, None, None, None]
    weighted = by_channel * errors.square()
    squared = ErrorMeasure(weight)(errors.square())
    torch.testing.assert_close(squared, weighted.mean(dim=(1, 2, 3, 4)))
    root = ErrorMeasure(weight, "root")(errors.square())
    torch.testing.assert_close(
        root, weighted.mean(dim=1).sqrt().mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-4
    )
    # A cell that is ten times as wrong counts ten times, not a hundred times.
    large = errors.clone()
    large[:, :, 0, 0, 0] = 10
    larger = large.clone()
    larger[:, :, 0, 0, 0] = 100
    grown = ErrorMeasure(None, "root")(larger.square()) - ErrorMeasure(None, "root")(large.square())
    torch.testing.assert_close(
        grown, torch.full((BATCH,), 90.0 / (FRAMES * SIDE**2)), rtol=1e-3, atol=1e-3
    )


def test_an_error_of_zero_has_a_gradient() -> None:
    errors = torch.zeros(1, CHANNELS, FRAMES, SIDE, SIDE, requires_grad=True)
    loss: Tensor = ErrorMeasure(None, "root")(errors.square())
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert errors.grad is not None
    assert errors.grad.isfinite().all()
