from typing import Any, get_args

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.config import StageName
from swifti2v.errors import NumericalError, ShapeError
from swifti2v.sampling import (
    add_noise,
    denoise,
    draw_noise,
    to_velocity,
)
from swifti2v.schedules import plan_sigmas, select_sigmas


def test_a_perfect_model_is_followed_to_the_data_in_any_number_of_steps():
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 1, 3, 4, 2, 2)
    for steps in (1, 4, 9):
        result = denoise(lambda x, s: noise - clean, noise, 0, plan_sigmas(steps))
        torch.testing.assert_close(result, clean, atol=1e-5, rtol=0)


FASTWAN = select_sigmas([1.0, 0.757, 0.522])


def test_noising_anew_is_the_stochastic_step_of_diffusers():
    """Which FastWan's users take for it; the levels arrive unshifted."""
    kind: Any = diffusers.FlowMatchEulerDiscreteScheduler
    scheduler = kind(shift=1.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=FASTWAN[:-1])
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 757, 522], abs=1e-4)
    start = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected, generator = start, torch.Generator().manual_seed(1)
    for timestep in scheduler.timesteps:
        velocity = (expected + timestep / 1000).sin()
        expected = scheduler.step(velocity, timestep, expected, generator=generator).prev_sample

    drawn = torch.Generator().manual_seed(1)
    result = denoise(
        lambda x, s: (x + s[:, None, :, None, None]).sin(),
        start,
        0,
        FASTWAN,
        renoise=lambda step: torch.randn(start.shape, generator=drawn),
    )

    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    assert (denoise(lambda x, s: x.sin(), start, 0, FASTWAN) - result).abs().max() > 0.1


def test_noise_is_put_on_the_clean_frames_and_none_on_the_result():
    """A model that knows the data: each step sees it at its level, under that step's noise."""
    torch.manual_seed(0)
    clean, given = torch.randn(2, 1, 3, 4, 2, 2)
    drawn = torch.randn(4, 1, 3, 2, 2, 2)  # for steps 0 to 3
    asked, seen = [], []

    def renoise(step):
        asked.append(step)
        return drawn[step]

    def velocity(x, sigma):
        level = sigma[0, -1]
        seen.append(level.item())
        assert torch.equal(x[:, :, :2], given[:, :, :2])
        expected = (1 - level) * clean[:, :, 2:] + level * drawn[len(seen) - 1]
        torch.testing.assert_close(x[:, :, 2:], expected, atol=1e-5, rtol=0)
        return (x - clean) / level

    start = torch.cat([given[:, :, :2], add_noise(clean[:, :, 2:], drawn[0], 0.9)], dim=2)
    result = denoise(velocity, start, 2, [0.9, 0.6, 0.3, 0], renoise=renoise)

    torch.testing.assert_close(result[:, :, 2:], clean[:, :, 2:], atol=1e-5, rtol=0)
    assert torch.equal(result[:, :, :2], given[:, :, :2])
    assert asked == [1, 2]
    assert seen == pytest.approx([0.9, 0.6, 0.3])


def test_given_frames_reach_the_model_bit_identical_with_sigma_zero_and_are_never_written():
    torch.manual_seed(0)
    latents = torch.randn(1, 3, 5, 2, 2)
    before = latents.clone()
    seen = []

    def velocity(x, sigma):
        seen.append(sigma.tolist())
        assert torch.equal(x[:, :, :2], before[:, :, :2])
        return torch.randn_like(x)

    result = denoise(velocity, latents, 2, plan_sigmas(4))
    assert torch.equal(latents, before)
    assert torch.equal(result[:, :, :2], before[:, :, :2])
    assert not torch.equal(result[:, :, 2:], before[:, :, 2:])
    assert [s[0][:2] for s in seen] == [[0, 0]] * 4
    assert [s[0][2] for s in seen] == pytest.approx(plan_sigmas(4)[:-1])


def test_nan_from_the_model_names_place_and_step():
    def velocity(x, sigma):
        return x / 0 if sigma.max() < 0.9 else x

    with pytest.raises(NumericalError, match=r"Stage II, segment 2 .* step 3"):
        denoise(
            velocity,
            torch.ones(1, 1, 2, 1, 1),
            0,
            plan_sigmas(4),
            where="Stage II, segment 2",
        )


def test_a_model_may_leave_out_the_given_frames():
    torch.manual_seed(0)
    latents = torch.randn(1, 3, 5, 2, 2)
    whole = denoise(lambda x, s: x.sin(), latents, 2, plan_sigmas(4))
    targets = denoise(lambda x, s: x[:, :, 2:].sin(), latents, 2, plan_sigmas(4))
    assert torch.equal(whole, targets)


@pytest.mark.parametrize("num_given", [-1, 3])
def test_one_frame_at_least_is_denoised(num_given):
    with pytest.raises(ShapeError, match=f"{num_given} of 3 frames"):
        denoise(lambda x, s: x, torch.zeros(1, 1, 3, 1, 1), num_given, [1, 0])


def test_both_parameterizations_describe_the_same_velocity():
    torch.manual_seed(0)
    clean, noise, reference = torch.randn(3, 2, 4, 3, 2, 2)
    sigma = torch.tensor([[0.0, 0.5, 0.9], [0.0, 1.0, 0.7]])
    noisy = torch.lerp(clean, noise, sigma[:, None, :, None, None])
    velocity = to_velocity(clean - reference, noisy, reference, sigma, "reference_residual")
    expected = torch.where(sigma[:, None, :, None, None] > 0, noise - clean, 0)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)
    last = (clean - reference)[:, :, 1:]  # a model may leave out what nobody reads
    assert torch.equal(
        to_velocity(last, noisy, reference, sigma, "reference_residual"), velocity[:, :, 1:]
    )
    assert to_velocity(clean, noisy, reference, sigma, "velocity") is clean


@given(
    st.integers(-(2**40), 2**40),
    st.lists(st.integers(0, 500), min_size=1, max_size=6, unique=True),
    st.integers(0, 50),
    st.sampled_from(get_args(StageName)),
)
def test_noise_depends_on_seed_stage_frame_and_step_only(seed, frames, step, stage):
    together = draw_noise((2, 3, 3), frames, seed, "cpu", step, stage=stage)
    for place, frame in enumerate(frames):
        alone = draw_noise((2, 3, 3), [frame], seed, "cpu", step, stage=stage)
        assert torch.equal(together[:, :, place], alone[:, :, 0])
    for other, at in ((seed + 1, step), (seed + 2**32, step), (seed, step + 1)):
        changed = draw_noise((2, 3, 3), frames, other, "cpu", at, stage=stage)
        assert not torch.equal(together, changed)


def test_no_frame_begins_like_another_step_or_stage_of_one():
    """However large the frames are: random numbers in a row, not a value at a place."""
    starts = {
        tuple(draw_noise((1, 1, 3), [frame], seed, "cpu", step, stage=stage).flatten().tolist())
        for stage in get_args(StageName)
        for seed in range(20)
        for frame in range(21)
        for step in range(3)
    }
    assert len(starts) == 2 * 20 * 21 * 3


def test_noise_is_standard_normal_and_frames_and_stages_are_independent():
    drawn = [draw_noise((16, 32, 32), range(4), 3, "cpu", stage=s) for s in get_args(StageName)]
    noise = torch.cat(drawn, dim=2)[0].flatten(2).transpose(0, 1).flatten(1)
    assert abs(noise.mean().item()) < 0.01  # 131,072 values: six standard errors
    assert abs(noise.std().item() - 1) < 0.01
    correlation = torch.corrcoef(noise) - torch.eye(8)
    assert correlation.abs().max() < 0.05  # 16,384 values each: six standard errors


def test_noised_latents_are_a_straight_line():
    clean, noise = torch.zeros(1), torch.ones(1)
    assert add_noise(clean, noise, 0.25).item() == 0.25
