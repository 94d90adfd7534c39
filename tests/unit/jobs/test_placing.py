"""Placement and VAE tile of a memory budget."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swifti2v.errors import ConfigError
from swifti2v.jobs.layers import resolve_config
from swifti2v.jobs.placing import Placed, place, suggest_plan
from swifti2v.jobs.request import ClipRequest
from swifti2v.jobs.settings import FileRecord, RunSettings, VideoSettings
from swifti2v.planning.stored import find_costs

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
REQUEST = ClipRequest(command="generate", output=Path("out.mp4"))


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """The work of the clip is counted for the first test that needs it."""
    costs = find_costs("nano", SETTINGS.config, "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swifti2v.jobs.placing.find_costs", lambda *_, **__: costs)
        yield


def placed(given: dict[str, Any] | None = None, **asked: Any) -> Placed:
    return place(replace(REQUEST, **asked), SETTINGS, given or {}, torch.device("cpu"))


def test_without_a_budget_nothing_is_chosen():
    assert placed() == Placed(placement="resident", settings=SETTINGS, note=None)
    assert placed(placement="offloaded").placement == "offloaded"


def test_a_large_budget_gets_whole_frames_and_resident_weights():
    chosen = placed(memory="500")
    assert (chosen.placement, chosen.settings) == ("resident", SETTINGS)
    assert chosen.note is not None
    assert "500.0 GB" in chosen.note


def test_a_small_budget_is_refused_with_what_would_do():
    with pytest.raises(ConfigError, match=r"nothing fits into 10\.2 MB.* give .*B or more"):
        placed(memory="0.01")


def test_a_given_placement_and_tile_are_kept():
    tiled = replace(SETTINGS.config.stage2, vae_tile=16)
    settings = replace(SETTINGS, config=replace(SETTINGS.config, stage2=tiled))
    request = replace(REQUEST, memory="500", placement="streamed")
    chosen = place(request, settings, {"stage2": {"vae_tile": 16}}, torch.device("cpu"))
    assert (chosen.placement, chosen.settings.config.stage2.vae_tile) == ("streamed", 16)
    chosen = place(request, settings, {}, torch.device("cpu"))  # only the model's own tile
    assert chosen.settings.config.stage2.vae_tile is None


def test_after_running_out_of_memory_less_is_suggested():
    suggested = suggest_plan(SETTINGS, "resident")
    assert suggested.startswith(("repeat with --placement", "choose a smaller size: nothing fits"))
