"""Counts the shipped models again: python runs/plan_counts.py, some minutes on one core.

Writes src/swifti2v/planning/counts.json: what plans of the presets at their own size need, down to
the smallest card that holds them.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

from swifti2v.config import GenerationConfig, parse_config
from swifti2v.errors import ConfigError
from swifti2v.models.loading.sources import ModelIndex, find_model
from swifti2v.planning.costs import ClipCosts, ClipWork
from swifti2v.planning.devices import DEVICES
from swifti2v.planning.plans import make_plan
from swifti2v.planning.stored import STORED, count_live, fingerprint
from swifti2v.planning.variants import in_variant
from swifti2v.shipped import PACKAGE

MODELS = ("nano", *sorted(file.stem for file in (PACKAGE / "presets").glob("*.yaml")))
SMALLEST = 8e9
"""Bytes of device memory."""


def main() -> None:
    """Write the file."""
    with ProcessPoolExecutor() as pool:
        entries = ",\n".join(pool.map(count_model, MODELS))
    STORED.write_text("{\n" + entries + "\n}\n", encoding="utf-8")


def count_model(name: str) -> str:
    """A model's entry in the file."""
    index, root = find_model(name)
    config = parse_config(GenerationConfig, index.settings, name)
    key = fingerprint(index, root, config, "bfloat16")
    if key is None:
        raise ConfigError(f"the costs of {name} depend on files that are not there")
    costs = count_live(name, config, "bfloat16")
    works = [asdict(work) for work in _works(costs, index)]
    value = {"model": name, "cells": list(costs.cells), "works": works}
    return f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}"


def _works(costs: ClipCosts, index: ModelIndex) -> list[ClipWork]:
    """Counts that plans need from the largest card down to the smallest, from the files of each variant."""
    sizes = {device.memory_bytes for device in DEVICES.values()} | {SMALLEST}
    asked = {
        (option.vae_tile, option.placement == "offloaded")
        for variant in index.variants()
        for size in sorted(sizes, reverse=True)
        for option in make_plan(
            in_variant(costs, index, variant), DEVICES["h200"], "bfloat16", size
        ).options
    }
    return [
        costs.count(tile, offloads_history=offloads) for tile, offloads in sorted(asked, key=str)
    ]


if __name__ == "__main__":
    main()
