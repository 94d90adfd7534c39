"""From options to a run that is known to fit, before anything is written."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer
from PIL import Image

from swifti2v import __version__
from swifti2v.cli.flags import COMMAND_LINE, naming_flags
from swifti2v.cli.loras import parse_lora
from swifti2v.cli.memory import place_run
from swifti2v.cli.options import ClipOptions
from swifti2v.cli.outputs import find_video_settings, require_writable_outputs
from swifti2v.cli.seeds import RANDOM, draw_seed, require_seed
from swifti2v.cli.sizes import choose_size
from swifti2v.cli.weights import find_missing_weights
from swifti2v.config import GenerationConfig, merge, parse_config, to_dict
from swifti2v.errors import ConfigError, InputError, ShapeError
from swifti2v.jobs.clip_rate import plan_rate
from swifti2v.jobs.devices import cache_dir, choose_device, find_device, find_dtype
from swifti2v.jobs.input_files import InputFiles
from swifti2v.jobs.paths import require_utf8
from swifti2v.jobs.settings import (
    FileRecord,
    LoraRecord,
    RunSettings,
    Stage,
    format_color,
    hash_model,
    parse_color,
    read_settings,
)
from swifti2v.jobs.work_dir import WorkDir
from swifti2v.media import Frames, fit_image, load_image, probe_clip, read_clip
from swifti2v.models.availability import RemoteFiles, download_commands, require_obtainable
from swifti2v.models.loading import STAGES
from swifti2v.models.roles import Placement
from swifti2v.models.sources import LoraSource, find_model
from swifti2v.models.text import PromptCache, doubt_prompt, require_text, tokenize_prompts
from swifti2v.pipelines.outline import outline_pipeline
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.pipelines.upscale import crop_to_aspect, first_frame, second_pass
from swifti2v.sampling import SAMPLING_VERSION
from swifti2v.shapes import TIME_FACTOR, FrameSize, PixelShape, ScaleFactors
from swifti2v.storage import hash_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TIME = ScaleFactors(time=TIME_FACTOR, space=1, patch=1)
"""The frame rule of every Wan VAE, to refuse a clip before a model is loaded."""


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
    placement: Placement
    """Where the weights live."""
    notes: tuple[str, ...]
    """What the user should know, one sentence each."""


def prepare(options: ClipOptions, image_path: Path | None, motion_path: Path | None) -> Run:
    """Check the options, load the model and check what depends on it; cheap checks come first.

    Args:
        options: Of the command line.
        image_path: The photo; None takes the one of ``options.like``, or to upscale the first
            frame of the clip.
        motion_path: The user's own clip, or None for Stage I.

    Raises:
        typer.BadParameter: Options that are missing or contradict each other.
        SwiftI2VError: Anything else that cannot work; nothing was written.
    """
    is_upscale = options.command == "upscale"
    for flag, path in options.weights():
        require_utf8(path, flag)
    files = InputFiles(options.like, options.work_dir if options.resume else None)
    if options.resume and options.config is not None:
        options = replace(options, config=files.settings_file(options.config))
    like = _read_like(options, image_path, motion_path)
    work_dir = WorkDir(options.work_dir, resume=options.resume) if options.work_dir else None
    stored = work_dir.stored_plan if work_dir else {}
    if options.command != "generate":
        motion_path = _find_input(
            motion_path, files, like.motion if like else None, stored.get("motion")
        )
    if is_upscale:
        image_path = motion_path
    else:
        image_path = _find_input(
            image_path, files, like.image if like else None, stored.get("image")
        )
    assert image_path is not None  # _read_like refuses
    with naming_flags():
        require_writable_outputs(options, like, [image_path, motion_path])
    background = options.background
    if background is None and like is not None:
        background = like.background
    color = None if background is None else parse_color(background)
    background = None if color is None else format_color(color)
    photo = None if is_upscale else load_image(image_path, background=color)
    settings = replace(
        _resolve_settings(options, like, image_path, stored, files), background=background
    )
    prompts = [settings.prompt, settings.config.negative_prompt]
    require_text(prompts)
    motion: Frames | None = None
    clip_notes: list[str] = []
    if motion_path is not None:
        motion, settings, clip_notes = _read_motion(motion_path, options, like, settings)
    settings, size_notes = choose_size(options, like, stored, settings, _size_of(photo, motion))
    missing = find_missing_weights(settings.model, with_stage1=motion_path is None)
    if not options.dry_run:
        require_obtainable(settings.model, missing)
    placed = place_run(options, like, settings, stored)
    settings = placed.settings
    if options.dry_run and missing:
        pipe = _outline_pipeline(options, like, settings)
    else:
        pipe = _load_pipeline(options, like, settings, placed.placement)
    if options.preview_decoder is not None:
        pipe.load_preview_decoder(options.preview_decoder)
    _require_fit(pipe, settings, motion)
    if pipe.components.tokenizer is not None:  # of an outline
        tokenize_prompts(
            pipe.components.tokenizer,
            prompts,
            pipe.components.max_text_length,
            truncate=settings.truncate_prompt,
        )
    settings = replace(
        settings,
        device=pipe.components.device.type,
        dtype=str(pipe.components.stage2_transformer.dtype).removeprefix("torch."),
    )
    if work_dir is not None:
        work_dir.require_same(settings.plan())
    image, motion, notes = _fit_inputs(photo, motion, settings)
    notes = [*clip_notes, *size_notes, *notes, *([placed.note] if placed.note else [])]
    notes += pipe.components.describe_loras()
    if motion is None and (doubt := doubt_prompt(pipe.components.text_encoder, settings.prompt)):
        notes.append(doubt)
    if options.dry_run and missing:
        notes.append(_describe_missing(missing))
    if settings.preview_decoder is not None:
        notes.append(f"a preview: decoded with {options.preview_decoder}, not with the model's VAE")
    if like is not None:
        notes += _compare_with(like, options, settings)
    return Run(
        settings=settings,
        pipe=pipe,
        image=image,
        motion=motion,
        work_dir=work_dir,
        placement=placed.placement,
        notes=tuple(notes),
    )


def _read_like(
    options: ClipOptions, image_path: Path | None, motion_path: Path | None
) -> RunSettings | None:
    if options.resume and options.work_dir is None:
        raise typer.BadParameter("--resume needs --work-dir", param_hint="--resume")
    if options.like is None:
        if motion_path is None and options.command != "generate":
            raise typer.BadParameter("give a clip, or --like", param_hint="CLIP")
        if image_path is None and options.command != "upscale":
            raise typer.BadParameter("give a photo, or --like", param_hint="IMAGE")
        if options.prompt is None and options.command != "upscale":
            raise typer.BadParameter("give a prompt, or --like", param_hint="--prompt")
        return None
    like = read_settings(options.like)
    if like.command != options.command:
        raise InputError(
            f"{options.like} was made by 'swifti2v {like.command}'; repeat it with that command"
        )
    return like


def _compare_with(like: RunSettings, options: ClipOptions, settings: RunSettings) -> list[str]:
    """Why the clip will not be that of the video to repeat."""
    notes = []
    if like.preview_decoder is not None and settings.preview_decoder is None:
        notes.append(f"{options.like} is a preview; this clip is decoded with the model's VAE")
    if like.image.sha256 != settings.image.sha256:
        name = "clip" if options.command == "upscale" else "photo"
        notes.append(f"the {name} is not the one of {options.like}: the result will differ")
    if like.sampling_version != settings.sampling_version:
        notes.append(
            f"{options.like} is of a version that drew other noise: the result will differ"
        )
    if like.device != settings.device:
        notes.append(f"{options.like} was made on {like.device}: the clip may differ in detail")
    return notes


def _find_input(
    given: Path | None,
    files: InputFiles,
    recorded: FileRecord | None,
    stored: Mapping[str, str] | None,
) -> Path | None:
    """The photo or the clip: as given, or that of the run to repeat or to continue."""
    if given is not None:
        known = [recorded.sha256] if recorded else []
        return files.named(given, [*known, *([stored["sha256"]] if stored else [])])
    if recorded is None:
        return None
    return files.recorded(recorded.path, recorded.sha256, "give it on the command line")


def _resolve_settings(
    options: ClipOptions,
    like: RunSettings | None,
    image_path: Path,
    stored: Mapping[str, Any],
    files: InputFiles,
) -> RunSettings:
    """All settings but background; device and dtype are known when the model is there."""
    changes: dict[str, Any] = to_dict(like.config) if like else {}
    for source, asked in options.changes():
        with naming_flags() if source == COMMAND_LINE else nullcontext():
            parse_config(GenerationConfig, asked, source)
        changes = merge(changes, asked)
    name = _find_model_name(options.model, like, stored, files)
    index, _ = find_model(name)
    defaults: Mapping[str, Any] = index.settings
    if options.command == "upscale":
        defaults = to_dict(second_pass(parse_config(GenerationConfig, index.settings, name)))
    prompt = options.prompt if options.prompt is not None else (like.prompt if like else "")
    with naming_flags():
        config = parse_config(GenerationConfig, merge(defaults, changes), "settings")
    return RunSettings(
        version=__version__,
        sampling_version=SAMPLING_VERSION,
        command=options.command,
        model=name,
        model_sha256=hash_model(Path(name)),
        prompt=prompt,
        seed=_find_seed(options.seed, like, stored),
        image=FileRecord.of(image_path),
        motion=None,
        fit=options.fit.value if options.fit else (like.fit if like else "crop"),
        background=None,
        loras=_find_loras(options, like, stored, files),
        truncate_prompt=options.truncate_prompt or bool(like and like.truncate_prompt),
        device="",
        dtype="",
        video=find_video_settings(options, like),
        preview_decoder=FileRecord.of(options.preview_decoder) if options.preview_decoder else None,
        config=config,
    )


def _find_seed(asked: int | None, like: RunSettings | None, stored: Mapping[str, Any]) -> int:
    """The seed asked for, of the run to continue or of the video to repeat, else a random one."""
    require_seed(asked)
    if asked is not None and asked != RANDOM:
        return asked
    if "seed" in stored:
        return int(stored["seed"])
    return like.seed if like is not None and asked is None else draw_seed()


def _find_model_name(
    given: str | None, like: RunSettings | None, stored: Mapping[str, Any], files: InputFiles
) -> str:
    """The model: a preset or a directory of the user's may lie beside the video or the work dir."""
    name = given if given is not None else (like.model if like else "nano")
    known = like.model_sha256 if like and given is None else stored.get("model_sha256")
    if known is None or (given is not None and Path(given).exists()):
        return name
    return str(files.recorded(name, known, "give it with --model", hash_model))


def _find_loras(
    options: ClipOptions, like: RunSettings | None, stored: Mapping[str, Any], files: InputFiles
) -> tuple[LoraRecord, ...]:
    if options.lora is None or not options.lora:
        return tuple(
            replace(lora, path=str(files.recorded(lora.path, lora.sha256, "give it with --lora")))
            for lora in (like.loras if like else ())
        )
    known = [lora.sha256 for lora in like.loras] if like else []
    known += [lora["sha256"] for lora in stored.get("loras", ())]
    default: Stage = "stage2" if options.command == "upscale" else "stage1"
    return tuple(
        LoraRecord(
            stage=lora.stage,
            path=str(lora.path),
            strength=lora.strength,
            sha256=hash_file(lora.path),
            allow_partial=lora.allow_partial,
        )
        for lora in (
            parse_lora(text, default, lambda path: files.named(path, known))
            for text in options.lora
        )
    )


def _read_motion(
    path: Path, options: ClipOptions, like: RunSettings | None, settings: RunSettings
) -> tuple[Frames, RunSettings, list[str]]:
    """The user's clip, settings whose length and rate follow from it, and what was done to it."""
    given: dict[str, Any] = to_dict(like.config) if like else {}
    for _, asked in options.changes():
        given = merge(given, asked)
    color = None if settings.background is None else parse_color(settings.background)
    info = probe_clip(path, background=color)
    rate = plan_rate(info, given.get("fps"))
    num_frames = given.get("num_frames", rate.num_frames)
    if rate.num_frames < num_frames:
        raise ShapeError(
            f"clip {path} has {rate.num_frames} frames, fewer than the {num_frames} asked"
        )
    _require_length(path, num_frames, [*info.notes, *rate.notes])
    frames, _ = read_clip(
        path,
        fps=rate.resample_fps,
        max_frames=num_frames,
        min_frames=num_frames,
        background=color,
    )
    config = replace(
        settings.config,
        num_frames=num_frames,
        fps=rate.fps,
    )
    notes = [f"{path}: {note}" for note in (*info.notes, *rate.notes)]
    return frames, replace(settings, motion=FileRecord.of(path), config=config), notes


def _size_of(photo: Image.Image | None, motion: Frames | None) -> FrameSize:
    """Size of what sets the output's aspect: the user's clip, else the photo."""
    if motion is not None:
        return FrameSize(*motion.shape[1:3])
    assert photo is not None
    return FrameSize(photo.height, photo.width)


def _fit_inputs(
    photo: Image.Image | None, motion: Frames | None, settings: RunSettings
) -> tuple[Image.Image, Frames | None, list[str]]:
    """Photo and clip as the run takes them, and what was done to them; to upscale there is no photo."""
    config = settings.config
    if photo is not None:
        fitted = fit_image(photo, config.height, config.width, settings.fit)
        return fitted.image, motion, [fitted.note] if fitted.note else []
    assert motion is not None
    cropped = crop_to_aspect(motion, config.height, config.width)
    notes = []
    if cropped.shape != motion.shape:
        notes.append(
            f"the clip of {motion.shape[2]}x{motion.shape[1]} is cropped to "
            f"{cropped.shape[2]}x{cropped.shape[1]}, the aspect of the output of "
            f"{config.width}x{config.height}"
        )
    return first_frame(cropped, config), cropped, notes


def _require_length(path: Path, num_frames: int, notes: Sequence[str]) -> None:
    if num_frames <= TIME.time:
        raise ShapeError(
            f"clip {path} gives {num_frames} frame(s), at least {TIME.time + 1} are needed; "
            "give a longer clip"
        )
    try:
        PixelShape(num_frames, 1, 1).require_fit(TIME)
    except ShapeError as error:
        first = (num_frames - 1) // TIME.time * TIME.time + 1
        raise ShapeError(
            f"clip {path}: {error}; take its first frames with --num-frames {first}"
            + "".join(f"\n({note})" for note in notes)
        ) from None


def _require_fit(pipe: SwiftI2VPipeline, settings: RunSettings, motion: Frames | None) -> None:
    try:
        with naming_flags():
            pipe.require_fit(settings.config, with_stage1=motion is None)
    except ShapeError as error:
        if motion is not None and settings.command == "refine":
            size = f"{motion.shape[2]}x{motion.shape[1]}"
            error.add_note(f"the motion clip is {size}: crop it so that the output fits")
        raise


def _describe_missing(missing: Sequence[RemoteFiles]) -> str:
    repos = ", ".join(dict.fromkeys(files.repo_id for files in missing))
    return (
        f"weights of {repos} are not on this machine, so sizes and settings were checked, the "
        f"prompt's length and LoRAs were not; get them with: {'; '.join(download_commands(missing))}"
    )


def _find_types(
    options: ClipOptions, like: RunSettings | None
) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and number type as far as they are named."""
    device = find_device(options.device)
    asked = options.dtype.value if options.dtype else (like.dtype if like else None)
    dtype = find_dtype(asked, device)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    return device, DTYPES[dtype] if dtype else None


def _outline_pipeline(
    options: ClipOptions, like: RunSettings | None, settings: RunSettings
) -> SwiftI2VPipeline:
    """The model without its weights, which are not on this machine."""
    device, dtype = _find_types(options, like)
    device = device or choose_device(None)
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    return outline_pipeline(settings.model, settings.config, dtype or usual, device)


def _load_pipeline(
    options: ClipOptions,
    like: RunSettings | None,
    settings: RunSettings,
    placement: Placement,
) -> SwiftI2VPipeline:
    device, dtype = _find_types(options, like)
    loras: dict[str, list[LoraSource]] = {"stage1": [], "stage2": []}
    for lora in settings.loras:
        loras[lora.stage].append(
            LoraSource(path=lora.path, strength=lora.strength, allow_partial=lora.allow_partial)
        )
    typer.echo(f"loading {settings.model}", err=True)
    pipe = SwiftI2VPipeline.from_pretrained(
        settings.model,
        torch_dtype=dtype,
        device=device,
        placement=placement,
        loras=loras,
        stages=STAGES if settings.motion is None else ("stage2",),
        speed={stage: getattr(settings.config, stage).speed for stage in STAGES},
    )
    pipe.encoder.truncate_prompt = settings.truncate_prompt
    pipe.encoder.cache = PromptCache(cache_dir() / "prompts")
    return pipe
