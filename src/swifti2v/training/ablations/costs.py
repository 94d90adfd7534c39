"""Costs of the rows of a table: counted work, and processor seconds of this machine."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from swifti2v.config import GenerationConfig, merge, parse_config
from swifti2v.media import Frames, downscale
from swifti2v.models.loading.architectures import Architecture
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.pipelines.progress import Stopwatch
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.planning.models import Models
from swifti2v.planning.work import ClipCounter
from swifti2v.training.ablations.clips import TestClip
from swifti2v.training.ablations.runs import AblationConfig, Arm, make_without_model
from swifti2v.units import GB

NATIVE_MODEL = "paper"
"""Preset for whose clip every row is counted as well: 81 frames of 2560x1408."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCost:
    """Cost of one clip, Stage I included."""

    arm: str
    """Row of the table."""
    seconds: Mapping[str, float]
    """Processor seconds of one thread by stage, for the table's model and size."""
    first_frames_seconds: float
    """Seconds until the first segment is finished."""
    flops: float
    """Counted for the same; two a multiply-add."""
    native_flops: float
    """FLOP of the same way of making a clip, with the models and at the size of the paper."""
    native_peak_bytes: float
    """Most bytes that Stage II's transformer holds at that size beside its weights."""


class CostMeter:
    """Measures rows on one clip of the model's own size. Weights do not matter to it."""

    def __init__(
        self,
        config: AblationConfig,
        pipe: SwiftI2VPipeline,
        transformer: SegmentTransformer3DModel,
        truth: Frames,
    ) -> None:
        self.config = config
        components = replace(pipe.components, stage2_transformer=transformer)
        self.pipe = SwiftI2VPipeline(components, pipe.config)
        low = downscale(truth, pipe.config.stage1.downscale)
        self.clip = TestClip(group="", name="", truth=truth, low=low)
        self.image = Image.fromarray(truth[0])
        self.models = Models(config.model, torch.float32)
        kind = self.models.architectures["stage2_transformer"].kind
        own = Architecture(kind, dict(transformer.config))
        self.models.architectures["stage2_transformer"] = own
        self.native = Models(NATIVE_MODEL, torch.bfloat16)

    def measure(self) -> list[RowCost]:
        """All rows, in the order of the table."""
        self._time(replace(self.pipe.config, num_frames=5))  # what is made once belongs to no row
        stage1 = self._time_stage1()
        return [
            self._measure_row(arm, name, changes, stage1)
            for arm in self.config.arms
            for name, changes in {arm.name: {}, **arm.also_sampled}.items()
        ]

    def _measure_row(
        self, arm: Arm, name: str, changes: Mapping[str, Any], stage1: Mapping[str, float]
    ) -> RowCost:
        stage2 = self.config.arm_stage2(arm, changes)
        own = replace(self.pipe.config, stage2=stage2)
        preset = self.native.index.settings
        values = merge(preset, {"stage2": merge(arm.stage2, changes)})
        native = parse_config(GenerationConfig, values, f"arm {name}")
        if arm.made_by == "stage2":
            seconds, first = self._time(own)
        else:
            started = time.process_time()
            make_without_model(arm.made_by, self.clip)
            first = time.process_time() - started
            seconds = {"stage2": first}  # in its place
        is_trained = arm.made_by == "stage2"
        own_flops, _ = count_row(self.models, own, has_stage2=is_trained)
        native_flops, peak = count_row(self.native, native, has_stage2=is_trained)
        return RowCost(
            arm=name,
            seconds={**stage1, **seconds},
            first_frames_seconds=sum(stage1.values()) + first,
            flops=own_flops,
            native_flops=native_flops,
            native_peak_bytes=peak,
        )

    def _time_stage1(self) -> dict[str, float]:
        stopwatch = Stopwatch(time.process_time)
        config = self.pipe.config
        conditions = self.pipe.encode(self.image, "", config, stopwatch)
        self.pipe.generate_motion_reference(self.image, conditions, 0, config, stopwatch=stopwatch)
        return {"stage1": sum(stopwatch.seconds.values())}

    def _time(self, settings: GenerationConfig) -> tuple[dict[str, float], float]:
        """Seconds of all that follows Stage I, and of them those until the first segment."""
        stopwatch, first = Stopwatch(time.process_time), 0.0
        low = self.clip.low[: settings.num_frames]
        segments = self.pipe.refine(low, self.image, "", config=settings, stopwatch=stopwatch)
        for segment in segments:
            if segment.index == 0:
                first = stopwatch.total()
        return {name: value for name, value in stopwatch.seconds.items() if name != "text"}, first


def count_row(models: Models, config: GenerationConfig, *, has_stage2: bool) -> tuple[float, float]:
    """FLOP of a clip, and the most bytes that Stage II's transformer holds beside its weights.

    Attention counts as full, and no row keeps anything of a context. Without Stage II, Stage I's
    work is all there is.
    """
    work = ClipCounter(models, config).count()
    if not has_stage2:
        return sum(work.flops[stage] for stage in ("text", "image", "stage1")), 0.0
    return work.flops["total"], work.stages["stage2"].count.peak_bytes


def render_costs(costs: Sequence[Mapping[str, Any]], base: str) -> str:
    """A table of ``RowCost`` as plain values; the last column compares with the row ``base``."""
    native = {cost["arm"]: cost["native_flops"] for cost in costs}
    lines = [
        "**Cost of a clip**",
        "",
        "| arm | Stage I, s | reference, s | Stage II, s | decoding, s | first frames, s | TFLOP | "
        f"2K: PFLOP | 2K: Stage II holds, GB | 2K: part of the work of *{base}* |",
        "| --- |" + " --- |" * 9,
    ]
    for cost in costs:
        seconds = cost["seconds"]
        stages = [
            f"{seconds[name]:.1f}" if name in seconds else "-"
            for name in ("stage1", "reference", "stage2", "decode")
        ]
        peak = cost["native_peak_bytes"]
        cells = [
            *stages,
            f"{cost['first_frames_seconds']:.1f}",
            f"{cost['flops'] / 1e12:.2f}",
            f"{cost['native_flops'] / 1e15:.2f}",
            f"{peak / GB:.1f}" if peak else "-",
            f"{cost['native_flops'] / native[base]:.2f}",
        ]
        lines.append(f"| {cost['arm']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
