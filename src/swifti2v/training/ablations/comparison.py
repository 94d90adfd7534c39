"""Markdown tables of runs that are compared pair by pair: same seed, same clip, another setting."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from swifti2v.evaluation.intervals import Estimate, bootstrap_grid

Rows = Sequence[Mapping[str, Any]]
"""Each with ``arm``, ``seed``, ``group``, ``clip`` and a number for each metric."""
METRICS: Mapping[str, tuple[str, str]] = {
    "psnr_db": ("PSNR, dB", "+.2f"),
    "coherence": ("coherence", "+.3f"),
    "hf_ratio": ("HF energy", "+.2f"),
    "agreement_db": ("agreement with the small clip, dB", "+.2f"),
    "seam": ("seam", "+.3f"),
}
"""Title and format of each metric."""


def compare(rows: Rows, group: str, metric: str, base: str, arm: str) -> Estimate | None:
    """Mean difference of a metric between an arm and the base, over the pairs that both have.

    It has a 95 % interval, and is None without pairs. Where ``base`` is ``arm`` it is the base's
    own mean.
    """
    other = _grid(rows, group, metric, arm)
    if base != arm:
        own = _grid(rows, group, metric, base)
        other = {key: value - own[key] for key, value in other.items() if key in own}
    seeds, clips = sorted({seed for seed, _ in other}), sorted({clip for _, clip in other})
    # Clips that some run could not measure leave the comparison for all.
    whole = [clip for clip in clips if all((seed, clip) in other for seed in seeds)]
    if not whole:
        return None
    values: npt.NDArray[np.float64] = np.array(
        [[other[seed, clip] for clip in whole] for seed in seeds]
    )
    return bootstrap_grid(values)


def render_comparison(
    rows: Rows,
    groups: Sequence[str] | None = None,
    metrics: Mapping[str, tuple[str, str]] = METRICS,
) -> str:
    """A table for each kind of clip: the first arm's values, and the others' differences from it.

    The first row's arm is the first. All kinds of clips come if none are named; metrics are the
    columns, a title and a format by name.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    parts = []
    for group in groups or dict.fromkeys(row["group"] for row in rows):
        titles = [title for title, _ in metrics.values()]
        lines = [
            f"**{group}**",
            "",
            f"| arm | seeds | {' | '.join(titles)} |",
            "| --- | --- |" + " --- |" * len(metrics),
        ]
        for arm in arms:
            seeds = {row["seed"] for row in rows if row["arm"] == arm and row["group"] == group}
            cells = [
                _cell(compare(rows, group, metric, arms[0], arm), form, is_base=arm == arms[0])
                for metric, (_, form) in metrics.items()
            ]
            lines.append(f"| {arm} | {len(seeds)} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _grid(rows: Rows, group: str, metric: str, arm: str) -> dict[tuple[int, str], float]:
    return {
        (row["seed"], row["clip"]): float(row[metric])
        for row in rows
        if row["arm"] == arm
        and row["group"] == group
        and row[metric] is not None
        and math.isfinite(row[metric])
    }


def _cell(estimate: Estimate | None, form: str, *, is_base: bool) -> str:
    if estimate is None:
        return "-"
    if is_base:
        return f"{estimate.value:{form.removeprefix('+')}}"
    value = f"{estimate.value:{form}}"
    if estimate.low is None or estimate.high is None:
        return f"{value} (no interval)"
    is_clear = estimate.low > 0 or estimate.high < 0
    text = f"{value} ({estimate.low:{form}} to {estimate.high:{form}})"
    return f"**{text}**" if is_clear else text
