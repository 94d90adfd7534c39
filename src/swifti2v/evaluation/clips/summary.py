"""Means over clips with their intervals, and paired differences between two sets of clips."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from swifti2v.errors import InputError
from swifti2v.evaluation.clips.offline import METRICS, Scores
from swifti2v.evaluation.intervals import Estimate, bootstrap_mean


def summarize(scores: Sequence[Scores]) -> dict[str, Estimate]:
    """Mean of every metric over clips; clips without a value are left out of that mean."""
    return {
        metric.name: bootstrap_mean([clip.values[metric.name] for clip in scores])
        for metric in METRICS
    }


def paired_differences(
    scores: Mapping[str, Scores], baseline: Mapping[str, Scores]
) -> dict[str, Estimate]:
    """Mean over clips of a set's value minus the baseline's value for the same name.

    Raises:
        InputError: A name is in one set only.
    """
    require_same_names(scores, baseline, "clips", "baseline")
    pairs = [(clip, baseline[name]) for name, clip in scores.items()]
    return {
        metric.name: bootstrap_mean(
            [ours.values[metric.name] - theirs.values[metric.name] for ours, theirs in pairs]
        )
        for metric in METRICS
    }


def require_same_names(
    first: Mapping[str, Any], second: Mapping[str, Any], first_name: str, second_name: str
) -> None:
    """Refuse two sets that are not the same names.

    Raises:
        InputError: The names differ; the message lists the missing ones.
    """
    if first.keys() == second.keys():
        return
    problems = [
        f"{', '.join(sorted(more)[:5])}{' ...' if len(more) > 5 else ''} only in {place}"
        for more, place in (
            (first.keys() - second.keys(), first_name),
            (second.keys() - first.keys(), second_name),
        )
        if more
    ]
    raise InputError(
        f"{first_name} has {len(first)} files, {second_name} has {len(second)}, paired by their "
        f"names without suffix: {'; '.join(problems)}; add or remove these"
    )


def plain_estimates(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """Estimates as plain values for JSON."""
    return {name: plain(asdict(estimate)) for name, estimate in estimates.items()}


def plain(value: Any) -> Any:
    """Replace NaN, which JSON does not have, by None in nested values."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
