"""Writes docs/results.md from what runs/results.sh measured: python runs/results.py OUTPUT_DIR."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swifti2v.evaluation.intervals import Estimate
from swifti2v.evaluation.offline import METRICS
from swifti2v.evaluation.report import estimate_cells, number

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "results.md"
NOTES = Path(__file__).with_name("results_notes.md")
"""The text around the tables, with a line ``<!-- name -->`` for each."""


def evaluation(folder: Path) -> str:
    """Clips side by side, and their mean, of an evaluation's ``metrics.json``."""
    if not (folder / "metrics.json").is_file():
        return "_Not measured yet._"
    measured = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    clips = measured["clips"]
    lines = [
        f"| metric | {' | '.join(clip['name'] for clip in clips)} | mean | 95 % interval |",
        "| --- |" + " --- |" * (len(clips) + 2),
    ]
    for metric in METRICS:
        mean = Estimate(**measured["mean"][metric.name])
        if mean.num_items:
            cells = [number(_or_nan(clip[metric.name]), metric.digits) for clip in clips]
            cells += estimate_cells(mean, metric)
            lines.append(f"| `{metric.name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def bench(folder: Path) -> str:
    """The table of ``swifti2v bench quality``, and how many of its runs are done."""
    if not (folder / "table.md").is_file():
        return "_Not measured yet._"
    return (folder / "table.md").read_text(encoding="utf-8").strip()


def machine() -> str:
    """Commit and processor."""
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    info = Path("/proc/cpuinfo")
    names = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    name = next((n.partition(":")[2].strip() for n in names if n.startswith("model name")), "")
    return f"commit {commit}, {os.cpu_count()} CPU cores, {name or platform.processor()}, no GPU"


def render(notes: str, tables: Mapping[str, str]) -> str:
    """The notes with every mark replaced by its table."""
    for name, table in tables.items():
        mark = f"<!-- {name} -->"
        if notes.count(mark) != 1:
            raise SystemExit(f"{NOTES.name} has {notes.count(mark)} lines {mark}; give it one")
        notes = notes.replace(mark, table)
    return notes


def _or_nan(value: Any) -> float:
    return float("nan") if value is None else float(value)


def main() -> None:
    """Write the document."""
    (output,) = map(Path, sys.argv[1:])
    tables = {
        "machine": machine(),
        "authors": evaluation(output / "authors_report"),
        "nano": evaluation(output / "nano_report"),
        "baselines": bench(output / "baselines"),
        "ablations": bench(output / "stage2_ablations"),
    }
    DOCUMENT.write_text(render(NOTES.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
