"""Writes docs/results.md from what runs/results.sh measured: python runs/results.py OUTPUT_DIR."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from swifti2v.config import GenerationConfig, merge, parse_config, read_yaml
from swifti2v.evaluation.clips.offline import METRICS
from swifti2v.evaluation.intervals import Estimate
from swifti2v.evaluation.report.page import estimate_cells, number
from swifti2v.planning.models import Models
from swifti2v.planning.work import ClipCounter
from swifti2v.training.ablations.runs import AblationConfig
from swifti2v.training.ablations.table import write_table

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


def bench(folder: Path, config: Path) -> str:
    """The table of ``swifti2v bench quality``, made of the runs that are done."""
    table = parse_config(AblationConfig, read_yaml(config), str(config))
    num_runs = len(table.arms) * len(table.seeds)
    num_done = len(list((folder / "rows").glob("*.json")))
    state = f"{num_done} of {num_runs} runs are done.\n\n" if num_done < num_runs else ""
    return state + write_table(table, folder).read_text(encoding="utf-8").strip()


def end_to_end() -> str:
    """Counted work at 2560x1408: the preset, and its second model alone as it is recommended.

    Wan2.2-TI2V-5B is sampled in 50 steps with guidance: 100 calls on one window of the whole clip.
    """
    models = Models("paper", torch.bfloat16)
    settings = models.index.settings
    ours = ClipCounter(models, parse_config(GenerationConfig, settings, "preset")).count().flops
    changes = {
        "segment_size": None,
        "sampling": {"num_inference_steps": 50, "guidance_scale": 5.0},
    }
    config = parse_config(GenerationConfig, merge(settings, {"stage2": changes}), "end to end")
    other = ClipCounter(models, config).count().flops
    alone = other["text"] + other["stage2"] + other["decode"]
    stages = ", ".join(f"{name} {value / 1e15:.2f}" for name, value in ours.items())
    return (
        f"PFLOP of the `paper` preset: {stages}. The same second model alone, end to end in 50 steps "
        f"with guidance as its authors recommend: {alone / 1e15:.0f}, {alone / ours['total']:.1f} "
        "times as much."
    )


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
        "end to end": end_to_end(),
        "authors": evaluation(output / "authors_report"),
        "nano": evaluation(output / "nano_report"),
        "baselines": bench(
            output / "baselines", ROOT / "src/swifti2v/configs/tables/baselines.yaml"
        ),
    }
    DOCUMENT.write_text(render(NOTES.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
