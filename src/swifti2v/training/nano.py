"""Training of the whole nano model: codec statistics, text encoder, Stage I, Stage II, assembly."""

import copy
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn
from transformers import UMT5EncoderModel

from swifti2v.config import to_dict
from swifti2v.errors import ConfigError, InputError
from swifti2v.models.codec import BlockCodec
from swifti2v.models.loading import Components, save_components
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.training.data import Material, make_procedural_material, read_material
from swifti2v.training.nano_codec import fit_codec
from swifti2v.training.nano_config import NanoConfig
from swifti2v.training.optimization import OptimizationConfig, StepMetrics
from swifti2v.training.stage1 import train_stage1
from swifti2v.training.stage2 import train_stage2
from swifti2v.training.text_encoder import make_tokenizer, train_text_encoder

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
Part = Literal["text", "phases", "stage1", "stage2"]
"""What is trained one after the other; the phases are Stage I's first part."""
OnPartStep = Callable[[Part, StepMetrics], None]
"""Called after each step of a part."""
MINUTES_SHARE: dict[Part, float] = {"text": 0.05, "phases": 0.1, "stage1": 0.35, "stage2": 0.5}
"""How ``limit_minutes`` divides a budget."""


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
        output_dir: Made if it is not there. In the end it holds ``model/``, which
            ``SwiftI2VPipeline.from_pretrained`` loads, ``config.yaml``, and for each part
            ``training/PART/`` with its checkpoint and metrics (``training/stage1/phases/`` for
            the phases).
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
    _require_output(config, output_dir, resume=resume)
    material = prepare_material(config, data_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_dump(_plain(to_dict(config)), sort_keys=False)
    (output_dir / "config.yaml").write_text(settings, encoding="utf-8")
    place = torch.device(device)

    def step_of(part: Part) -> Callable[[StepMetrics], None] | None:
        return None if on_step is None else partial(on_step, part)

    work = output_dir / "training"
    codec = fit_codec(material.clips)
    text_encoder = train_text_encoder(config.text, work / "text", place, step_of("text"))
    stage1 = train_stage1(
        config,
        material.stills,
        codec,
        text_encoder,
        work / "stage1",
        step_of("phases"),
        step_of("stage1"),
    )
    stage2 = train_stage2(config, material.clips, codec, work / "stage2", place, step_of("stage2"))
    model_dir = output_dir / "model"
    assemble(config, codec, text_encoder, (stage1, stage2), model_dir)
    return model_dir


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
            seed=config.stage1.seed,
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
    codec: BlockCodec,
    text_encoder: UMT5EncoderModel,
    transformers: tuple[WanTransformer3DModel, SegmentTransformer3DModel],
    directory: Path,
) -> None:
    """Write the trained parts as a model directory in bfloat16, replacing an older one.

    Args:
        config: Settings; they give the model's defaults.
        codec: Of both stages, with statistics.
        text_encoder: Not changed.
        transformers: Of Stage I and Stage II; not changed.
        directory: To write; it appears, or is replaced, only once it is whole.
    """
    components = Components(
        text_encoder=round_weights(text_encoder),
        tokenizer=make_tokenizer(),
        stage1_transformer=round_weights(transformers[0]),
        stage1_vae=codec,
        stage2_transformer=round_weights(transformers[1]),
        stage2_vae=codec,
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
    return _with_budgets(
        config,
        lambda part, own: replace(own, minutes=minutes * MINUTES_SHARE[part], steps=None),
    )


def limit_steps(config: NanoConfig, steps: int) -> NanoConfig:
    """Same settings with so many steps for each part."""
    return _with_budgets(config, lambda _, own: replace(own, minutes=None, steps=steps))


def _with_budgets(
    config: NanoConfig, change: Callable[[Part, OptimizationConfig], OptimizationConfig]
) -> NanoConfig:
    text, stage1, stage2 = config.text, config.stage1, config.stage2
    return replace(
        config,
        text=replace(text, optimization=change("text", text.optimization)),
        stage1=replace(
            stage1,
            phases=change("phases", stage1.phases),
            optimization=change("stage1", stage1.optimization),
        ),
        stage2=replace(stage2, optimization=change("stage2", stage2.optimization)),
    )


def _require_output(config: NanoConfig, directory: Path, *, resume: bool) -> None:
    if directory.is_file():
        raise InputError(f"output directory {directory} is a file; choose another name")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not resume:
        raise InputError(
            f"output directory {directory} is not empty; choose another one, or continue it with "
            "--resume"
        )
    settings = directory / "config.yaml"
    if not settings.is_file():
        raise InputError(f"{directory} holds no training of this model; choose another directory")
    before = yaml.safe_load(settings.read_text(encoding="utf-8"))
    now = _plain(to_dict(config))
    different = sorted(key for key in now if before.get(key) != now[key])
    if different:
        raise ConfigError(
            f"{directory} was begun with other settings of {', '.join(different)}; repeat them, or "
            "choose another directory"
        )


def _plain(value: Any) -> Any:
    """Nested values with lists instead of tuples, as YAML gives them back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
