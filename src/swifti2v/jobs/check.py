"""Checks that need the model: whether a resolved request fits it, and its inputs at their sizes."""

from dataclasses import dataclass, replace

from PIL import Image

from swifti2v.errors import ShapeError
from swifti2v.jobs.request import ClipRequest
from swifti2v.jobs.resolve import Resolved
from swifti2v.jobs.settings import RunSettings
from swifti2v.jobs.work_dir import WorkDir
from swifti2v.media import Frames, fit_image
from swifti2v.media.sound import Sound
from swifti2v.models.runtime.roles import Placement
from swifti2v.models.text import doubt_prompt, tokenize_prompts
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.pipelines.upscale import crop_to_aspect, first_frame


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A clip that is known to fit; see ``swifti2v.jobs.run.run``."""

    request: ClipRequest
    """Request, which names the output files."""
    settings: RunSettings
    """All that decides the clip."""
    pipe: SwiftI2VPipeline
    """The model."""
    image: Image.Image
    """Photo fitted to the output size."""
    motion: Frames | None
    """The user's own motion reference."""
    sound: Sound | None
    """Sound that the video keeps."""
    work_dir: WorkDir | None
    """Directory that keeps finished segments."""
    placement: Placement
    """Placement of the weights."""
    notes: tuple[str, ...]
    """Notes for the user, one sentence each."""


def check(resolved: Resolved, pipe: SwiftI2VPipeline) -> Job:
    """Check all that depends on the model; nothing is written.

    The pipeline may be that of an earlier request with the same model and number type.

    Raises:
        ShapeError: Sizes that do not fit.
        PromptError: The prompt is longer than the text encoder takes.
        InputError: The work dir holds another run.
    """
    parts = pipe.components
    settings = replace(
        resolved.settings,
        device=parts.device.type,
        dtype=str(parts.stage2_transformer.dtype).removeprefix("torch."),
    )
    _require_fit(pipe, settings, resolved.motion)
    pipe.encoder.truncate_prompt = settings.truncate_prompt
    if parts.tokenizer is not None:  # of an outline
        tokenize_prompts(
            parts.tokenizer,
            [*settings.prompts, settings.config.negative_prompt],
            parts.max_text_length,
            truncate=settings.truncate_prompt,
        )
    if resolved.work_dir is not None:
        resolved.work_dir.require_same(settings.plan())
    image, motion, notes = _fit_inputs(resolved.photo, resolved.motion, settings)
    notes += parts.describe_loras()
    if motion is None:
        doubts = (doubt_prompt(parts.text_encoder, prompt) for prompt in settings.prompts)
        notes += dict.fromkeys(doubt for doubt in doubts if doubt)
    return Job(
        request=resolved.request,
        settings=settings,
        pipe=pipe,
        image=image,
        motion=motion,
        sound=resolved.sound,
        work_dir=resolved.work_dir,
        placement=resolved.placement,
        notes=(*resolved.notes, *notes),
    )


def _require_fit(pipe: SwiftI2VPipeline, settings: RunSettings, motion: Frames | None) -> None:
    try:
        pipe.require_fit(settings.config, with_stage1=motion is None)
    except ShapeError as error:
        if motion is not None and settings.command == "refine":
            size = f"{motion.shape[2]}x{motion.shape[1]}"
            error.add_note(f"the motion clip is {size}: crop it so that the output fits")
        raise


def _fit_inputs(
    photo: Image.Image | None, motion: Frames | None, settings: RunSettings
) -> tuple[Image.Image, Frames | None, list[str]]:
    """Fit photo and clip for the run, with notes on the changes; ``upscale`` has no photo."""
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
