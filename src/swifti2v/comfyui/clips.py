"""Clips of the nodes: ComfyUI's images in, sizes and settings, a video file and images out."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from swifti2v.config import (
    GenerationConfig,
    StageName,
    expand_shorthands,
    merge,
    parse_config,
    to_dict,
)
from swifti2v.errors import MediaError
from swifti2v.media import Frames, fit_image, open_writer
from swifti2v.media.images import Fit
from swifti2v.models.loading.sources import LoraSource
from swifti2v.models.runtime.roles import Placement
from swifti2v.pipelines.decoding import SegmentOutput
from swifti2v.pipelines.progress import OnProgress, Stopwatch
from swifti2v.pipelines.transition import MotionReference
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.shapes import FrameSize

logger = logging.getLogger(__name__)


def load(
    model: str,
    device: torch.device,
    dtype: str,
    placement: Placement,
    loras: Sequence[LoraSource],
) -> SwiftI2VPipeline:
    """Load a model; the dtype ``auto`` is the device's own, see ``from_pretrained``."""
    return SwiftI2VPipeline.from_pretrained(
        model,
        torch_dtype=None if dtype == "auto" else getattr(torch, dtype),
        device=device,
        placement=placement,
        loras=loras,
    )


def configure(config: GenerationConfig, changes: Mapping[str, Any]) -> GenerationConfig:
    """Put changes on top of settings, see ``SwiftI2VPipeline.configure``.

    Raises:
        ConfigError: An unknown name or a value out of range.
    """
    nested = merge(to_dict(config), expand_shorthands(changes))
    return parse_config(GenerationConfig, nested, "settings")


def prepare(
    pipe: SwiftI2VPipeline,
    image: Tensor,
    fit: Fit,
    height: int,
    width: int,
    changes: Mapping[str, Any],
) -> tuple[Image.Image, GenerationConfig]:
    """Fit a photo to the output size.

    Args:
        pipe: The model.
        image: IMAGE of one picture.
        fit: Way to fit a photo of another aspect.
        height: Height of the output; 0 follows, see ``SwiftI2VPipeline.size_for``.
        width: Width of the output, in the same way.
        changes: Changes of the model's settings.

    Returns:
        The photo and all settings.
    """
    photo = to_photo(image)
    size = pipe.size_for(photo, height=height or None, width=width or None)
    config = replace(configure(pipe.config, changes), height=size.height, width=size.width)
    return fit_photo(photo, config, fit), config


def follow_clip(
    pipe: SwiftI2VPipeline, config: GenerationConfig, clip: Frames, height: int, width: int
) -> GenerationConfig:
    """Settings with the length of a clip, and its size where no side is given.

    Args:
        pipe: The model.
        config: Settings.
        clip: ``[T, h, w, 3]``.
        height: Height of the output. With 0 it follows from the width and the clip's aspect;
            with both 0, the clip grows by the model's Stage I factor.
        width: Width of the output, in the same way.
    """
    num_frames, low_height, low_width, _ = clip.shape
    factor = config.stage1.downscale
    size = FrameSize(low_height * factor, low_width * factor)
    if height or width:
        frame = Image.fromarray(clip[0])
        size = pipe.size_for(frame, height=height or None, width=width or None)
    return replace(config, num_frames=num_frames, height=size.height, width=size.width)


def count_steps(
    pipe: SwiftI2VPipeline,
    config: GenerationConfig,
    stages: Sequence[StageName],
) -> int:
    """Number of times that the run of some stages reports progress."""
    rounds = {"stage1": 1, "stage2": len(pipe.plan(config))}
    return sum(rounds[stage] * getattr(config, stage).sampling.num_calls for stage in stages)


def to_frames(images: Tensor) -> Frames:
    """Turn an IMAGE batch into frames.

    Args:
        images: ``[T, H, W, 3 or 4]`` floats in [0, 1]; a fourth channel is left out.

    Returns:
        ``[T, H, W, 3]`` uint8.
    """
    frames = np.empty((*images.shape[:3], 3), np.uint8)
    for index, image in enumerate(images):  # one at a time: hardly any memory beside the batch
        levels = (image[..., :3].float() * 255).round().clamp(0, 255)
        frames[index] = levels.to("cpu", torch.uint8).numpy()
    return frames


def to_images(frames: Frames) -> Tensor:
    """Turn frames ``[T, H, W, 3]`` uint8 into an IMAGE batch of float32 in [0, 1]."""
    return torch.from_numpy(frames).float().div_(255)


def to_photo(image: Tensor) -> Image.Image:
    """Turn an IMAGE of one picture into an RGB photo.

    Raises:
        MediaError: The batch holds several.
    """
    if len(image) != 1:
        raise MediaError(
            f"image is a batch of {len(image)}; pick one, such as with the node ImageFromBatch"
        )
    return Image.fromarray(to_frames(image)[0])


def fit_photo(photo: Image.Image, config: GenerationConfig, fit: Fit) -> Image.Image:
    """Fit the photo to the output size, and log what was cut or added."""
    fitted = fit_image(photo, config.height, config.width, fit)
    if fitted.note:
        logger.info(fitted.note)
    return fitted.image


def to_motion_reference(motion: MotionReference | Tensor) -> MotionReference:
    """Take Stage I's own output, or an IMAGE batch of any origin."""
    return MotionReference(to_frames(motion)) if isinstance(motion, Tensor) else motion


def make_motion(
    pipe: SwiftI2VPipeline,
    photo: Image.Image,
    prompt: str,
    seed: int,
    config: GenerationConfig,
    on_progress: OnProgress,
) -> MotionReference:
    """Run Stage I alone; sizes are checked for both stages.

    Raises:
        ShapeError: A size or a frame count that one of them cannot hold.
    """
    pipe.require_fit(config)
    conditions = pipe.encode(photo, prompt, config, Stopwatch())
    return pipe.generate_motion_reference(photo, conditions, seed, config, on_progress)


def refine(
    pipe: SwiftI2VPipeline,
    motion: MotionReference,
    photo: Image.Image,
    prompt: str,
    seed: int,
    config: GenerationConfig,
    on_progress: OnProgress,
) -> Iterator[SegmentOutput]:
    """Run Stage II over a clip, along the displacement that Stage I told with it.

    Raises:
        ShapeError: A size or a frame count that does not fit.
    """
    pipe.require_fit(config, with_stage1=False)
    conditions = pipe.encode(photo, prompt, config, Stopwatch())
    return pipe.synthesize(motion, photo, conditions, seed, config, on_progress=on_progress)


def write(
    segments: Iterable[SegmentOutput],
    config: GenerationConfig,
    path: Path,
    show: Callable[[Frames], None],
    *,
    wants_images: bool,
) -> Tensor | None:
    """Write a video as it is made; a run that stops leaves no file.

    Args:
        segments: The clip.
        config: Size, length and rate.
        path: ``.mp4`` file to make.
        show: Called with the last frame ``[H, W, 3]`` of each segment.
        wants_images: Whether to hold all frames; else memory does not grow with the clip.

    Returns:
        All frames as an IMAGE batch, if wanted.
    """
    shape = (config.num_frames, config.height, config.width, 3)
    images = torch.empty(shape) if wants_images else None
    writer = open_writer(path, height=config.height, width=config.width, fps=config.fps)
    num_frames = 0
    try:
        with writer:
            for segment in segments:
                writer.write(segment.frames)
                stop = num_frames + len(segment.frames)
                if images is not None:
                    images[num_frames:stop].copy_(torch.from_numpy(segment.frames)).div_(255)
                num_frames = stop
                show(segment.frames[-1])
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return images
