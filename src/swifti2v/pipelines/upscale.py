"""A clip made larger by Stage II alone: the second pass of ViBe, without a photo."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from PIL import Image

from swifti2v.config import GenerationConfig
from swifti2v.errors import ShapeError
from swifti2v.media import Frames, frames_to_video, resize_video, video_to_frames
from swifti2v.pipelines.decoding import SegmentOutput
from swifti2v.pipelines.progress import OnProgress, Stopwatch
from swifti2v.pipelines.store import SegmentStore
from swifti2v.pipelines.two_stage import SwiftI2VPipeline

STRENGTH = 0.7
"""Strength of ViBe's second pass; with shift 5 it starts at noise level 0.921."""


def upscale(
    pipe: SwiftI2VPipeline,
    clip: Frames,
    prompt: str = "",
    *,
    config: GenerationConfig | None = None,
    generator: torch.Generator | int = 0,
    on_progress: OnProgress | None = None,
    stopwatch: Stopwatch | None = None,
    store: SegmentStore | None = None,
) -> Iterator[SegmentOutput]:
    """Resize a clip, add noise to its latents and denoise them with Stage II.

    With a LoRA for high resolution in Stage II and ``stage2.attention.kind`` ``gclf`` this is the
    second pass of ViBe; ``stage2.segment_size`` None runs it over the whole clip at once, else it
    streams by segments and memory does not grow with the clip.

    Args:
        pipe: Only Stage II and the text encoder are used.
        clip: ``[T, h, w, 3]`` uint8; cropped where its aspect is another one.
        prompt: Text that describes the clip; may be empty.
        config: Settings with the size of the output, by default the model's, see
            ``second_pass``; the clip gives the length.
        generator: See ``SwiftI2VPipeline.stream``.
        on_progress: See ``SwiftI2VPipeline.stream``.
        stopwatch: See ``SwiftI2VPipeline.stream``.
        store: See ``SwiftI2VPipeline.refine``.

    Yields:
        Segments in order; the first one brings the first frame with it.

    Raises:
        ShapeError: Sizes that do not fit, before any work.
        NumericalError: The model returned NaN or infinity.

    Source:
        ViBe, arXiv:2603.23326 (inference); streaming by segments is SwiftI2V's.
    """
    config = replace(config or second_pass(pipe.config), num_frames=len(clip))
    clip = crop_to_aspect(clip, config.height, config.width)
    yield from pipe.refine(
        clip,
        first_frame(clip, config),
        prompt,
        generator=generator,
        config=config,
        on_progress=on_progress,
        stopwatch=stopwatch,
        store=store,
    )


def second_pass(config: GenerationConfig) -> GenerationConfig:
    """Settings of a model, changed so that Stage II starts from a clip and makes all its frames.

    A strength below 1 is kept: such a model is meant for this. There is no photo, so no detail is
    carried.
    """
    sampling = config.stage2.sampling
    if sampling.strength == 1:
        sampling = replace(sampling, strength=STRENGTH)
    stage2 = replace(config.stage2, anchor="generated", reference_detail="none", sampling=sampling)
    return replace(config, stage2=stage2)


def first_frame(clip: Frames, config: GenerationConfig) -> Image.Image:
    """The clip's first frame at the output size, in the place of a photo."""
    small = frames_to_video(clip[:1])
    large = resize_video(small, config.height, config.width, config.stage2.upsampling)
    return Image.fromarray(video_to_frames(large)[0])


def crop_to_aspect(clip: Frames, height: int, width: int) -> Frames:
    """The largest centred part of a clip that has exactly the aspect of the output.

    Args:
        clip: ``[T, h, w, 3]``; not copied.
        height: Height of the output.
        width: Width of the output.

    Raises:
        ShapeError: The clip is too small to have that aspect in whole pixels.
    """
    low_height, low_width = clip.shape[1:3]
    common = math.gcd(height, width)
    rows, columns = height // common, width // common
    times = min(low_height // rows, low_width // columns)
    if times == 0:
        raise ShapeError(
            f"the clip is {low_width}x{low_height}: no part of it has the output's aspect of "
            f"{columns}:{rows}; choose a size of a simpler aspect, such as 16:9"
        )
    top, left = (low_height - times * rows) // 2, (low_width - times * columns) // 2
    return clip[:, top : top + times * rows, left : left + times * columns]
