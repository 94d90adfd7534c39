"""The moving average of trained weights: its formula, and whom it changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from swifti2v.training.engine.averages import MovingAverage, cast_trained, trained_weights

paths = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12)
"""A weight after each step."""


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two layers, of which the first is frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    model[0].requires_grad_(False)
    return model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value, state[name]), name


def move(model: nn.Module, by: float) -> None:
    with torch.no_grad():
        for value in model.parameters():
            value.add_(by)


def test_the_trained_weights_are_those_that_require_a_gradient():
    assert [name for name, _ in trained_weights(make_model())] == ["1.weight", "1.bias"]


def test_casting_changes_the_trained_weights_alone_and_in_place():
    model = make_model()
    before = dict(model.named_parameters())
    cast_trained(model, torch.bfloat16)
    assert all(value is before[name] for name, value in model.named_parameters())
    dtypes = {name: value.dtype for name, value in model.named_parameters()}
    assert dtypes == {
        "0.weight": torch.float32, "0.bias": torch.float32,
        "1.weight": torch.bfloat16, "1.bias": torch.bfloat16,
    }  # fmt: skip


@given(start=st.floats(-10, 10, width=32), path=paths, limit=st.floats(0, 0.9999))
@settings(max_examples=30, deadline=None)
def test_it_is_the_weighted_mean_that_the_decay_gives(start, path, limit):
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(start)
    average = MovingAverage(model, limit)
    expected = start
    for step, value in enumerate(path, 1):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(step)
        decay = min(limit, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    (found,) = average.weights.values()
    # Every step rounds to float32, of numbers up to 10.
    assert found.item() == pytest.approx(expected, abs=1e-4)
    assert min(start, *path) - 1e-4 <= found.item() <= max(start, *path) + 1e-4


def test_the_start_is_forgotten_first_and_the_decay_ends_at_its_limit():
    """From 1 to 0: what is left of the start after a step is the product of the decays."""
    left = []
    for limit in (0.5, 0.9999):
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        average = MovingAverage(model, limit)
        nn.init.zeros_(model.weight)
        for step in range(1, 11):
            average.update(step)
        left.append(average.weights["weight"].item())
    assert left[1] == pytest.approx(torch.tensor([(1 + n) / (10 + n) for n in range(1, 11)]).prod())
    assert left[0] == pytest.approx(
        torch.tensor([min(0.5, (1 + n) / (10 + n)) for n in range(1, 11)]).prod()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_of_the_trained_weights_and_in_float32(dtype):
    model = make_model(dtype)
    average = MovingAverage(model, 0.9)
    assert list(average.weights) == ["1.weight", "1.bias"]
    assert {value.dtype for value in average.weights.values()} == {torch.float32}
    before = {name: value.clone() for name, value in average.weights.items()}
    average.update(1)  # nothing was trained
    assert all(torch.equal(value, before[name]) for name, value in average.weights.items())


def test_small_steps_of_bfloat16_weights_are_not_lost():
    """A change of the average below the resolution of bfloat16 adds up."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    average = MovingAverage(model, 0.999)
    with torch.no_grad():
        model.weight.fill_(1 + 2**-7)  # the next number
    for step in range(10_000, 10_100):
        average.update(step)
    expected = 1 + 2**-7 * (1 - 0.999**100)
    assert average.weights["weight"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_within_the_block_the_model_has_the_average_and_afterwards_its_own_weights(dtype, fails):
    model = make_model(dtype)
    average = MovingAverage(model, 0.9)
    start = state_of(model)
    move(model, 1.0)
    own, parameters = state_of(model), dict(model.named_parameters())
    with pytest.raises(KeyboardInterrupt) if fails else average.applied():
        if fails:
            with average.applied():
                raise KeyboardInterrupt
        trained = {name: start[name] for name, _ in trained_weights(model)}
        assert_state(model, own | trained)
    assert_state(model, own)
    assert all(value is parameters[name] for name, value in model.named_parameters())


def test_what_is_done_within_the_block_does_not_reach_the_average():
    model = make_model()
    average = MovingAverage(model, 0.9)
    before = {name: value.clone() for name, value in average.weights.items()}
    with average.applied():
        move(model, 5.0)
    assert all(torch.equal(value, before[name]) for name, value in average.weights.items())


def test_taken_the_average_is_the_models_for_good():
    model = make_model(torch.bfloat16)
    average = MovingAverage(model, 0.9)
    move(model, 1.0)
    frozen = state_of(model)
    average.update(1)
    average.take()
    taken = {name: value.bfloat16() for name, value in average.weights.items()}
    assert_state(model, frozen | taken)


def test_without_an_average_the_model_keeps_its_weights():
    model = make_model()
    average = MovingAverage(model, None)
    move(model, 1.0)
    own = state_of(model)
    average.update(1)
    with average.applied():
        assert_state(model, own)
        move(model, 1.0)
        changed = state_of(model)
    assert_state(model, changed)
    average.take()
    assert_state(model, changed)
    assert average.weights == {}
