from itertools import pairwise
from typing import Any, get_args

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.config import StageName
from swifti2v.errors import ConfigError, NumericalError, ShapeError
from swifti2v.sampling import (
    add_noise,
    denoise,
    draw_noise,
    plan_sigmas,
    shift_sigma,
    to_velocity,
)

FEW_STEP_GRID = (1.0, 0.75, 0.5, 0.25)
"""Unshifted noise levels of LightX2V's 4-step schedule."""


def test_four_steps_are_the_grid_of_the_distilled_loras():
    assert plan_sigmas(4, shift=5.0) == pytest.approx([1, 0.9375, 0.833333, 0.625, 0], abs=1e-6)
    assert plan_sigmas(4)[:-1] == [shift_sigma(s, 5.0) for s in FEW_STEP_GRID]


def test_diffusers_default_grid_is_another_one_and_its_explicit_one_is_ours():
    kind: Any = diffusers.FlowMatchEulerDiscreteScheduler
    scheduler = kind(shift=5.0)
    scheduler.set_timesteps(sigmas=list(FEW_STEP_GRID))
    assert scheduler.sigmas.tolist() == pytest.approx(plan_sigmas(4), abs=1e-6)
    scheduler.set_timesteps(4)
    assert abs(scheduler.sigmas[3].item() - 0.625) > 0.5


def test_all_steps_lie_below_the_strength_as_in_vibe():
    sigmas = plan_sigmas(50, shift=5.0, strength=0.7)
    assert len(sigmas) == 51
    assert sigmas[0] == pytest.approx(0.921, abs=5e-4)
    unshifted = torch.linspace(0.7, 0, 51, dtype=torch.float64)
    expected = 5 * unshifted / (1 + 4 * unshifted)
    torch.testing.assert_close(torch.tensor(sigmas, dtype=torch.float64), expected)


@given(st.integers(1, 60), st.floats(0.5, 12), st.floats(0.01, 1))
def test_sigmas_fall_strictly_to_zero(steps, shift, strength):
    sigmas = plan_sigmas(steps, shift, strength)
    assert all(a > b for a, b in pairwise(sigmas))
    assert sigmas[0] <= 1
    assert sigmas[-1] == 0
    assert len(sigmas) == steps + 1


@pytest.mark.parametrize("bad", [{"num_inference_steps": 0}, {"shift": 0}, {"strength": 0}])
def test_values_out_of_range_are_named(bad):
    (name,) = bad
    with pytest.raises(ConfigError, match=name):
        plan_sigmas(**({"num_inference_steps": 4} | bad))


def test_a_perfect_model_is_followed_to_the_data_in_any_number_of_steps():
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 1, 3, 4, 2, 2)
    for steps in (1, 4, 9):
        result = denoise(lambda x, s: noise - clean, noise, 0, plan_sigmas(steps))
        torch.testing.assert_close(result, clean, atol=1e-5, rtol=0)


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
    st.sampled_from(get_args(StageName)),
)
def test_noise_depends_on_seed_stage_and_frame_only(seed, frames, stage):
    together = draw_noise((2, 3, 3), frames, seed, "cpu", stage=stage)
    for place, frame in enumerate(frames):
        alone = draw_noise((2, 3, 3), [frame], seed, "cpu", stage=stage)
        assert torch.equal(together[:, :, place], alone[:, :, 0])
    for other in (seed + 1, seed + 2**32):
        assert not torch.equal(together, draw_noise((2, 3, 3), frames, other, "cpu", stage=stage))


def test_no_frame_of_a_stage_begins_like_one_of_the_other_stage():
    """However large the frames are: random numbers in a row, not a value at a place."""
    starts = {
        tuple(draw_noise((1, 1, 3), [frame], seed, "cpu", stage=stage).flatten().tolist())
        for stage in get_args(StageName)
        for seed in range(40)
        for frame in range(21)
    }
    assert len(starts) == 2 * 40 * 21


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
