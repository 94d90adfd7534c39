"""Training of the whole nano model: codec statistics, text encoder, Stage I, Stage II, assembly."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from swifti2v.config import to_dict
from swifti2v.errors import InputError
from swifti2v.models.loading.components import Components
from swifti2v.models.text import encode_prompt
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.pipelines.stage1 import Stage1Pipeline
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.shapes import latent_frames
from swifti2v.training.data.camera_motion import make_scenes
from swifti2v.training.data.record import describe_files, read_record, require_same_data
from swifti2v.training.engine.ranks import Ranks
from swifti2v.training.engine.run_config import PhaseConfig, RunConfig
from swifti2v.training.engine.run_directory import begin_run_directory, require_run_directory
from swifti2v.training.engine.run_log import StepMetrics
from swifti2v.training.engine.session import Session, train_task
from swifti2v.training.engine.task import Task
from swifti2v.training.nano.assembly import assemble
from swifti2v.training.nano.budget import NanoPart
from swifti2v.training.nano.camera_source import CameraMoveSource
from swifti2v.training.nano.codec import fit_codec
from swifti2v.training.nano.config import NanoConfig, Stage2Phase
from swifti2v.training.nano.material import (
    Material,
    find_material,
    make_procedural_material,
    read_material,
)
from swifti2v.training.nano.material_source import MaterialSource, TransitionClip
from swifti2v.training.nano.models import (
    STAGE1_SCALE,
    STAGE2_SCALE,
    make_stage1_transformer,
    make_stage2_transformer,
)
from swifti2v.training.nano.stage2_start import make_stage2_task, redraw_motions, start_stage2
from swifti2v.training.nano.text_encoder import TextTask, make_tokenizer
from swifti2v.training.stages.encoded_clips import EncodedStage1
from swifti2v.training.stages.stage1 import Stage1Task

OnPartStep = Callable[[NanoPart, StepMetrics], None]
"""Called after each step of a part."""


class NanoTraining:
    """Trains every part and puts them together; what is finished is not done again.

    At the end ``output_dir`` holds ``model/``, which ``SwiftI2VPipeline.from_pretrained`` loads,
    ``config.yaml``, and for each part ``training/PART/`` with its checkpoints and metrics. An error
    raised in ``on_step`` stops, and another call continues.
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
        """Stage I: camera moves over pictures."""
        own = self.config.stage1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(own.run.seed)
            transformer = make_stage1_transformer(own.size, self.config.text.width)
        nn.Module.to(transformer, self.device)
        lengths = {latent_frames(frames): share for frames, share in own.num_frames.items()}
        sizes = [self.config.low_sizes(phase.scale) for phase in own.phases]
        pipeline = Stage1Pipeline(transformer, self.codecs[0])
        sources = tuple(
            EncodedStage1(
                CameraMoveSource(
                    make_scenes(self.material.pictures, max(each, key=max)),
                    each,
                    lengths,
                    own.num_drawn_frames,
                ),
                pipeline,
                self.settings.stage1,
            )
            for each in sizes
        )
        tokenizer = make_tokenizer()

        def encode(prompts: tuple[str, ...]) -> Tensor:
            return encode_prompt(
                text_encoder, tokenizer, prompts, self.config.max_text_length, truncate=True
            )

        task = Stage1Task(pipeline, sources, own.objective, self.settings.stage1, encode)
        self._train("stage1", task, own.run, own.phases)
        return transformer

    def train_stage2(
        self, text_encoder: UMT5EncoderModel, stage1: WanTransformer3DModel
    ) -> SegmentTransformer3DModel:
        """Stage II: its start, then the phases of its curriculum."""
        own = self.config.stage2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(own.run.seed)
            transformer = make_stage2_transformer(
                own.size,
                self.config.text.width,
                reads_noise=self.config.num_inference_steps > 1,
            )
        nn.Module.to(transformer, self.device)
        redrawn: Sequence[TransitionClip] = ()
        if any(phase.mix.transition > 0 for phase in own.phases):
            redrawn = redraw_motions(
                self._pipeline(text_encoder, stage1, transformer),
                self.material.pictures,
                self.material.size,
                self.settings,
                own.redraw,
            )
        task = make_stage2_task(
            transformer,
            self.codecs[1],
            own.objective,
            self.settings.stage2,
            [
                MaterialSource(
                    self.material,
                    redrawn,
                    phase.mix,
                    own.crop,
                    self.config.downscale,
                    lengths,
                    own.objective.windows,
                    self.settings.stage2,
                )
                for phase, lengths in zip(own.phases, self.lengths, strict=True)
            ],
        )
        if not self._is_begun("stage2"):
            start_stage2(task, own.run)
        self._train("stage2", task, own.run, own.phases)
        return transformer

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

    def _is_begun(self, part: NanoPart) -> bool:
        return (self.output_dir / "training" / part / "checkpoints" / "latest").is_file()

    def _train(
        self, part: NanoPart, task: Task[Any], run: RunConfig, phases: Sequence[PhaseConfig]
    ) -> None:
        session = Session(
            directory=self.output_dir / "training" / part,
            ranks=Ranks.alone(self.device),
            resume=True,
            on_step=None if self.on_step is None else partial(self.on_step, part),
        )
        train_task(task, run, phases, session)


def train_nano(
    config: NanoConfig,
    output_dir: Path,
    data_dir: Path | None = None,
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    allows_changed_data: bool = False,
    on_step: OnPartStep | None = None,
) -> Path:
    """Train every part and put them together, see ``NanoTraining``; returns the model's directory.

    Without a folder of clips and photos the material is procedural.

    Raises:
        InputError: The data cannot be used, or ``output_dir`` holds something and ``resume`` is
            not set.
        InputError: ``output_dir`` was begun with other settings.
        NumericalError: A loss is NaN or infinite.
    """
    settings = to_dict(config)
    require_run_directory(output_dir, settings, resume=resume)
    material = prepare_material(config, data_dir)
    begin_run_directory(output_dir, settings)
    found = () if data_dir is None else find_material(data_dir, config.held_out)
    require_same_data(
        output_dir,
        describe_files(found, data_dir or output_dir, read_record(output_dir)),
        is_begun=any(output_dir.glob("training/*/checkpoints/latest")),
        allows_changes=allows_changed_data,
    )
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
