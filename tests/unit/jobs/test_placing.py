"""Placement and VAE tile of a memory budget."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from swifti2v.errors import ConfigError
from swifti2v.jobs.layers import resolve_config
from swifti2v.jobs.placing import Placed, place, plan_run, suggest_plan
from swifti2v.jobs.request import ClipRequest
from swifti2v.jobs.settings import FileRecord, RunSettings, VideoSettings
from swifti2v.planning.plans import Wish
from swifti2v.planning.stored import find_costs
from swifti2v.units import GB

FILE = FileRecord(path="photo.png", sha256="0")
SETTINGS = RunSettings(
    version="1",
    command="generate",
    model="nano",
    prompt="pan left",
    seed=1,
    image=FILE,
    motion=None,
    fit="crop",
    background=None,
    loras=(),
    truncate_prompt=False,
    device="cpu",
    dtype="float32",
    video=VideoSettings(),
    config=resolve_config("nano", [("test", {"num_frames": 5, "height": 64, "width": 64})]),
)
CPU = torch.device("cpu")
few = examples(max_examples=30, deadline=None)
REQUEST = ClipRequest(command="generate", output=Path("out.mp4"))


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """The work of the clip is counted for the first test that needs it."""
    costs = find_costs("nano", SETTINGS.config, "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swifti2v.jobs.placing.find_costs", lambda *_, **__: costs)
        yield


def placed(given: dict[str, Any] | None = None, **asked: Any) -> Placed:
    return place(replace(REQUEST, **asked), SETTINGS, given or {}, CPU)


def test_without_a_budget_nothing_is_chosen():
    assert placed() == Placed(placement="resident", settings=SETTINGS, note=None)
    assert placed(placement="offloaded").placement == "offloaded"


@pytest.mark.slow
def test_a_large_budget_gets_whole_frames_and_resident_weights():
    chosen = placed(memory="500")
    assert (chosen.placement, chosen.settings) == ("resident", SETTINGS)
    assert chosen.note is not None
    assert "500.0 GB" in chosen.note


@pytest.mark.slow
def test_a_small_budget_is_refused_with_what_would_do():
    with pytest.raises(ConfigError, match=r"nothing fits into 10\.2 MB.* give .*B or more"):
        placed(memory="0.01")


def test_what_a_refusal_asks_for_is_enough():
    with pytest.raises(ConfigError) as refused:
        placed(memory="0.01")
    (needed,) = re.findall(r"give ([\d.]+) GB or more", str(refused.value))
    assert placed(memory=needed).note is not None


@given(gigabytes=st.floats(0.001, 400))
@few
def test_a_budget_chooses_placement_and_tile_and_nothing_else(gigabytes):
    plan = plan_run(SETTINGS, CPU, gigabytes * GB, Wish())
    if plan.chosen is None:
        with pytest.raises(ConfigError, match="nothing fits"):
            placed(memory=f"{gigabytes}")
        return
    chosen = placed(memory=f"{gigabytes}")
    option = plan.chosen
    assert option.peak_device_bytes["peak"] <= gigabytes * GB
    assert (chosen.placement, chosen.settings.config.stage2.vae_tile) == (
        option.placement, option.vae_tile,
    )  # fmt: skip
    whole = replace(chosen.settings.config.stage2, vae_tile=None)
    config = replace(chosen.settings.config, stage2=whole)
    assert replace(chosen.settings, config=config) == SETTINGS


@pytest.mark.slow
def test_auto_is_the_memory_that_is_free():
    assert placed(memory="auto").note is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swifti2v.jobs.placing.free_bytes", lambda _: 10**6)
        with pytest.raises(ConfigError, match=r"nothing fits into 1\.0 MB"):
            placed(memory="auto")


@pytest.mark.parametrize("memory", ["much", "0", "-1", "nan", "inf"])
def test_a_budget_that_is_no_number_above_0_is_refused(memory):
    with pytest.raises(ConfigError, match=f"--memory '{memory}' is neither 'auto' nor a number"):
        placed(memory=memory)


def test_a_given_placement_and_tile_are_kept():
    tiled = replace(SETTINGS.config.stage2, vae_tile=16)
    settings = replace(SETTINGS, config=replace(SETTINGS.config, stage2=tiled))
    request = replace(REQUEST, memory="500", placement="streamed")
    chosen = place(request, settings, {"stage2": {"vae_tile": 16}}, CPU)
    assert (chosen.placement, chosen.settings.config.stage2.vae_tile) == ("streamed", 16)
    chosen = place(request, settings, {}, CPU)  # only the model's own tile
    assert chosen.settings.config.stage2.vae_tile is None


@pytest.fixture
def card(monkeypatch):
    """A GPU of 24 GB in a host of 64, to plan for."""
    sizes = {"cuda": 24 * GB, "cpu": 64 * GB}
    monkeypatch.setattr("swifti2v.jobs.placing.memory_bytes", lambda device: sizes[device.type])
    return torch.device("cuda")


def test_what_is_suggested_after_running_out_of_memory_fits_well(card, monkeypatch):
    """The 2K model, whose costs are stored."""
    monkeypatch.setattr("swifti2v.jobs.placing.find_costs", find_costs)
    run = replace(
        SETTINGS,
        model="paper", config=resolve_config("paper", []), device="cuda", dtype="bfloat16",
    )  # fmt: skip
    suggested = suggest_plan(run, "resident")
    found = re.fullmatch(
        r"repeat with --placement (\w+)(?: --set stage2\.vae_tile=(\d+))?, which needs about .*B",
        suggested,
    )
    assert found is not None, suggested
    placement: Any = found[1]
    tile = int(found[2]) if found[2] else None
    wish = Wish(placement=placement, is_tile_given=True, vae_tile=tile)
    option = plan_run(run, card, 24 * GB, wish).require_fit()
    assert option.peak_device_bytes["peak"] <= 0.9 * 24 * GB


def test_where_the_host_is_too_small_smaller_files_are_suggested(card, monkeypatch):
    monkeypatch.setattr("swifti2v.jobs.placing.find_costs", find_costs)
    sizes = {"cuda": 24 * GB, "cpu": 32 * GB}
    monkeypatch.setattr("swifti2v.jobs.placing.memory_bytes", lambda device: sizes[device.type])
    config = resolve_config("paper", [])
    run = replace(SETTINGS, model="paper", config=config, device="cuda", dtype="bfloat16")
    suggested = suggest_plan(run, "streamed")
    assert suggested.startswith("choose a smaller size or smaller files of the model: nothing fits")


def test_where_nothing_needs_less_a_smaller_size_is_suggested(card):
    smallest: Any = plan_run(SETTINGS, card, 24 * GB, Wish()).smallest
    stage2 = replace(SETTINGS.config.stage2, vae_tile=smallest.vae_tile)
    config = replace(SETTINGS.config, stage2=stage2)
    suggested = suggest_plan(replace(SETTINGS, device="cuda", config=config), smallest.placement)
    assert suggested.startswith("choose a smaller size: nothing fits into ")
