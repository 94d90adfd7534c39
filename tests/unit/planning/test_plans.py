import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.config import GenerationConfig, merge, parse_config
from swifti2v.errors import ConfigError
from swifti2v.evaluation.speed.published import PUBLISHED, count_published, predict, published_rates
from swifti2v.models.loading.sources import find_model
from swifti2v.models.vae.tiles import count_tiles
from swifti2v.planning.costs import STAGES, ClipCosts
from swifti2v.planning.devices import DEVICES, PRECISIONS, find_device
from swifti2v.planning.measurement import free_bytes, measure
from swifti2v.planning.plans import (
    MIN_TILE,
    PLACEMENTS,
    SEARCH_THREADS,
    Wish,
    estimate,
    make_plan,
    propose_tiles,
)
from swifti2v.planning.stored import find_costs
from swifti2v.units import GB, MB

RTX4090 = DEVICES["rtx4090"]
few = settings(max_examples=40, deadline=None)


def settings_of(model: str, **changes: Any) -> GenerationConfig:
    return parse_config(GenerationConfig, merge(find_model(model)[0].settings, changes), model)


@cache
def paper() -> ClipCosts:
    return find_costs("paper", settings_of("paper"), "bfloat16")


@cache
def paper_carried() -> ClipCosts:
    config = settings_of("paper", stage2={"reference_detail": "carried"})
    return find_costs("paper", config, "bfloat16")


@cache
def nano() -> ClipCosts:
    return find_costs("nano", settings_of("nano"), "bfloat16")


def test_the_2k_system_fits_cards_of_24_16_and_12_gb():
    for budget, limit in ((None, 24564), (16 * GB, 16303), (12 * GB, 12282)):
        plan = make_plan(paper(), RTX4090, "bfloat16", budget)

        chosen = plan.require_fit()
        assert chosen.peak_device_bytes["peak"] < limit * MB
        assert 100.9 < chosen.seconds["total"] < 600  # the least is work over data sheet rates
        assert "resident needs" in plan.why


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("rtx3060", 12), ("rtx4070", 12), ("rtx4060ti", 16), ("rtx4080", 16), ("rtx5070ti", 16),
        ("rtx5080", 16), ("rtx4090", 24), ("rtx3090", 24), ("rtx5090", 32), ("l40s", 48),
        ("a100", 80), ("h100", 80), ("h200", 141),
    ],
)  # fmt: skip
def test_the_gb_of_a_card_are_all_it_has(name, gigabytes):
    device = DEVICES[name]
    whole, asked = (make_plan(nano(), device, "bfloat16", b) for b in (None, gigabytes * GB))

    assert asked.budget_bytes == pytest.approx(device.memory_bytes, rel=0.07)  # ECC of the L40S
    assert asked.budget_bytes <= whole.budget_bytes == device.memory_bytes
    assert replace(asked, budget_bytes=0, asked_bytes=0) == replace(
        whole, budget_bytes=0, asked_bytes=0
    )


def test_more_than_a_device_has_is_not_planned_with():
    plan = make_plan(nano(), RTX4090, "bfloat16", 40 * GB)

    assert plan.budget_bytes == RTX4090.memory_bytes
    assert (
        "fits into 24.0 GB, all that the GeForce RTX 4090 has of the 40.0 GB asked for" in plan.why
    )
    assert "asked for" not in make_plan(nano(), RTX4090, "bfloat16", 24 * GB).why


def test_the_2k_system_is_resident_on_an_h200():
    plan = make_plan(paper(), DEVICES["h200"], "bfloat16")

    chosen = plan.require_fit()
    assert (chosen.placement, chosen.vae_tile) == ("resident", None)
    assert 21.1 < chosen.seconds["total"] < 111  # floor of the hardware, and the paper's time
    assert plan.flops["total"] == pytest.approx(16.146e15, rel=1e-3)
    assert plan.disk_bytes == pytest.approx(57.2e9, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rtx4090", "h100", "h200"])
def test_carrying_the_photos_detail_takes_less_than_a_tenth_of_the_time(name):
    device = DEVICES[name]
    plain = make_plan(paper(), device, "bfloat16").require_fit()
    placement: Any = plain.placement  # "8-bit" is never chosen
    same = Wish(placement=placement, is_tile_given=True, vae_tile=plain.vae_tile)
    carried = make_plan(paper_carried(), device, "bfloat16", wish=same).require_fit()
    added = {stage: carried.seconds[stage] - plain.seconds[stage] for stage in STAGES}
    assert 0.2 < added.pop("reference") < 0.1 * plain.seconds["total"]
    assert not any(added.values())


@pytest.mark.slow
def test_a_search_that_takes_longer_than_the_model_is_waited_for():
    work = paper_carried().count()
    option, slow = (
        estimate(own, DEVICES["h200"], "bfloat16", "resident").seconds
        for own in (work, replace(work, search_seconds=1000 * SEARCH_THREADS))
    )
    hidden = option["stage2"] + option["decode"]
    own = option["reference"] - work.search_seconds / SEARCH_THREADS / work.num_segments
    assert slow["reference"] == pytest.approx(1000 + own - hidden)


def test_a_public_measurement_is_predicted():
    cost = count_published()
    for name, measured in PUBLISHED.items():
        assert predict(cost, published_rates(name)) == pytest.approx(measured, rel=0.12)


@cache
def small_clip(model: str) -> ClipCosts:
    """24x40 latent cells have few tiles, to plan often."""
    cell = {"nano": 8, "paper": 16}[model]
    config = settings_of(model, height=24 * cell, width=40 * cell, num_frames=21)
    return find_costs(model, config, "bfloat16")


per_model = pytest.mark.parametrize(
    "model", ["nano", pytest.param("paper", marks=pytest.mark.slow)]
)
budgets = st.floats(7, 12).map(lambda power: 10**power)


@pytest.mark.slow
@per_model
@given(budget=budgets)
@few
def test_more_memory_is_never_slower(model, budget):
    small, large = (
        make_plan(small_clip(model), RTX4090, "bfloat16", b) for b in (budget, 1.5 * budget)
    )
    if small.chosen is None:
        assert small.smallest.peak_device_bytes["peak"] > budget
        with pytest.raises(ConfigError, match=r"nothing fits into .* GB or more"):
            small.require_fit()
        return
    assert large.chosen is not None
    assert small.chosen.peak_device_bytes["peak"] <= budget
    assert large.chosen.seconds["total"] <= small.chosen.seconds["total"]
    assert small.chosen.is_available


@pytest.mark.slow
@per_model
@given(
    placement=st.sampled_from(PLACEMENTS),
    tile=st.sampled_from([None, 30]),
    budget=budgets,
)
@few
def test_what_the_user_decided_stays(model, placement, tile, budget):
    wish = Wish(placement=placement, is_tile_given=True, vae_tile=tile)

    plan = make_plan(small_clip(model), RTX4090, "bfloat16", budget, wish)

    (option, *others) = plan.options
    assert (option.placement, option.vae_tile) == (placement, tile)
    assert not any(other.is_available for other in others)
    assert plan.chosen in (None, option)
    assert (plan.chosen is None) == (option.peak_device_bytes["peak"] > plan.budget_bytes)


def test_each_placement_takes_less_memory_and_more_time_than_the_one_before():
    options = [o for o in make_plan(paper(), RTX4090, "bfloat16", 12e9).options if o.is_available]

    assert {option.placement for option in options} == set(PLACEMENTS)
    for tile in {option.vae_tile for option in options}:
        same = [option for option in options if option.vae_tile == tile]
        for one, other in pairwise(same):
            assert one.seconds["total"] <= other.seconds["total"]
            assert one.peak_device_bytes["peak"] > other.peak_device_bytes["peak"]
            assert one.host_bytes <= other.host_bytes


def test_tiles_get_smaller_and_more():
    cells = paper().cells
    sides = propose_tiles(cells)

    def grid(side: int) -> list[int]:
        return [count_tiles(length, side) for length in cells]

    assert sides == sorted(sides, reverse=True)
    numbers = [math.prod(grid(side)) for side in sides]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 2
    for side in sides:  # no smaller tile makes the same division
        assert side == MIN_TILE or grid(side - 1) != grid(side)


def test_a_plan_as_plain_values():
    plan = make_plan(nano(), DEVICES["rtx3090"], "float32").to_dict()

    assert plan["fits"] is True
    assert plan["placement"] == "resident"
    assert set(plan["flops"]) == set(plan["seconds"]) == {*STAGES, "total"}
    assert set(plan["peak_device_bytes"]) == {*STAGES, "peak"}
    for values in (plan["flops"], plan["seconds"]):
        assert values["total"] == pytest.approx(sum(values[stage] for stage in STAGES), rel=1e-6)
    peaks = plan["peak_device_bytes"]
    assert peaks["peak"] == max(peaks[stage] for stage in STAGES)
    assert plan["host_bytes"] > 0
    assert [option["is_available"] for option in plan["options"]] == [True, True, True, False]


def test_a_cpu_holds_everything_in_host_memory():
    cpu = replace(DEVICES["rtx4090"], name="CPU", is_cpu=True)

    plan = make_plan(nano(), cpu, "float32")

    assert [option.placement for option in plan.options] == ["resident"]
    chosen = plan.require_fit()
    assert chosen.host_bytes > chosen.peak_device_bytes["peak"]


@pytest.mark.slow
def test_impossible_wishes_are_refused():
    with pytest.raises(ConfigError, match="-1 GB holds nothing"):
        make_plan(nano(), RTX4090, "float32", -GB)
    with pytest.raises(
        ConfigError, match="device 'rtx9090' is unknown; use one of rtx3060, rtx3090"
    ):
        find_device("rtx9090", "float32")
    with pytest.raises(ConfigError, match="are not known in bfloat16; use float32"):
        make_plan(nano(), measure(torch.device("cpu"), "float32"), "bfloat16")


def test_data_sheets_are_plausible():
    for device in DEVICES.values():
        half, single = device.rates["bfloat16"], device.rates["float32"]
        assert device.rates["float16"] == half
        assert single.linear < half.linear < 1e15
        assert 11 * GB < device.memory_bytes < 150 * GB
        assert half.traffic > 10 * half.transfer


@pytest.mark.slow
def test_this_machine_is_measured():
    cpu = measure(torch.device("cpu"), "float32")

    (rates,) = cpu.rates.values()
    assert list(cpu.rates) == ["float32"]
    assert cpu.is_cpu
    assert rates.transfer == float("inf")
    assert all(rate > 1e6 for rate in (rates.linear, rates.attention, rates.traffic))
    assert 0 < free_bytes(torch.device("cpu")) <= cpu.memory_bytes
    assert set(cpu.rates) <= set(PRECISIONS)
