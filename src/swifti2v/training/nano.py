"""Training of the whole nano model: codec statistics, text encoder, Stage I, Stage II, assembly."""

import copy
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from swifti2v.config import to_dict
from swifti2v.errors import InputError
from swifti2v.media import video_to_frames
from swifti2v.models.codec import BlockCodec
from swifti2v.models.loading import Components, save_components
from swifti2v.models.text import encode_prompt
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.sampling import plan_sigmas
from swifti2v.training.camera_motion import CAMERA_MOTIONS, draw_prompt
from swifti2v.training.data import Material, make_procedural_material, read_material
from swifti2v.training.draws import draws_of_step, split_batch
from swifti2v.training.initialization import fit_output_layer, initialize_stage2
from swifti2v.training.motion_phases import initialize_stage1
from swifti2v.training.moving_pictures import NUM_FRAMES, draw_motion_path, render_path
from swifti2v.training.nano_codec import fit_codec, measure_residual
from swifti2v.training.nano_config import NanoConfig, Stage2Phase
from swifti2v.training.nano_models import (
    STAGE1_SCALE,
    STAGE2_SCALE,
    make_stage1_transformer,
    make_stage2_transformer,
)
from swifti2v.training.phases_task import PhasesTask
from swifti2v.training.ranks import Ranks
from swifti2v.training.run_config import PhaseConfig, RunConfig
from swifti2v.training.run_directory import begin_run_directory, require_run_directory
from swifti2v.training.stage1 import Stage1Task
from swifti2v.training.stage1_sources import CameraMotionSource
from swifti2v.training.stage2 import Stage2Task
from swifti2v.training.stage2_sources import MaterialSource, TransitionClip
from swifti2v.training.stage_transition import TransitionConfig, make_transition_sample
from swifti2v.training.text_encoder import TextTask, make_tokenizer
from swifti2v.training.trainer import StepMetrics, Task, Trainer, compute_in

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
AnyPhase = TypeVar("AnyPhase", bound=PhaseConfig)
Part = Literal["text", "motion_start", "stage1", "stage2"]
"""What is trained one after the other; the motion's start is Stage I's first part."""
OnPartStep = Callable[[Part, StepMetrics], None]
"""Called after each step of a part."""
MINUTES_SHARE: dict[Part, float] = {
    "text": 0.04, "motion_start": 0.06, "stage1": 0.4, "stage2": 0.5,
}  # fmt: skip
"""How ``limit_minutes`` divides a budget."""


class NanoTraining:
    """Trains every part and puts them together; what is finished is not done again.

    Args:
        config: Settings.
        output_dir: In the end it holds ``model/``, which ``SwiftI2VPipeline.from_pretrained``
            loads, ``config.yaml``, and for each part ``training/PART/`` with its checkpoints and
            metrics.
        material: Clips and pictures.
        device: Where to train.
        on_step: Called after each step; raising in it stops, and another call continues.
    """

    def __init__(
        self,
        config: NanoConfig,
        output_dir: Path,
        material: Material,
        device: torch.device,
        on_step: OnPartStep | None = None,
    ) -> None:
        self.config, self.material, self.device = config, material, device
        self.output_dir, self.on_step = output_dir, on_step
        self.settings = config.to_generation_config()
        self.lengths = tuple(self._fitting_lengths(phase) for phase in config.stage2.phases)
        self.codecs = (
            fit_codec(material.clips, STAGE1_SCALE.space, config.downscale),
            fit_codec(material.clips, STAGE2_SCALE.space),
        )

    def run(self) -> Path:
        """Train what is not trained yet.

        Returns:
            The model's directory.
        """
        text_encoder = self.train_text()
        stage1 = self.train_stage1(text_encoder)
        stage2 = self.train_stage2(text_encoder, stage1)
        model_dir = self.output_dir / "model"
        assemble(self.config, self.codecs, text_encoder, (stage1, stage2), model_dir)
        return model_dir

    def train_text(self) -> UMT5EncoderModel:
        """The text encoder, frozen."""
        own = self.config.text
        task = TextTask(own, self.device)
        self._train("text", task, own.run, own.phases)
        encoder = task.model.encoder
        encoder.requires_grad_(False)
        return encoder

    def train_stage1(self, text_encoder: UMT5EncoderModel) -> WanTransformer3DModel:
        """Stage I: the motion's phases first, then a ridge regression, then all weights."""
        own = self.config.stage1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(own.run.seed)
            transformer = make_stage1_transformer(own.size, self.config.text.width)
            layout = initialize_stage1(transformer)
            first = make_stage1_transformer(replace(own.size, num_layers=1), self.config.text.width)
        nn.Module.to(transformer, self.device)
        nn.Module.to(first, self.device)
        task = self._stage1_task(transformer, text_encoder, own.num_drawn_frames)
        if not self._is_begun("stage1"):
            # A transformer of block 0 alone spares the others' work.
            state = transformer.state_dict()
            first.load_state_dict({name: state[name] for name in first.state_dict()})
            start = self._stage1_task(first, text_encoder, {1: 1.0})
            phases = (own.motion_start,)
            run = replace(own.run, ema_decay=None)
            self._train("motion_start", PhasesTask(first, layout, start), run, phases)
            transformer.load_state_dict(first.state_dict(), strict=False)
            self._fit_output_layer(transformer, task, own.run, own.num_fit_batches)
        self._train("stage1", task, own.run, own.phases)
        return transformer

    def train_stage2(
        self, text_encoder: UMT5EncoderModel, stage1: WanTransformer3DModel
    ) -> SegmentTransformer3DModel:
        """Stage II: a ridge regression, then the phases of its curriculum."""
        own = self.config.stage2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(own.run.seed)
            transformer = make_stage2_transformer(own.size, self.config.text.width)
            is_new = not self._is_begun("stage2")
            if is_new:
                sigmas = torch.tensor(plan_sigmas(self.config.num_inference_steps)[:-1])
                residual = measure_residual(self.material.clips, self.config.downscale)
                initialize_stage2(transformer, residual, sigmas)
        nn.Module.to(transformer, self.device)
        redrawn: Sequence[TransitionClip] = ()
        if any(phase.mix.transition > 0 for phase in own.phases):
            redrawn = self._redraw(self._pipeline(text_encoder, stage1, transformer))
        no_text = torch.zeros(1, 1, self.config.text.width, device=self.device)
        task = Stage2Task(
            transformer,
            self.codecs[1],
            tuple(
                MaterialSource(
                    self.material, redrawn, phase.mix, own.crop, self.config.downscale, lengths
                )
                for phase, lengths in zip(own.phases, self.lengths, strict=True)
            ),
            own.objective,
            self.settings.stage2,
            # The prompt does not reach nano's Stage II: its clips have no captions.
            lambda prompts: no_text.expand(len(prompts), -1, -1),
        )
        if is_new:
            self._fit_output_layer(transformer, task, own.run, own.num_fit_batches)
        self._train("stage2", task, own.run, own.phases)
        return transformer

    def _stage1_task(
        self,
        transformer: WanTransformer3DModel,
        text_encoder: UMT5EncoderModel,
        num_drawn_frames: dict[int, float],
    ) -> Stage1Task:
        config, tokenizer = self.config, make_tokenizer()

        def encode(prompts: tuple[str, ...]) -> Tensor:
            return encode_prompt(
                text_encoder, tokenizer, prompts, config.max_text_length, truncate=True
            )

        source = CameraMotionSource(
            self.material.stills, config.low_size, config.num_latent_frames, num_drawn_frames
        )
        objective = config.stage1.objective
        return Stage1Task(
            transformer, self.codecs[0], (source,), objective, self.settings.stage1, encode
        )

    def _pipeline(
        self,
        text_encoder: UMT5EncoderModel,
        stage1: WanTransformer3DModel,
        stage2: SegmentTransformer3DModel,
    ) -> SwiftI2VPipeline:
        components = Components(
            text_encoder=text_encoder,
            tokenizer=make_tokenizer(),
            stage1_transformer=stage1,
            stage1_vae=self.codecs[0],
            stage2_transformer=stage2,
            stage2_vae=self.codecs[1],
            max_text_length=self.config.max_text_length,
            device=self.device,
        )
        pipe = SwiftI2VPipeline(components, self.settings)
        pipe.encoder.truncate_prompt = True  # as in Stage I's training
        return pipe

    def _redraw(self, pipe: SwiftI2VPipeline) -> list[TransitionClip]:
        """Camera motions over pictures, and Stage I's version of their small clips."""
        own, size = self.config.stage2.redraw, self.material.size
        settings = TransitionConfig(
            generation=self.settings, sigma_low=own.sigma[0], sigma_high=own.sigma[1], seed=own.seed
        )
        clips = []
        for index in range(own.num_clips):
            rng = np.random.default_rng((own.seed, index))
            motion = CAMERA_MOTIONS[index % len(CAMERA_MOTIONS)]
            picture = self.material.pictures[int(rng.integers(len(self.material.pictures)))]
            path = draw_motion_path(motion, picture.shape[:2], size, rng)
            # A whole motion over the clip, however long, as Stage I is asked for it.
            times = np.linspace(0, NUM_FRAMES - 1, self.config.num_frames).tolist()
            video = render_path(picture, path, times, size, (0, 0, *size))
            frames = video_to_frames(video[None])
            prompt = draw_prompt(motion, rng)
            with compute_in("bfloat16", self.device):
                low = make_transition_sample(pipe, frames, prompt, f"{index}", settings).frames
            clips.append(TransitionClip(f"{prompt} ({index})", frames, low, prompt))
        return clips

    def _fitting_lengths(self, phase: Stage2Phase) -> dict[int, float]:
        """Lengths that at least one clip has."""
        longest = max(len(clip) for clip in self.material.clips)
        fitting = {n: share for n, share in phase.num_frames.items() if n <= longest}
        if not fitting:
            raise InputError(
                f"stage2 phase {phase.name} has num_frames {sorted(phase.num_frames)}, but the "
                f"longest clip has {longest} frames; add longer clips or shorter lengths"
            )
        return fitting

    def _fit_output_layer(
        self,
        transformer: WanTransformer3DModel,
        task: Stage1Task | Stage2Task,
        run: RunConfig,
        count: int,
    ) -> None:
        parts = split_batch(run.batch_size, 1, 1)
        # Steps that training itself does not reach, so that it sees other samples.
        draws = (draws_of_step(run.seed, 2**40 + k, parts, 0)[0] for k in range(count))
        with compute_in(run.precision, self.device):
            fit_output_layer(transformer, (task.draw_fit_sample(draw) for draw in draws))

    def _is_begun(self, part: Part) -> bool:
        return (self.output_dir / "training" / part / "checkpoints" / "latest").is_file()

    def _train(
        self, part: Part, task: Task[Any], run: RunConfig, phases: Sequence[PhaseConfig]
    ) -> None:
        on_step = None if self.on_step is None else partial(self.on_step, part)
        ranks = Ranks(rank=0, world_size=1, device=self.device, mesh=None)
        trainer = Trainer(task, run, phases, self.output_dir / "training" / part, ranks)
        trainer.run(resume=True, on_step=on_step)
        trainer.take_average()


def train_nano(
    config: NanoConfig,
    output_dir: Path,
    data_dir: Path | None = None,
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    on_step: OnPartStep | None = None,
) -> Path:
    """Train every part and put them together.

    Args:
        config: Settings.
        output_dir: Made if it is not there; see ``NanoTraining``.
        data_dir: Folder of clips and photos; None trains on procedural material.
        device: Where to train.
        resume: Continue what is in ``output_dir``.
        on_step: Called after each step; raising in it stops, and ``resume`` continues.

    Returns:
        The model's directory.

    Raises:
        InputError: The data cannot be used, or ``output_dir`` holds something and ``resume`` is
            not set.
        ConfigError: ``output_dir`` was begun with other settings.
        NumericalError: A loss is NaN or infinite.
    """
    settings = to_dict(config)
    require_run_directory(output_dir, settings, resume=resume)
    material = prepare_material(config, data_dir)
    begin_run_directory(output_dir, settings)
    return NanoTraining(config, output_dir, material, torch.device(device), on_step).run()


def prepare_material(config: NanoConfig, data_dir: Path | None) -> Material:
    """Read the data folder, or make procedural material of the same size.

    Raises:
        InputError: No clip is as long as the model's.
    """
    if data_dir is None:
        if config.held_out:
            raise InputError(
                f"held_out names {', '.join(config.held_out)}, but there is no data folder; give "
                "one or clear held_out"
            )
        return make_procedural_material(
            height=config.height,
            width=config.width,
            num_frames=config.num_frames,
            num_clips=config.num_procedural_clips,
            seed=config.stage1.run.seed,
        )
    material = read_material(
        data_dir,
        height=config.height,
        width=config.width,
        fps=config.fps,
        held_out=config.held_out,
        max_frames=config.max_clip_frames,
    )
    material.require_clips(config.num_frames)
    return material


def assemble(
    config: NanoConfig,
    codecs: tuple[BlockCodec, BlockCodec],
    text_encoder: UMT5EncoderModel,
    transformers: tuple[WanTransformer3DModel, SegmentTransformer3DModel],
    directory: Path,
) -> None:
    """Write the trained parts as a model directory in bfloat16, replacing an older one.

    Args:
        config: Settings; they give the model's defaults.
        codecs: Of Stage I and Stage II, with statistics.
        text_encoder: Not changed.
        transformers: Of Stage I and Stage II; not changed.
        directory: To write; it appears, or is replaced, only once it is whole.
    """
    components = Components(
        text_encoder=round_weights(text_encoder),
        tokenizer=make_tokenizer(),
        stage1_transformer=round_weights(transformers[0]),
        stage1_vae=codecs[0],
        stage2_transformer=round_weights(transformers[1]),
        stage2_vae=codecs[1],
        max_text_length=config.max_text_length,
    )
    unfinished = directory.with_name(f"{directory.name}.writing")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_components(components, to_dict(config.to_generation_config()), unfinished)
    if directory.exists():
        shutil.rmtree(directory)
    unfinished.rename(directory)
    logger.info("model written to %s", directory)


def round_weights(model: Model) -> Model:
    """Copy of a model on the CPU in bfloat16, but for the parts its class keeps in float32."""
    rounded = copy.deepcopy(model).cpu()
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in rounded.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(torch.bfloat16)
    return rounded


def limit_minutes(config: NanoConfig, minutes: float) -> NanoConfig:
    """Same settings with so many minutes in all, divided by ``MINUTES_SHARE``."""

    def limit(part: Part, phases: Sequence[AnyPhase]) -> tuple[AnyPhase, ...]:
        own = minutes * MINUTES_SHARE[part] / len(phases)
        return tuple(replace(phase, minutes=own, steps=None) for phase in phases)

    return _with_budgets(config, limit)


def limit_steps(config: NanoConfig, steps: int) -> NanoConfig:
    """Same settings with so many steps for each part's phases."""

    def limit(_: Part, phases: Sequence[AnyPhase]) -> tuple[AnyPhase, ...]:
        return tuple(replace(phase, minutes=None, steps=steps) for phase in phases)

    return _with_budgets(config, limit)


def _with_budgets(
    config: NanoConfig, limit: Callable[[Part, Sequence[Any]], tuple[Any, ...]]
) -> NanoConfig:
    text, stage1, stage2 = config.text, config.stage1, config.stage2
    return replace(
        config,
        text=replace(text, phases=limit("text", text.phases)),
        stage1=replace(
            stage1,
            motion_start=limit("motion_start", (stage1.motion_start,))[0],
            phases=limit("stage1", stage1.phases),
        ),
        stage2=replace(stage2, phases=limit("stage2", stage2.phases)),
    )
