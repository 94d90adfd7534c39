import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.evaluation.intervals import Estimate, bootstrap_mean, wilson_share

numbers = st.floats(-1e3, 1e3, allow_nan=False)


def ends(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


@given(st.lists(numbers, min_size=3, max_size=8))
def test_bootstrap_interval_holds_the_mean_and_stays_within_the_values(values):
    estimate = bootstrap_mean(values)
    low, high = ends(estimate)
    slack = 1e-9 * max(1, *map(abs, values))  # rounding of a mean of equal values
    assert min(values) - slack <= low <= estimate.value + slack
    assert estimate.value - slack <= high <= max(values) + slack


@pytest.mark.slow
def test_bootstrap_interval_narrows_as_the_square_root_of_the_count():
    few, many = (
        ends(bootstrap_mean(np.random.default_rng(1).normal(0, 1, count).tolist()))
        for count in (25, 2500)
    )
    # Ten times narrower; the factor 1.5 allows for the spread of 25 drawn values.
    assert 10 / 1.5 < (few[1] - few[0]) / (many[1] - many[0]) < 10 * 1.5


def test_few_or_unknown_values_have_no_interval():
    assert bootstrap_mean([1.0, 3.0]).low is None
    assert bootstrap_mean([1.0, 3.0, math.nan]).value == 2.0
    assert bootstrap_mean([1.0, 3.0, math.inf]).high is None
    assert math.isnan(bootstrap_mean([math.nan]).value)


def test_wilson_interval_of_a_known_case():
    low, high = ends(wilson_share(8, 10))
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)  # as in every table


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share_and_mirrors(counts):
    successes, trials = counts
    one, other = wilson_share(successes, trials), wilson_share(trials - successes, trials)
    (low, high), (other_low, _) = ends(one), ends(other)
    assert 0 <= low <= one.value <= high <= 1
    assert high == pytest.approx(1 - other_low, abs=1e-12)
    assert high > low


def test_wilson_refuses_more_successes_than_trials():
    with pytest.raises(ValueError, match="4 successes in 3 trials"):
        wilson_share(4, 3)
