"""Noise levels: quantiles against theory, exact inference levels, strata shared by ranks."""

import math
from collections import Counter
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.errors import ConfigError, InputError
from swifti2v.schedules import plan_sigmas, shift_sigma
from swifti2v.training.engine.noise_histogram import SigmaHistogram
from swifti2v.training.stages.noise_levels import NoiseLevelConfig, draw_sigmas, stratify

GRID = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)

configs = st.builds(
    NoiseLevelConfig,
    distribution=st.sampled_from(["uniform", "logit_normal"]),
    mean=st.floats(-10, 10),
    std=st.floats(0.01, 5),
    shift=st.floats(0.01, 100),
    inference_share=st.floats(0, 1),
    num_inference_steps=st.integers(1, 50),
)


def quantiles(config: NoiseLevelConfig) -> list[float]:
    sigmas = draw_sigmas(config, GRID).double()
    return [float(sigmas.quantile(q)) for q in QUANTILES]


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_uniform_levels_have_the_quantiles_of_the_shift(shift):
    expected = [shift_sigma(q, shift) for q in QUANTILES]
    # 10,000 evenly spaced numbers: a quantile is off by at most the slope (shift) times 1e-4.
    assert quantiles(NoiseLevelConfig(shift=shift)) == pytest.approx(expected, abs=shift * 1e-4)


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.8, 0.5, 5.0)])
def test_logit_normal_levels_have_the_quantiles_of_theory(mean, std, shift):
    normal = NormalDist(mean, std)
    expected = [shift_sigma(1 / (1 + math.exp(-normal.inv_cdf(q))), shift) for q in QUANTILES]
    config = NoiseLevelConfig(distribution="logit_normal", mean=mean, std=std, shift=shift)
    assert quantiles(config) == pytest.approx(expected, abs=2e-3)


def test_inference_levels_are_those_of_the_sampler_each_as_often():
    sigmas = draw_sigmas(NoiseLevelConfig(distribution="inference"), GRID)
    expected = torch.tensor(plan_sigmas(4)[:-1])
    assert expected.tolist() == pytest.approx([1, 0.9375, 0.833333, 0.625], abs=1e-6)
    assert Counter(sigmas.tolist()) == dict.fromkeys(expected.tolist(), 2500)


def test_the_inference_share_is_a_share_and_the_rest_is_the_distribution():
    config = NoiseLevelConfig(inference_share=0.3, shift=1.0)
    sigmas = draw_sigmas(config, GRID)
    is_level = torch.isin(sigmas, torch.tensor(plan_sigmas(4, 1.0)[:-1]))
    assert is_level[:3000].all()
    assert is_level.sum() == 3000
    rest = sigmas[3000:].double()
    assert float(rest.quantile(0.25)) == pytest.approx(0.25, abs=2e-4)
    assert float(rest.quantile(0.75)) == pytest.approx(0.75, abs=2e-4)
    everything = draw_sigmas(NoiseLevelConfig(inference_share=1.0), GRID)
    assert torch.equal(everything, draw_sigmas(NoiseLevelConfig(distribution="inference"), GRID))


@settings(max_examples=200, deadline=None)
@given(config=configs, numbers=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=8))
def test_every_level_is_above_zero_and_at_most_one(config, numbers):
    numbers = [*numbers, 0.0, math.nextafter(1.0, 0.0)]
    sigmas = draw_sigmas(config, torch.tensor(numbers, dtype=torch.float64))
    assert sigmas.shape == (len(numbers),)
    assert sigmas.dtype == torch.float32
    assert ((sigmas > 0) & (sigmas <= 1)).all()


@settings(max_examples=100, deadline=None)
@given(
    num_ranks=st.integers(1, 4),
    share=st.integers(1, 9),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_ranks_share_one_stratification(num_ranks, share, seed, dtype):
    batch = num_ranks * share
    uniforms = torch.rand(batch, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    uniforms[0], uniforms[-1] = 1 - torch.finfo(dtype).eps / 2, 0
    indices = torch.arange(batch)
    parts = [
        stratify(uniforms[rank::num_ranks], indices[rank::num_ranks], batch, seed)
        for rank in range(num_ranks)
    ]
    numbers = torch.cat(parts)
    assert ((numbers >= 0) & (numbers < 1)).all()
    for stratum, number in enumerate(sorted(numbers.tolist())):
        assert stratum / batch <= number <= (stratum + 1) / batch
    whole = stratify(uniforms, indices, batch, seed)
    for rank, part in enumerate(parts):
        assert torch.equal(part, whole[rank::num_ranks])


def test_the_permutation_moves_the_strata_from_step_to_step():
    numbers = torch.full((64,), 0.5)
    first, second, again = (stratify(numbers, torch.arange(64), 64, seed) for seed in (1, 2, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, first.sort().values)


def test_a_stratified_batch_of_four_asks_each_inference_level_once():
    uniforms = torch.rand(4, generator=torch.Generator().manual_seed(0))
    config = NoiseLevelConfig(distribution="inference")
    sigmas = draw_sigmas(config, stratify(uniforms, torch.arange(4), 4, seed=7))
    assert sorted(sigmas.tolist()) == sorted(torch.tensor(plan_sigmas(4)[:-1]).tolist())


def test_histogram_counts_the_bin_a_level_ends_and_continues_exactly():
    histogram = SigmaHistogram()
    histogram.add(torch.tensor([[0.05, 0.051], [1.0, 1e-9]]))
    counts = histogram.to_dict()
    assert len(counts) == 20
    assert {name: n for name, n in counts.items() if n} == {
        "0.00-0.05": 2, "0.05-0.10": 1, "0.95-1.00": 1,
    }  # fmt: skip
    state = histogram.state_dict()
    histogram.add(torch.tensor([0.5]))
    assert state["counts"].sum() == 4
    other = SigmaHistogram()
    other.load_state_dict(state)
    other.add(torch.tensor([0.5]))
    assert other.to_dict() == histogram.to_dict()
    assert other.to_dict()["0.45-0.50"] == 1


@pytest.mark.parametrize("levels", [[0.0], [1.01], [math.nan]])
def test_histogram_refuses_what_is_no_training_level(levels):
    with pytest.raises(InputError, match=r"must be in \(0, 1\]"):
        SigmaHistogram().add(torch.tensor(levels))


@pytest.mark.parametrize("numbers", [[1.0], [-0.1], [math.nan], [[0.5]]])
def test_numbers_outside_the_unit_interval_are_refused(numbers):
    with pytest.raises(InputError, match=r"\[0, 1\)"):
        draw_sigmas(NoiseLevelConfig(), torch.tensor(numbers))


def test_strata_refuse_an_index_of_another_batch():
    with pytest.raises(InputError, match="index 4 to 4 in a global batch of 4"):
        stratify(torch.tensor([0.5]), torch.tensor([4]), 4, 0)
    with pytest.raises(InputError, match=r"\[1\] uniform numbers and \[2\]"):
        stratify(torch.tensor([0.5]), torch.tensor([0, 1]), 4, 0)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"std": 0.0}, "std 0.0"),
        ({"mean": 11.0}, "mean 11.0"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"inference_share": 1.5}, "inference_share is 1.5"),
        ({"inference_share": 0.5, "distribution": "inference"}, "draws nothing else"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
    ],
)
def test_bad_settings_are_named(values, text):
    with pytest.raises(ConfigError, match=text):
        NoiseLevelConfig(**values)
