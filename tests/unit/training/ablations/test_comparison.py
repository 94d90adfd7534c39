"""Paired comparisons: differences over equal seeds and clips, with intervals."""

from typing import Any

import numpy as np
import pytest

from swifti2v.evaluation.intervals import bootstrap_grid, bootstrap_mean
from swifti2v.training.ablations.comparison import METRICS, compare, render_comparison

rng = np.random.default_rng(0)


def row(arm: str, seed: int, clip: str, psnr_db: float, **others: Any) -> dict[str, Any]:
    rest = dict.fromkeys(METRICS, 0.5) | {"psnr_db": psnr_db}
    return {"arm": arm, "seed": seed, "group": "clips", "clip": clip, **rest, **others}


def two_arms(gain: float, noise: float = 0.0) -> list[dict[str, Any]]:
    """Clips differ by many decibels, arms by ``gain``."""
    local = np.random.default_rng(1)
    rows = []
    for seed in range(3):
        for clip in range(6):
            level = 20 + 5 * clip + seed
            rows.append(row("base", seed, f"c{clip}", level))
            rows.append(row("other", seed, f"c{clip}", level + gain + noise * local.normal()))
    return sorted(rows, key=lambda entry: entry["arm"])


def test_pairs_cancel_what_they_share() -> None:
    estimate = compare(two_arms(0.25), "clips", "psnr_db", "base", "other")
    assert estimate is not None
    assert estimate.value == pytest.approx(0.25)
    assert estimate.low == pytest.approx(0.25)
    assert estimate.high == pytest.approx(0.25)
    assert estimate.num_items == 18


def test_a_noisy_nothing_has_an_interval_around_zero() -> None:
    estimate = compare(two_arms(0.0, noise=1.0), "clips", "psnr_db", "base", "other")
    assert estimate is not None
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < 0 < estimate.high


def test_the_base_shows_its_values_and_the_others_their_differences() -> None:
    lines = render_comparison(two_arms(1.0)).splitlines()
    assert lines[0] == "**clips**"
    assert "| base | 3 | 33.50 |" in lines[4]
    assert "| other | 3 | **+1.00 (+1.00 to +1.00)** | +0.000" in lines[5]


def test_what_could_not_be_measured_leaves_the_comparison() -> None:
    rows = two_arms(1.0)
    rows[0]["psnr_db"] = float("nan")
    for entry in rows:
        entry["seam"] = None
    estimate = compare(rows, "clips", "psnr_db", "base", "other")
    assert estimate is not None
    assert estimate.num_items == 15  # one clip is gone for all three seeds
    assert compare(rows, "clips", "seam", "base", "other") is None
    assert render_comparison(rows).splitlines()[5].endswith("| - |")


def test_too_few_seeds_have_no_interval() -> None:
    rows = [entry for entry in two_arms(1.0) if entry["seed"] < 2]
    assert "+1.00 (no interval)" in render_comparison(rows)


def test_the_grid_bootstrap_counts_runs_as_runs() -> None:
    """A difference between runs alone does not become surer by more clips."""
    runs = rng.normal(size=(4, 1))
    grid = np.repeat(runs, 100, axis=1)
    estimate, naive = bootstrap_grid(grid), bootstrap_mean(grid.ravel().tolist())
    assert estimate.value == pytest.approx(naive.value)
    assert None not in (estimate.low, estimate.high, naive.low, naive.high)
    width = estimate.high - estimate.low  # type: ignore[operator]
    assert width > 5 * (naive.high - naive.low)  # type: ignore[operator]
