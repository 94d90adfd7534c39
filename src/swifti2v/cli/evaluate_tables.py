"""Text that ``swifti2v evaluate`` prints: the measured clips, then the table."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from swifti2v.evaluation.clips.inputs import ClipInputs
from swifti2v.evaluation.clips.offline import METRICS
from swifti2v.evaluation.intervals import Estimate
from swifti2v.evaluation.report.page import ClipResult, estimate_cells, number

NAMED = 5
"""Files that a line names; the others are counted."""


def describe_measured(
    results: Sequence[ClipResult], baselines: Sequence[ClipResult] = ()
) -> list[str]:
    """Describe the clips, their comparisons and the metrics, line by line."""
    inputs = [result.inputs for result in results]
    videos = [one.video for one in inputs]
    frames = _join({f"{v.num_frames} frames of {v.size} at {v.fps:g} fps" for v in videos})
    compared = {
        "photo": [one.photo.path for one in inputs if one.photo],
        "reference": [one.reference.path for one in inputs if one.reference],
        "motion reference": [one.motion_reference.path for one in inputs if one.motion_reference],
        "baseline": [result.inputs.video.path for result in baselines],
    }
    others = [f"{role} {_name(paths)}" for role, paths in compared.items() if paths]
    measured = [
        m.name for m in METRICS if any(m.name not in r.scores.not_measured for r in results)
    ]
    return [
        f"measured: {_name([video.path for video in videos])} ({frames})",
        f"compared with: {'; '.join(others) or 'nothing'}",
        f"segments: {_join(_segments(one) for one in inputs)}",
        f"metrics: {len(measured)} of {len(METRICS)}: {', '.join(measured)}",
        "",
    ]


def _name(paths: Sequence[Path]) -> str:
    listed = ", ".join(str(path) for path in paths[:NAMED])
    return listed if len(paths) <= NAMED else f"{listed} and {len(paths) - NAMED} more"


def _join(texts: Iterable[str]) -> str:
    distinct = sorted(set(texts))
    more = f" and {len(distinct) - NAMED} other kinds" if len(distinct) > NAMED else ""
    return "; ".join(distinct[:NAMED]) + more


def _segments(inputs: ClipInputs) -> str:
    if inputs.segment_starts is None:
        return f"unknown ({inputs.segments_source})"
    return f"{len(inputs.segment_starts)} ({inputs.segments_source})"


def tabulate_clip(result: ClipResult) -> list[str]:
    """A line for each metric of a clip: its value and what it is, or why it was not measured."""
    lines = []
    for metric in METRICS:
        value = number(result.scores.values[metric.name], metric.digits)
        reason = result.scores.not_measured.get(metric.name)
        about = f"not measured: {reason}" if reason else metric.title
        lines.append(f"{metric.name:21} {value:>10}  {about}")
    return lines


def tabulate_means(
    summary: Mapping[str, Estimate], differences: Mapping[str, Estimate] | None
) -> list[str]:
    """A table of means over clips, and of differences to the baseline where there is one."""
    header = ["metric", "mean", "95 % interval", "clips"]
    header += ["minus baseline", "95 % interval"] if differences else []
    lines = [header]
    for metric in METRICS:
        estimate = summary[metric.name]
        cells = [metric.name, *estimate_cells(estimate, metric), str(estimate.num_items)]
        if differences:
            cells += estimate_cells(differences[metric.name], metric, signed=True)
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
