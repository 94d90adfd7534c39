"""Random draws: by seed, step and sample alone, however a step is divided."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.training.engine.draws import Draw, draws_of_step, split_batch

SHAPE = (2, 3)


def values_of(draws: list[Draw]) -> dict[int, tuple[Any, ...]]:
    """All that the samples of some micro-batches draw, by index."""
    found = {}
    for draw in draws:
        noise = draw.noise_like(torch.empty(len(draw.indices), *SHAPE))
        for place, index in enumerate(draw.indices):
            found[index] = (
                tuple(draw.samples()[place].integers(1000, size=4).tolist()),
                float(draw.uniforms()[place]),
                tuple(noise[place].flatten().tolist()),
                float(draw.shared().random()),
                float(draw.group(index // 2).random()),
                draw.batch_size,
            )
    return found


divisions = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))


@settings(max_examples=40, deadline=None)
@given(division=divisions, seed=st.integers(0, 2**40), step=st.integers(0, 2**41))
def test_samples_do_not_depend_on_ranks_and_micro_batches(division, seed, step):
    num_micro_batches, world_size, size = division
    batch_size = num_micro_batches * world_size * size
    whole = values_of(draws_of_step(seed, step, split_batch(batch_size, 1, 1), 0))
    parts = split_batch(batch_size, num_micro_batches, world_size)
    divided = [
        draw for rank in range(world_size) for draw in draws_of_step(seed, step, parts, rank)
    ]
    assert len(divided) == num_micro_batches * world_size
    assert {len(draw.indices) for draw in divided} == {size}
    assert sorted(index for draw in divided for index in draw.indices) == list(range(batch_size))
    assert values_of(divided) == whole


@pytest.mark.parametrize("division", [(0, 1, 1), (6, 4, 1), (6, 1, 4), (6, 2, 2), (2, 2, 2)])
def test_a_batch_that_cannot_be_divided_evenly_is_refused(division):
    with pytest.raises(ValueError, match=f"batch_size {division[0]} is not a multiple"):
        split_batch(*division)


def test_draws_cross_processes():
    draw = Draw(seed=1, step=2, batch_size=8, indices=(3, 4))
    again = pickle.loads(pickle.dumps(draw))
    assert again == draw
    assert values_of([again]) == values_of([draw])


def test_all_that_is_drawn_differs_by_seed_step_and_sample():
    seen: dict[str, set[Any]] = {"samples": set(), "uniforms": set(), "noise": set()}
    keys = [(seed, step) for seed in (0, 1) for step in (0, 1, 2**40)]
    for seed, step in keys:
        found = values_of([Draw(seed=seed, step=step, batch_size=4, indices=(0, 1, 2, 3))])
        for samples, uniform, noise, *_ in found.values():
            seen["samples"].add(samples)
            seen["uniforms"].add(uniform)
            seen["noise"].add(noise)
    assert {len(values) for values in seen.values()} == {4 * len(keys)}


def test_kinds_of_draws_do_not_share_numbers():
    draw = Draw(seed=0, step=0, batch_size=1, indices=(0,))
    first = [draw.shared(), draw.samples()[0], draw.group(0), draw.group(1)]
    assert len({float(rng.random()) for rng in first}) == 4


def test_what_a_step_shares_is_the_same_for_all_and_differs_by_step():
    draws = [Draw(seed=0, step=step, batch_size=2, indices=(i,)) for step in (0, 1) for i in (0, 1)]
    shared = [float(draw.shared().random()) for draw in draws]
    assert shared[0] == shared[1] != shared[2] == shared[3]


def test_numbers_are_distributed_as_they_should_be():
    draw = Draw(seed=3, step=1, batch_size=400, indices=tuple(range(400)))
    uniforms, noise = draw.uniforms(), draw.noise_like(torch.empty(400, 50))
    assert uniforms.dtype == noise.dtype == torch.float32
    assert 0 <= uniforms.min() < uniforms.max() < 1
    assert np.histogram(uniforms, bins=4, range=(0, 1))[0].min() > 60
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.02
    correlation = np.corrcoef(noise[:-1].flatten(), noise[1:].flatten())[0, 1]
    assert abs(correlation) < 0.03
