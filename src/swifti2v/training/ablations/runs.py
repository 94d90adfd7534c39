"""Ablations of Stage II: the same short training with one thing changed, over several seeds.

Every run sees as many latent frames, so that a longer window costs a run steps. All runs of a seed
share their draws and their start; what they make of held-out clips is compared pair by pair.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from swifti2v.config import GenerationConfig, Stage2Config, merge, parse_config, settings, to_dict
from swifti2v.errors import ConfigError
from swifti2v.evaluation.baselines import (
    carried_baseline,
    flow_warp_baseline,
    lanczos_baseline,
)
from swifti2v.evaluation.metrics.detail_coherence import detail_coherence, hf_energy_ratio
from swifti2v.evaluation.metrics.fidelity import clip_psnr
from swifti2v.evaluation.metrics.seam import seam_score
from swifti2v.media import Frames, downscale
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.block_codec import TIME_FACTOR, BlockCodec
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.shapes import latent_frames
from swifti2v.storage import write_whole
from swifti2v.training.ablations.clips import TestClip
from swifti2v.training.engine.optimizers import OptimizerConfig
from swifti2v.training.engine.ranks import Ranks
from swifti2v.training.engine.run_config import PhaseConfig, RunConfig
from swifti2v.training.engine.session import Session, train_task
from swifti2v.training.nano.config import RedrawConfig
from swifti2v.training.nano.material import Material
from swifti2v.training.nano.material_source import MaterialSource, MixConfig, TransitionClip
from swifti2v.training.nano.models import NanoSize, make_stage2_transformer
from swifti2v.training.nano.stage2_start import make_stage2_task, start_stage2
from swifti2v.training.stages.stage2 import Stage2Objective
from swifti2v.training.windows import WindowConfig


@settings
class Arm:
    """One way to train and to sample."""

    name: str
    """Row of the table."""
    made_by: Literal["stage2", "lanczos", "flow_warp", "carried"] = "stage2"
    """Maker of the row's clips. ``stage2`` is a trained Stage II. The others need no model and
    ignore the settings below: the small clip enlarged, the photo moved along the small clip's
    motion, or the photo's detail carried along that motion."""
    objective: dict[str, Any] = field(default_factory=dict)
    """Changes of the objective."""
    stage2: dict[str, Any] = field(default_factory=dict)
    """Changes of Stage II's settings, in training and in sampling."""
    mix: MixConfig | None = None
    """Other samples."""
    also_sampled: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further ways to sample with the same weights: changes of Stage II's settings by row."""

    def __post_init__(self) -> None:
        changes = (self.objective, self.stage2, self.mix, self.also_sampled)
        if self.made_by != "stage2" and any(changes):
            raise ConfigError(
                f"arm {self.name} is made by {self.made_by} and is not trained; leave its settings "
                "out"
            )


@settings
class AblationConfig:
    """A table of ablations. The first arm is the one that the others are compared with."""

    arms: tuple[Arm, ...]
    """Rows."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and draws; every arm has a run for each."""
    latent_frames: int = 7800
    """Latent frames in all windows of a run, given ones included: its cost."""
    size: NanoSize = field(default_factory=NanoSize)
    crop: int = 128
    """Side of a crop in pixels, in training and in the test, a multiple of 16."""
    objective: Stage2Objective = field(default_factory=Stage2Objective)
    stage2: Stage2Config = field(default_factory=Stage2Config)
    mix: MixConfig = field(default_factory=MixConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(batch_size=6, ema_decay=0.99))
    """Settings of each run; the seed is replaced."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    model: str = "nano"
    """Gives codecs, lengths and sizes, and the Stage I that redraws clips."""
    redraw: RedrawConfig = field(default_factory=RedrawConfig)
    """Stage-transition samples to train on."""
    num_test_motions: int = 7
    """Clips of a camera that moves over held-out pictures."""
    num_test_crops: int = 2
    """Crops of each held-out clip."""
    held_out: tuple[str, ...] = ()
    """File names without suffix that are tested on and not trained on."""

    def __post_init__(self) -> None:
        names = [name for arm in self.arms for name in (arm.name, *arm.also_sampled)]
        if not self.arms or len(set(names)) < len(names) or not self.seeds:
            raise ConfigError(f"rows are {names}, seeds {self.seeds}; name each row once")
        for arm in self.arms:
            self.arm_objective(arm)
            for changes in ({}, *arm.also_sampled.values()):
                self.arm_stage2(arm, changes)

    def arm_objective(self, arm: Arm) -> Stage2Objective:
        """The objective with an arm's changes."""
        values = merge(to_dict(self.objective), arm.objective)
        return parse_config(Stage2Objective, values, f"arm {arm.name}")

    def arm_stage2(self, arm: Arm, changes: Mapping[str, Any] | None = None) -> Stage2Config:
        """Settings of Stage II with an arm's changes, and further ones on top."""
        values = merge(merge(to_dict(self.stage2), arm.stage2), changes or {})
        return parse_config(Stage2Config, values, f"arm {arm.name}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationRow:
    """Measurements of one run on one clip."""

    arm: str
    """Row of the table."""
    seed: int
    """Seed of the run."""
    group: str
    """Kind of clip."""
    clip: str
    """Name of the clip."""
    psnr_db: float
    """PSNR of frames 1 to T-1 against the truth."""
    coherence: float
    """Detail coherence with the truth."""
    hf_ratio: float
    """Energy of fine detail relative to the truth."""
    agreement_db: float
    """PSNR of the downscaled output against the low-resolution clip it was made from."""
    seam: float | None
    """Seam score; none where there is one segment."""


def mean_window_length(config: WindowConfig, num_latent_frames: int, stage2: Stage2Config) -> float:
    """Latent frames of a window that training draws, on average."""
    plans = [
        replace(stage2, segment_size=size, context_size=context).plan(num_latent_frames)
        for size, context in product(config.segment_sizes, config.context_sizes)
    ]
    return fmean(fmean(len(segment.window) for segment in plan) for plan in plans)


class Ablations:
    """Trains the runs of a table and measures them; what is finished is not done again.

    ``output_dir`` gets ``rows/`` with a file for each run, and ``runs/`` while they train.
    """

    def __init__(
        self,
        config: AblationConfig,
        output_dir: Path,
        material: Material,
        transition: Sequence[TransitionClip],
        tests: Sequence[TestClip],
        pipe: SwiftI2VPipeline,
    ) -> None:
        self.config, self.output_dir = config, output_dir
        self.material, self.transition, self.tests = material, transition, tests
        self.components = pipe.components
        num_frames = len(tests[0].truth)
        side = config.crop
        self.settings = replace(pipe.config, num_frames=num_frames, height=side, width=side)

    def runs(self) -> list[tuple[Arm, int]]:
        """All runs, one seed of every arm after the other."""
        return [(arm, seed) for seed in self.config.seeds for arm in self.config.arms]

    def run(self, arm: Arm, seed: int) -> Path:
        """Train and measure one run, unless that is done.

        Returns:
            File of its rows, JSON.
        """
        path = self.output_dir / "rows" / f"{_slug(arm.name)}-{seed}.json"
        if path.is_file():
            return path
        directory = self.output_dir / "runs" / f"{_slug(arm.name)}-{seed}"
        if arm.made_by == "stage2":
            rows = self._measure(arm, seed, self._train(arm, seed, directory))
        else:
            outputs = (make_without_model(arm.made_by, clip) for clip in self.tests)
            rows = [
                compare_with_truth(output, self.settings, clip, arm.name, seed)
                for output, clip in zip(outputs, self.tests, strict=True)
            ]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps([asdict(row) for row in rows], indent=1))
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        return path

    def make_transformer(self, seed: int) -> SegmentTransformer3DModel:
        """A new Stage II of the table's size."""
        text_dim = int(self.components.stage2_transformer.config["text_dim"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make_stage2_transformer(self.config.size, text_dim)

    def _train(self, arm: Arm, seed: int, directory: Path) -> SegmentTransformer3DModel:
        config, settings = self.config, self.settings
        objective, mix = config.arm_objective(arm), arm.mix or config.mix
        stage2 = config.arm_stage2(arm)
        run = replace(config.run, seed=seed)
        transformer = self.make_transformer(seed)
        length = mean_window_length(objective.windows, latent_frames(settings.num_frames), stage2)
        steps = math.ceil(config.latent_frames / (run.batch_size * length))
        source = MaterialSource(
            self.material,
            self.transition if mix.transition > 0 else (),
            mix,
            config.crop,
            settings.stage1.downscale,
            {settings.num_frames: 1.0},
            objective.windows,
            stage2,
        )
        codec = self.components.stage2_vae
        assert isinstance(codec, BlockCodec)
        task = make_stage2_task(transformer, codec, objective, stage2, [source])
        checkpoints = directory / "checkpoints"
        if not (checkpoints / "latest").is_file():
            start_stage2(task, run)
        phase = PhaseConfig(name=arm.name, steps=steps, optimizer=config.optimizer)
        ranks = Ranks.alone(torch.device("cpu"))
        train_task(task, run, (phase,), Session(directory=directory, ranks=ranks, resume=True))
        return transformer

    def _measure(
        self, arm: Arm, seed: int, transformer: SegmentTransformer3DModel
    ) -> list[AblationRow]:
        components = replace(self.components, stage2_transformer=transformer)
        rows = []
        for name, changes in {arm.name: {}, **arm.also_sampled}.items():
            settings = replace(self.settings, stage2=self.config.arm_stage2(arm, changes))
            pipe = SwiftI2VPipeline(components, settings)
            for clip in self.tests:
                image = Image.fromarray(clip.truth[0])
                segments = pipe.refine(clip.low, image, "", generator=seed, config=settings)
                output = np.concatenate([segment.frames for segment in segments])
                rows.append(compare_with_truth(output, settings, clip, name, seed))
        return rows


def make_without_model(
    method: Literal["lanczos", "flow_warp", "carried"], clip: TestClip
) -> Frames:
    """A clip from its low-resolution version, and from its photo where the method takes one."""
    if method == "lanczos":
        return lanczos_baseline(clip.low, *clip.truth.shape[1:3])
    make = flow_warp_baseline if method == "flow_warp" else carried_baseline
    return make(clip.low, clip.truth[0])


def compare_with_truth(
    output: Frames, settings: GenerationConfig, clip: TestClip, arm: str, seed: int
) -> AblationRow:
    """Measure ``[T, H, W, 3]`` uint8 that were made of a clip's low-resolution version and photo."""
    plan = settings.stage2.plan(latent_frames(settings.num_frames))
    starts = [segment.target[0] for segment in plan]
    truth, low = clip.truth[1:], clip.low[1:]
    return AblationRow(
        arm=arm,
        seed=seed,
        group=clip.group,
        clip=clip.name,
        psnr_db=clip_psnr(output[1:], truth),
        coherence=detail_coherence(output, clip.truth),
        hf_ratio=float(hf_energy_ratio(output[1:], truth).nanmean()),
        agreement_db=clip_psnr(downscale(output[1:], settings.stage1.downscale), low),
        seam=seam_score(output, starts, TIME_FACTOR) if len(starts) > 1 else None,
    )


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)
