"""The loss for detail equals its closed form; degradations take detail and nothing else."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from swifti2v.errors import ConfigError, ShapeError
from swifti2v.schedules import plan_sigmas
from swifti2v.training.objectives import bell_weight, hfato_loss
from swifti2v.training.relay.degradations import DegradationConfig, degrade_latents

SHAPE = (3, 4, 2, 6, 8)
KINDS = [DegradationConfig(kind=kind) for kind in ("down_up", "blur", "noise")]


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents, noise, velocity = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    return latents, noise, velocity


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sigma=st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3).map(torch.tensor),
    config=st.sampled_from(KINDS),
)
def test_the_loss_is_the_weighted_error_of_the_velocity(
    seed: int, sigma: Tensor, config: DegradationConfig
) -> None:
    latents, noise, velocity = draw(seed)
    degraded = degrade_latents(latents, config, torch.Generator().manual_seed(seed))
    seen = []

    def model(hidden_states: Tensor, levels: Tensor) -> Tensor:
        seen.append((hidden_states, levels))
        return velocity

    loss = hfato_loss(model, latents, degraded, sigma, noise)
    level = sigma[:, None, None, None, None]
    wanted = noise - degraded + (degraded - latents) / level
    error = (velocity - wanted).square().flatten(1).mean(dim=1)
    # The two forms round differently by about 1e-7 / sigma of the latents.
    torch.testing.assert_close(loss, bell_weight(sigma) * sigma**2 * error, rtol=1e-4, atol=1e-6)
    ((hidden_states, levels),) = seen
    torch.testing.assert_close(hidden_states, (1 - level) * degraded + level * noise)
    assert torch.equal(levels, sigma[:, None].expand(-1, 2))


def test_a_model_that_knows_the_detail_has_no_loss_and_samples_are_independent() -> None:
    latents, noise, _ = draw(0)
    sigma = torch.tensor([0.3, 0.5, 0.9])
    degraded = degrade_latents(latents, DegradationConfig())
    perfect = noise - degraded + (degraded - latents) / sigma[:, None, None, None, None]
    loss = hfato_loss(lambda *_: perfect, latents, degraded, sigma, noise)
    torch.testing.assert_close(loss, torch.zeros(3), atol=1e-10, rtol=0)
    perfect[1] += 1
    loss = hfato_loss(lambda *_: perfect, latents, degraded, sigma, noise)
    assert loss.shape == (3,)
    assert loss[0] < 1e-10 < loss[1]


def test_plain_flow_matching_towards_the_degraded_latents_has_a_loss() -> None:
    latents, noise, _ = draw(0)
    degraded = degrade_latents(latents, DegradationConfig())
    sigma = torch.tensor([0.3, 0.5, 0.9])
    loss = hfato_loss(lambda *_: noise - degraded, latents, degraded, sigma, noise)
    missing = (degraded - latents).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(loss, bell_weight(sigma) * missing)


def test_low_precision_models_give_a_float32_loss() -> None:
    latents, noise, velocity = (tensor.bfloat16() for tensor in draw(0))
    loss = hfato_loss(lambda *_: velocity, latents, latents, torch.full((3,), 0.5), noise)
    assert loss.dtype == torch.float32


def test_the_weight_has_mean_1_over_the_schedule_and_ends_at_0() -> None:
    levels = torch.tensor(plan_sigmas(1000, shift=5.0)[:-1])
    weight = bell_weight(levels)
    assert len(weight) == 1000
    assert weight.mean().item() == pytest.approx(1, abs=1e-5)
    assert weight.min().item() == pytest.approx(0, abs=1e-6)
    assert (bell_weight(torch.tensor([0.0, 1.0])).abs() < 1e-6).all()
    assert bell_weight(torch.tensor(0.5)) > bell_weight(torch.tensor([0.4, 0.6])).max()
    torch.testing.assert_close(bell_weight(torch.tensor(0.3)), bell_weight(torch.tensor(0.7)))
    # By hand: the bell at 0.5 is 1, the least value exp(-1/2).
    bell = torch.exp(-2 * (levels.double() - 0.5) ** 2)
    by_hand = (1 - bell.min()) / (bell - bell.min()).mean()
    torch.testing.assert_close(bell_weight(torch.tensor(0.5)).double(), by_hand, rtol=1e-5, atol=0)


def test_down_and_up_is_trilinear_by_2_and_keeps_time() -> None:
    latents = draw(1)[0]
    degraded = degrade_latents(latents, DegradationConfig())
    averaged = F.avg_pool3d(latents, (1, 2, 2))  # what trilinear by exactly 2 does
    expected = F.interpolate(averaged, size=SHAPE[2:], mode="trilinear", align_corners=False)
    torch.testing.assert_close(degraded, expected)


@pytest.mark.parametrize("config", KINDS[:2], ids=lambda config: config.kind)
def test_frames_are_degraded_by_themselves_and_plain_areas_stay(config: DegradationConfig) -> None:
    latents = draw(2)[0]
    degraded = degrade_latents(latents, config)
    changed = latents.clone()
    changed[:, :, 1] += 3
    again = degrade_latents(changed, config)
    torch.testing.assert_close(again[:, :, 0], degraded[:, :, 0])
    torch.testing.assert_close(again[:, :, 1], degraded[:, :, 1] + 3)
    assert degraded.std() < 0.9 * latents.std()
    flat = torch.full(SHAPE, 0.7)
    torch.testing.assert_close(degrade_latents(flat, config), flat)


@pytest.mark.parametrize("factor", [1.5, 3.0, 6.0])
def test_other_factors_take_more_or_less(factor: float) -> None:
    latents = draw(3)[0]
    degraded = degrade_latents(latents, DegradationConfig(factor=factor))
    assert degraded.shape == latents.shape
    if factor == 6:
        assert degraded.diff(dim=-2).abs().max() < 1e-6  # one row is left, and nothing between


def test_noise_has_its_deviation_and_follows_the_generator() -> None:
    latents, config = torch.zeros(1, 8, 1, 64, 64), DegradationConfig(kind="noise", noise=0.3)
    first, again, other = (
        degrade_latents(latents, config, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(0.3, rel=0.02)  # of 32768 draws: 0.4 % deviation


@pytest.mark.parametrize(
    "values", [{"factor": 1.0}, {"blur": 0.0}, {"noise": -1.0}, {"factor": float("inf")}]
)
def test_impossible_degradations_name_the_field(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        DegradationConfig(**values)


def test_frames_smaller_than_the_factor_are_refused() -> None:
    with pytest.raises(ShapeError, match="6x8 cannot be made 7 times"):
        degrade_latents(draw(0)[0], DegradationConfig(factor=7))
