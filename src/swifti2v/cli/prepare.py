"""From options to a run that is known to fit, before anything is written."""

import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer
from PIL import Image

from swifti2v import __version__
from swifti2v.cli.options import ClipOptions
from swifti2v.cli.settings import (
    FileRecord,
    LoraRecord,
    RunSettings,
    Stage,
    VideoSettings,
    hash_file,
    parse_color,
    read_settings,
)
from swifti2v.cli.work_dir import WorkDir, read_plan
from swifti2v.config import GenerationConfig, merge, parse_config, to_dict
from swifti2v.errors import ConfigError, InputError, ShapeError
from swifti2v.media import fit_image, load_image, probe_clip, read_clip, require_writable
from swifti2v.models.loading import find_model
from swifti2v.models.lora import merge_lora, parse_lora_argument
from swifti2v.models.text import tokenize_prompts
from swifti2v.pipelines.two_stage import Frames, SwiftI2VPipeline

NAMED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything a run needs, checked."""

    settings: RunSettings
    pipe: SwiftI2VPipeline
    image: Image.Image
    """Fitted to the output size."""
    motion: Frames | None
    """The user's own motion reference."""
    work_dir: WorkDir | None
    notes: tuple[str, ...]
    """What the user should know, one sentence each."""


def prepare(options: ClipOptions, image_path: Path | None, motion_path: Path | None) -> Run:
    """Check the options from cheap to dear, load the model and check what depends on it.

    Args:
        options: Of the command line.
        image_path: The photo; None takes the one of ``options.like``.
        motion_path: The user's own low-resolution clip, or None for Stage I.

    Raises:
        typer.BadParameter: Options that contradict each other.
        SwiftI2VError: Anything else that cannot work; nothing was written.
    """
    like = _read_like(options, image_path)
    notes: list[str] = []
    if image_path is None:
        assert like is not None
        image_path = Path(like.image.path)
        _require_same_file(image_path, like.image, "photo")
    _require_writable_outputs(options, [image_path, *([motion_path] if motion_path else [])])
    changes = _merge_changes(options, like)
    background = options.background or (like.background if like else None)
    photo = load_image(
        image_path, background=None if background is None else parse_color(background)
    )
    loras = _find_loras(options, like)
    device = _find_device(options.device)
    name = options.model or (like.model if like else "nano")
    config = _resolve(name, changes)
    motion = None
    if motion_path is not None:
        motion, config = _read_motion(motion_path, options, config, changes)
    image_record = FileRecord(path=str(image_path), sha256=hash_file(image_path))
    if like and like.image.sha256 != image_record.sha256:
        notes.append(f"the photo is not the one of {options.like}, so the clip will differ")
    dtype = options.dtype.value if options.dtype else (like.dtype if like else None)
    pipe = SwiftI2VPipeline.from_pretrained(
        name, torch_dtype=NAMED_DTYPES.get(dtype or ""), device=device
    )
    pipe.encoder.truncate_prompt = options.truncate_prompt or bool(like and like.truncate_prompt)
    pipe.require_fit(config, with_stage1=motion is None)
    settings = RunSettings(
        version=__version__,
        command="generate" if motion_path is None else "refine",
        model=name,
        prompt=_prompt(options, like),
        seed=_find_seed(options, like),
        image=image_record,
        motion=None
        if motion_path is None
        else FileRecord(path=str(motion_path), sha256=hash_file(motion_path)),
        fit=_fit(options, like),
        background=background,
        loras=loras,
        truncate_prompt=pipe.encoder.truncate_prompt,
        device=pipe.components.device.type,
        dtype=str(pipe.components.stage2_transformer.dtype).removeprefix("torch."),
        video=_video_settings(options, like),
        config=config,
    )
