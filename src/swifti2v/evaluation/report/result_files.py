"""The results of an evaluation as plain values, and as files: JSON, CSV and an HTML report."""

import csv
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from swifti2v.errors import InputError
from swifti2v.evaluation.clips.inputs import describe_inputs
from swifti2v.evaluation.clips.offline import METRICS
from swifti2v.evaluation.clips.summary import plain, plain_estimates
from swifti2v.evaluation.intervals import Estimate
from swifti2v.evaluation.report.page import ClipResult, render_report
from swifti2v.storage import write_whole
from swifti2v.version import __version__

JSON_NAME, CSV_NAME, HTML_NAME = "metrics.json", "metrics.csv", "report.html"
LIBRARIES = ("torch", "opencv-python-headless", "numpy", "av")


def describe_clip(result: ClipResult, *, curves: bool = False) -> dict[str, Any]:
    """Inputs, metrics (None where not measured), reasons, notes and curves of one clip."""
    values = {
        **describe_inputs(result.inputs),
        **result.scores.values,
        "not_measured": result.scores.not_measured,
        "notes": result.inputs.notes,
    }
    if curves:
        values["per_frame"] = result.scores.curves
    described: dict[str, Any] = plain(values)
    return described


def describe_set(
    results: Sequence[ClipResult],
    summary: Mapping[str, Estimate],
    baseline: Sequence[ClipResult] | None,
    differences: Mapping[str, Estimate] | None,
    *,
    curves: bool = False,
) -> dict[str, Any]:
    """Clips, means with 95 % intervals and, with a baseline, paired differences."""
    values: dict[str, Any] = {
        "clips": [describe_clip(result, curves=curves) for result in results],
        "mean": plain_estimates(summary),
    }
    if baseline is not None and differences is not None:
        values["baseline"] = [describe_clip(result, curves=curves) for result in baseline]
        values["difference"] = plain_estimates(differences)
    return {**values, "versions": versions()}


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that decide a number."""
    return {"swifti2v": __version__, **{name: metadata.version(name) for name in LIBRARIES}}


def require_folder(folder: Path) -> None:
    """Refuse a folder that cannot take the files; nothing is made.

    Raises:
        InputError: The folder is refused.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {folder} is a file; give a folder")
    if not folder.exists() and not folder.parent.is_dir():
        raise InputError(f"folder {folder.parent} does not exist; create it first")


def write_files(
    folder: Path,
    results: Sequence[ClipResult],
    described: Mapping[str, Any],
    summary: Mapping[str, Estimate] | None,
    differences: Mapping[str, Estimate] | None,
) -> None:
    """Write ``metrics.json``, ``metrics.csv`` and ``report.html``, replacing older ones."""
    folder.mkdir(exist_ok=True)
    text = json.dumps(described, ensure_ascii=False, indent=1, allow_nan=False)
    write_whole(folder / JSON_NAME, text + "\n")
    with (folder / CSV_NAME).open(
        "w", encoding="utf-8", errors="backslashreplace", newline=""
    ) as file:
        _write_csv(csv.writer(file), results)
    page = render_report(results, summary, differences, versions())
    write_whole(folder / HTML_NAME, page)


def _write_csv(writer: Any, results: Sequence[ClipResult]) -> None:
    """One line a clip; cells without a value are empty."""
    facts = ("name", "video", "num_frames", "width", "height", "fps")
    names = [*facts, *(metric.name for metric in METRICS)]
    writer.writerow(names)
    for result in results:
        values = describe_clip(result)
        writer.writerow(["" if values[name] is None else values[name] for name in names])
