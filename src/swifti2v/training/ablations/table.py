"""A whole table of ablations: material, redrawn clips, every run, and the table of what is done."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from swifti2v.config import to_dict
from swifti2v.media import Frames
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.training.ablations.clips import TestClip, cut_test_clips, cut_test_motions
from swifti2v.training.ablations.comparison import render_comparison
from swifti2v.training.ablations.costs import CostMeter, render_costs
from swifti2v.training.ablations.runs import AblationConfig, Ablations
from swifti2v.training.data.record import describe_files, read_record, require_same_data
from swifti2v.training.engine.run_directory import begin_run_directory, require_run_directory
from swifti2v.training.nano.config import RedrawConfig
from swifti2v.training.nano.material import Material, find_material, read_material
from swifti2v.training.nano.material_source import TransitionClip
from swifti2v.training.nano.stage2_start import redraw_motions

MAX_CLIP_FRAMES = 81
"""Read of each clip."""


def make_ablation_table(
    config: AblationConfig,
    output_dir: Path,
    data_dir: Path,
    shard: tuple[int, int] = (1, 1),
    on_run: Callable[[str, int], None] | None = None,
) -> Path:
    """Train and measure every run of a table that is not done yet; returns the table's path.

    ``output_dir`` gets ``rows/`` with a file for each run, and ``table.md`` of what is done, by all
    shards. Several processes may work in it at the same time, each on its own shard, ``(i, n)``
    counted from 1.

    Raises:
        InputError: The data cannot be used, or has changed since the table was begun.
        InputError: ``output_dir`` was begun with other settings.
    """
    require_run_directory(output_dir, to_dict(config), resume=True)
    begin_run_directory(output_dir, to_dict(config))
    require_same_data(
        output_dir,
        describe_files(find_material(data_dir), data_dir, read_record(output_dir)),
        is_begun=(output_dir / "redrawn_test.npz").is_file(),
        remedy="restore it, or choose another --output-dir: runs on other data are not comparable",
    )
    pipe = SwiftI2VPipeline.from_pretrained(config.model, device="cpu")
    material, held_out = read_split(data_dir, config.held_out, pipe)
    redrawn: list[TransitionClip] = []
    if any((arm.mix or config.mix).transition > 0 for arm in config.arms):
        redrawn = _redraw(output_dir / "redrawn.npz", pipe, material, config.redraw)
    test_motions = replace(config.redraw, num_clips=config.num_test_motions)
    redrawn_test = _redraw(output_dir / "redrawn_test.npz", pipe, held_out, test_motions)
    factor, num_frames = pipe.config.stage1.downscale, pipe.config.num_frames
    tests: list[TestClip] = [
        *cut_test_clips(held_out, num_frames, config.crop, config.num_test_crops, factor),
        *cut_test_motions(redrawn_test, config.crop, factor),
    ]
    ablations = Ablations(config, output_dir, material, redrawn, tests, pipe)
    index, num_shards = shard
    costs = output_dir / "costs.json"
    if index == 1 and not costs.is_file():
        transformer = ablations.make_transformer(config.seeds[0])
        meter = CostMeter(config, pipe, transformer, held_out.clips[0][:num_frames])
        _write(costs, json.dumps([asdict(cost) for cost in meter.measure()], indent=1))
    for arm, seed in ablations.runs()[index - 1 :: num_shards]:
        ablations.run(arm, seed)
        if on_run is not None:
            on_run(arm.name, seed)
    return write_table(config, output_dir)


def read_split(
    data_dir: Path, held_out: Sequence[str], pipe: SwiftI2VPipeline
) -> tuple[Material, Material]:
    """Material to train on and material to test on, of the model's own size and rate."""
    names = {path.stem for path in find_material(data_dir)}
    settings = pipe.config

    def read(left_out: Sequence[str]) -> Material:
        return read_material(
            data_dir,
            height=settings.height,
            width=settings.width,
            fps=settings.fps,
            held_out=left_out,
            max_frames=MAX_CLIP_FRAMES,
        )

    return read(held_out), read(sorted(names - set(held_out)))


def write_table(config: AblationConfig, output_dir: Path) -> Path:
    """Render the rows of all finished runs, in the order of the arms, and what they cost.

    Until the first arm has a run there is nothing to compare with: then costs alone.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted((output_dir / "rows").glob("*.json")):
        rows += json.loads(path.read_text(encoding="utf-8"))
    order = [name for arm in config.arms for name in (arm.name, *arm.also_sampled)]
    rows.sort(key=lambda row: order.index(row["arm"]))
    has_base = any(row["arm"] == order[0] for row in rows)
    parts = [render_comparison(rows)] if has_base else []
    costs = output_dir / "costs.json"
    if costs.is_file():
        whole = (arm.name for arm in config.arms if config.arm_stage2(arm).segment_size is None)
        base = next(whole, order[0])
        parts.append(render_costs(json.loads(costs.read_text(encoding="utf-8")), base))
    table = output_dir / "table.md"
    _write(table, "\n".join(parts))
    return table


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.writing-{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _redraw(
    path: Path, pipe: SwiftI2VPipeline, material: Material, config: RedrawConfig
) -> list[TransitionClip]:
    """Redrawn motions over a material's pictures; kept in a file for the next start."""
    if not path.is_file():
        size = material.size
        clips = redraw_motions(pipe, material.pictures, size, pipe.config, config)
        arrays: dict[str, Frames] = {}
        for index, clip in enumerate(clips):
            arrays |= {f"frames{index}": clip.frames, f"low{index}": clip.low}
        unfinished = path.with_name(f"{os.getpid()}-{path.name}")
        texts = np.array([[clip.name, clip.prompt] for clip in clips])
        np.savez(unfinished, texts=texts, **arrays)  # type: ignore[arg-type]
        unfinished.replace(path)
    with np.load(path) as kept:
        return [
            TransitionClip(str(name), kept[f"frames{index}"], kept[f"low{index}"], str(prompt))
            for index, (name, prompt) in enumerate(kept["texts"])
        ]
