"""The counts that ship are those that counting gives: `python runs/plan_counts.py` writes them anew."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from swifti2v.config import GenerationConfig, merge, parse_config
from swifti2v.models.loading.sources import find_model
from swifti2v.planning.stored import (
    STORED,
    StoredCosts,
    count_live,
    find_costs,
    fingerprint,
)
from swifti2v.planning.work import ClipCounter
from swifti2v.shipped import PACKAGE

PRESETS = sorted(file.stem for file in (PACKAGE / "presets").glob("*.yaml"))
MODELS = ("nano", *PRESETS)


def settings(model: str) -> GenerationConfig:
    return parse_config(GenerationConfig, find_model(model)[0].settings, model)


def stored_ways(model: str) -> list[tuple[int | None, bool]]:
    index, root = find_model(model)
    key = fingerprint(index, root, settings(model), "bfloat16")
    assert key is not None
    works = json.loads(STORED.read_text())[key]["works"]
    return [(work["vae_tile"], work["offloads_history"]) for work in works]


def assert_current(model: str, ways: list[tuple[int | None, bool]]) -> None:
    config = settings(model)
    stored = find_costs(model, config, "bfloat16")
    live = count_live(model, config, "bfloat16")
    assert isinstance(stored, StoredCosts)
    assert isinstance(live, ClipCounter)
    assert (stored.name, stored.cells, stored.linear) == (live.name, live.cells, live.linear)
    for tile, offloads in ways:
        assert stored.count(tile, offloads_history=offloads) == live.count(
            tile, offloads_history=offloads
        )


@pytest.mark.parametrize("model", MODELS)
def test_every_shipped_model_is_stored_and_no_other(model):
    assert len(stored_ways(model)) >= 2
    assert len(json.loads(STORED.read_text())) == len(MODELS)


@pytest.mark.slow
def test_the_stored_costs_of_nano_are_current():
    assert_current("nano", stored_ways("nano"))


@pytest.mark.slow
@pytest.mark.parametrize("model", PRESETS)
def test_the_stored_costs_of_the_presets_are_current(model):
    whole = [way for way in stored_ways(model) if way[0] is None]
    tiles = [way for way in stored_ways(model) if way[0] is not None]
    assert len(whole) == 2
    assert_current(model, [*whole, max(tiles)])


@pytest.mark.slow
def test_without_stage1_as_counted():
    config = settings("nano")
    stored = find_costs("nano", config, "bfloat16", with_stage1=False)
    live = count_live("nano", config, "bfloat16", with_stage1=False)
    assert isinstance(stored, StoredCosts)
    assert stored.count(None) == live.count(None)


@pytest.mark.slow
def test_costs_that_are_not_stored_are_counted():
    stored = find_costs("nano", settings("nano"), "bfloat16")
    assert isinstance(stored, StoredCosts)
    live = count_live("nano", settings("nano"), "bfloat16")
    assert (48, False) not in stored_ways("nano")
    assert stored.count(48) == live.count(48)
    assert isinstance(find_costs("nano", settings("nano"), "float32"), ClipCounter)
    other = replace(settings("nano"), num_frames=17)
    assert isinstance(find_costs("nano", other, "bfloat16"), ClipCounter)


def test_a_copy_of_a_preset_with_weights_costs_the_same(tmp_path: Path) -> None:
    values = yaml.safe_load((PACKAGE / "presets/paper.yaml").read_text())
    values["components"]["stage2_transformer"]["weights"] = "trained/transformer"
    values["settings"]["fps"] = 24
    preset = tmp_path / "own.yaml"
    preset.write_text(yaml.safe_dump(values))
    assert isinstance(find_costs(str(preset), settings("paper"), "bfloat16"), StoredCosts)
    index, root = find_model(preset)
    key = fingerprint(index, root, settings("paper"), "bfloat16")
    values["components"]["stage2_transformer"]["reference"] = "none"
    preset.write_text(yaml.safe_dump(values))
    index, root = find_model(preset)
    assert fingerprint(index, root, settings("paper"), "bfloat16") != key


def test_levels_cost_by_their_number_alone() -> None:
    """A ladder, a rule and a strength that runs as many steps need no new count."""
    index, root = find_model("paper")
    key = fingerprint(index, root, settings("paper"), "bfloat16")
    sampling: dict[str, Any] = {"num_inference_steps": 5, "sigmas": [1, 0.9, 0.8, 0.5, 0.2]}
    for strength, is_same in ((0.9, True), (0.8, False)):
        own = merge(index.settings, {"stage2": {"sampling": {**sampling, "strength": strength}}})
        config = parse_config(GenerationConfig, own, "test")
        assert (fingerprint(index, root, config, "bfloat16") == key) == is_same


def test_sizes_of_a_local_model_count_and_files_that_must_be_read_have_no_fingerprint(
    tmp_path: Path,
) -> None:
    index, root = find_model("nano")
    key = fingerprint(index, root, settings("nano"), "bfloat16")
    for role in index.components:
        folder = index.components[role].subfolder
        (tmp_path / folder).mkdir(parents=True)
        for file in (root / folder).glob("*.json"):
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    assert fingerprint(index, tmp_path, settings("nano"), "bfloat16") == key
    config = tmp_path / "stage2/transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 9}))
    assert fingerprint(index, tmp_path, settings("nano"), "bfloat16") not in (key, None)
    config.unlink()
    assert fingerprint(index, tmp_path, settings("nano"), "bfloat16") is None
