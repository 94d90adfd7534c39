"""Samples of a training step."""

import pickle
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.errors import ConfigError, InputError
from swifti2v.shapes import PixelShape
from swifti2v.training.data.batch_plan import BatchPlan

SMALL, LARGE = PixelShape(9, 32, 48), PixelShape(17, 64, 96)


def even(num_samples: int, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}{index:04}": 1.0 for index in range(num_samples)}


def ids_of(plan: BatchPlan, step: int) -> list[str]:
    return [id_ for id_, _ in plan.batch(step)[1]]


def seeds_of(plan: BatchPlan, step: int) -> list[int]:
    return [seed for _, seed in plan.batch(step)[1]]


sizes = st.integers(1, 40)
weights = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4), st.floats(0.01, 20), min_size=1, max_size=12
)


@settings(deadline=None)
@given(num_samples=sizes, batch_size=st.integers(1, 16), seed=st.integers(0, 2**40))
def test_an_epoch_holds_every_sample_once(num_samples: int, batch_size: int, seed: int) -> None:
    plan = BatchPlan({SMALL: even(num_samples)}, batch_size=batch_size, seed=seed)
    ids = [id_ for step in range(3 * num_samples) for id_ in ids_of(plan, step)]
    epochs = [ids[i : i + num_samples] for i in range(0, 3 * num_samples, num_samples)]
    assert all(sorted(epoch) == sorted(even(num_samples)) for epoch in epochs)
    if num_samples >= 10:
        assert epochs[0] != epochs[1]


@settings(deadline=None)
@given(
    small=weights,
    large=weights,
    seed=st.integers(0, 100),
    steps=st.lists(st.integers(0, 5000), min_size=1, max_size=8),
)
def test_a_plan_has_no_state(
    small: dict[str, float], large: dict[str, float], seed: int, steps: list[int]
) -> None:
    plan = BatchPlan({SMALL: small, LARGE: large}, batch_size=4, seed=seed)
    # Other orders of listing and of asking, and a copy for another process.
    reversed_small = dict(reversed(small.items()))
    other = BatchPlan({LARGE: large, SMALL: reversed_small}, batch_size=4, seed=seed)
    assert other.fingerprint == plan.fingerprint
    expected = {step: plan.batch(step) for step in steps}
    assert {step: other.batch(step) for step in reversed(steps)} == expected
    copy = pickle.loads(pickle.dumps(other))
    assert {step: copy.batch(step) for step in steps} == expected


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(small=weights, large=weights, seed=st.integers(0, 2**32))
def test_buckets_and_samples_come_by_weight(
    small: dict[str, float], large: dict[str, float], seed: int
) -> None:
    plan = BatchPlan({SMALL: small, LARGE: large}, batch_size=2, seed=seed)
    batches = [plan.batch(step) for step in range(2048)]
    share = sum(small.values()) / (sum(small.values()) + sum(large.values()))
    assert plan.shares[SMALL] == pytest.approx(share)
    num_small = sum(bucket == SMALL for bucket, _ in batches)
    assert abs(num_small - 2048 * share) <= 4  # two for each 1024 steps
    ids = [id_ for bucket, samples in batches if bucket == SMALL for id_, _ in samples]
    epoch = len(small)
    for start in range(0, len(ids) - epoch + 1, epoch):
        counts = Counter(ids[start : start + epoch])
        for id_, weight in small.items():
            expected = epoch * weight / sum(small.values())
            assert abs(counts[id_] - expected) < 1 + 1e-9


def test_weights_are_expected_shares() -> None:
    plan = BatchPlan({SMALL: {"a": 1, "b": 2, "c": 0.5, "d": 0.5}}, batch_size=4)
    counts = Counter(id_ for step in range(4000) for id_ in ids_of(plan, step))
    # An epoch has 4 places and each count is one of two neighbours, so the deviation of the sum
    # over 4000 is at most sqrt(4000) / 2 = 32.
    for id_, share in {"a": 0.25, "b": 0.5, "c": 0.125, "d": 0.125}.items():
        assert abs(counts[id_] - 16_000 * share) < 4 * 32


def test_a_bucket_smaller_than_a_batch_repeats_samples() -> None:
    plan = BatchPlan({SMALL: even(3), LARGE: even(64, "x")}, batch_size=8)
    batches = [plan.batch(step) for step in range(200)]
    different = {bucket: len({id_ for id_, _ in samples}) for bucket, samples in batches}
    assert different == {SMALL: 3, LARGE: 8}
    seen = {id_ for _, samples in batches for id_, _ in samples}
    assert seen == {*even(3), *even(64, "x")}


def test_a_sample_has_another_seed_each_time() -> None:
    plan = BatchPlan({SMALL: even(3)}, batch_size=8)
    seeds = [seed for step in range(50) for seed in seeds_of(plan, step)]
    assert len(set(seeds)) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds_of(plan, 0) != seeds_of(BatchPlan({SMALL: even(3)}, batch_size=8, seed=1), 0)


def test_the_plan_of_a_run_under_way_never_changes() -> None:
    # Changing these numbers breaks the resuming of runs.
    members = {SMALL: {"a": 1.0, "b": 1.0, "c": 2.0}, LARGE: {"d": 1.0, "e": 1.0}}
    plan = BatchPlan(members, batch_size=3, seed=7)
    batches = [plan.batch(step) for step in (0, 1, 2, 3, 5000)]
    assert [(bucket.num_frames, "".join(i for i, _ in samples)) for bucket, samples in batches] == [
        (9, "bcc"),
        (9, "acb"),
        (9, "cca"),
        (9, "cca"),
        (9, "bcc"),
    ]
    assert seeds_of(plan, 5000) == [1338942835559428685, 1613733600336222574, 8059134330302182070]


def test_a_fingerprint_tells_plans_apart() -> None:
    members = {SMALL: {"a": 1.0, "b": 1.0}}
    plans = [
        BatchPlan(members, batch_size=2),
        BatchPlan(members, batch_size=2, seed=1),
        BatchPlan(members, batch_size=4),
        BatchPlan({LARGE: members[SMALL]}, batch_size=2),
        BatchPlan({SMALL: {"a": 1.0, "b": 2.0}}, batch_size=2),
        BatchPlan({SMALL: {"a": 1.0, "c": 1.0}}, batch_size=2),
        BatchPlan({SMALL: {"a\nb": 1.0}}, batch_size=2),
    ]
    assert len({plan.fingerprint for plan in plans}) == len(plans)


@pytest.mark.slow
def test_a_million_samples_are_cheap() -> None:
    plan = BatchPlan({SMALL: even(900_000), LARGE: even(100_000, "x")}, batch_size=64)
    start = time.process_time()
    plan.batch(1_000_000)  # what a resumed run asks for first
    first = time.process_time() - start
    start = time.process_time()
    for step in range(1_000_001, 1_000_101):
        plan.batch(step)
    assert first < 5
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("members", "options", "error", "message"),
    [
        ({}, {}, InputError, "no sample"),
        ({SMALL: {}}, {}, InputError, "no sample"),
        ({SMALL: {"a": 0.0}}, {}, InputError, "sample a has weight 0"),
        ({SMALL: {"a": float("nan")}}, {}, InputError, "sample a has weight nan"),
        ({SMALL: {"a": 1.0}}, {"batch_size": 0}, ConfigError, "batch_size 0"),
        ({SMALL: {"a": 1.0}}, {"seed": -1}, ConfigError, "seed -1"),
    ],
)
def test_what_cannot_be_planned_is_refused(members, options, error, message):
    with pytest.raises(error, match=message):
        BatchPlan(members, **{"batch_size": 2, **options})


def test_a_step_below_zero_is_refused() -> None:
    plan = BatchPlan({SMALL: even(3)}, batch_size=4)
    with pytest.raises(InputError, match="step is -1"):
        plan.batch(-1)
