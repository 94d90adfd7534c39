"""Noise levels of a run: planned, or those that weights were distilled for."""

from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.config import SamplingConfig, parse_config, parse_override, to_dict
from swifti2v.errors import ConfigError
from swifti2v.schedules import plan_sigmas, select_sigmas, shift_sigma

FEW_STEP_GRID = (1.0, 0.75, 0.5, 0.25)
"""Unshifted noise levels of LightX2V's 4-step schedule."""
FASTWAN = (1.0, 0.757, 0.522)


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


ladders = st.lists(st.floats(0.001, 1), min_size=1, max_size=8, unique=True).map(
    lambda levels: sorted(levels, reverse=True)
)


@given(ladders, st.floats(0.001, 1))
def test_a_strength_runs_the_last_levels_of_a_ladder_and_no_other(ladder, strength):
    assert select_sigmas(ladder) == [*ladder, 0]
    left_out = sum(level > strength for level in ladder)
    if left_out == len(ladder):
        with pytest.raises(ConfigError, match="no step would run"):
            select_sigmas(ladder, strength)
    else:
        assert select_sigmas(ladder, strength) == [*ladder[left_out:], 0]


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        (1.0, [1.0, 0.757, 0.522, 0]),
        (0.757, [0.757, 0.522, 0]),
        (0.7, [0.522, 0]),
        (0.522, [0.522, 0]),
    ],
)
def test_levels_of_fastwan_are_exact(strength, expected):
    sampling = SamplingConfig(sigmas=FASTWAN, num_inference_steps=3, strength=strength)
    assert sampling.plan_sigmas() == expected
    assert sampling.num_calls == len(expected) - 1
    assert parse_config(SamplingConfig, to_dict(sampling), "x") == sampling


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigmas": [1, 0.522, 0.757]}, r"sigmas is 1, 0.522, 0.757; each must be below the one"),
        ({"sigmas": [1, 1, 0.5]}, "below the one before"),
        ({"sigmas": [1.2, 0.7, 0.5]}, "above 0 and at most 1"),
        ({"sigmas": [1000, 757, 522]}, "sigmas is 1000, 757, 522; each must be above 0 and at most 1"),
        ({"sigmas": [float("nan"), 0.7, 0.5]}, "above 0 and at most 1"),
        ({"sigmas": [0.7, 0.5, 0]}, "the final 0 is understood, leave it out"),
        ({"sigmas": []}, "sigmas is empty"),
        ({"sigmas": [1, 0.5]}, "num_inference_steps is 3, but sigmas lists 2 .* give 2 steps"),
        ({"sigmas": "1,0.7,0.5"}, "sigmas"),
        ({"strength": 0.5}, r"strength is 0.5, below all of sigmas \(1, 0.757, 0.522\)"),
        ({"rule": "ancestral"}, "rule"),
    ],
)  # fmt: skip
def test_ladders_that_cannot_run_are_refused(values, message):
    usual = {"num_inference_steps": 3, "sigmas": list(FASTWAN)}
    with pytest.raises(ConfigError, match=f"(?s)run.yaml: .*{message}"):
        parse_config(SamplingConfig, usual | values, "run.yaml")


def test_a_ladder_is_given_by_path():
    nested = parse_override("stage2.sampling.sigmas=[1, .757, .522]")
    assert nested == {"stage2": {"sampling": {"sigmas": list(FASTWAN)}}}
