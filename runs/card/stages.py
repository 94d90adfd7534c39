"""Measurements of a two-stage model on held-out clips: codec, Stage II and seconds."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from swifti2v.config import GenerationConfig
from swifti2v.errors import ShapeError
from swifti2v.evaluation.baselines import (
    carried_baseline,
    copy_detail_baseline,
    flow_warp_baseline,
    lanczos_baseline,
    warp_detail_baseline,
)
from swifti2v.evaluation.metrics.blockiness import blockiness
from swifti2v.evaluation.metrics.cadence import cadence
from swifti2v.evaluation.metrics.carried_coherence import carried_coherence
from swifti2v.evaluation.metrics.detail_coherence import detail_coherence, hf_energy_ratio
from swifti2v.evaluation.metrics.fidelity import clip_psnr
from swifti2v.evaluation.metrics.seam import seam_score
from swifti2v.evaluation.metrics.series import mean_psnr
from swifti2v.media import Frames, downscale, frames_to_video, video_to_frames
from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.models.vae.streaming import StreamingDecoder, StreamingEncoder
from swifti2v.pipelines.progress import Stopwatch
from swifti2v.pipelines.two_stage import SwiftI2VPipeline

LANCZOS = "Lanczos"
CARRIED = "carried, no network"
FLOW_WARP = "photo warped along the flow"
COPY_DETAIL = "Lanczos + photo's detail in place"
WARP_DETAIL = "Lanczos + photo's detail warped"
MODEL = "model"
MODEL_NO_ANCHOR = "model without the photo's detail"


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecRow:
    """A clip through the video VAE and back."""

    clip: str
    """Name of the clip."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    psnr_db: float
    """PSNR of all frames together; 60 at most."""
    coherence: float
    """Detail coherence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage2Row:
    """A clip made from its own low-resolution version and its first frame."""

    clip: str
    """Name of the clip."""
    method: str
    """Model, variant of it, or baseline."""
    psnr_db: float
    """Against the clip, frames 1 to T-1 together; 60 at most."""
    coherence: float
    """Detail coherence with the clip, frames 1 to T-1."""
    seam: float
    """Seam score at the starts of the model's segments, for every method."""
    hf_ratio: float
    """Energy above a quarter cycle per pixel relative to the clip, mean of frames 1 to T-1."""
    cadence: float
    """Unevenness of motion within latent frames."""
    carried: float
    """Coherence with the photo moved onto the frames; NaN where nothing can be compared."""
    blockiness: float
    """Steps at the edges of 8-pixel blocks, mean of frames 1 to T-1."""


def clip_faults(output: Frames, photo: Frames, time_factor: int) -> dict[str, float]:
    """Measure faults that need no truth: jumps, ghosts and blocks.

    Args:
        output: ``[T, H, W, 3]`` uint8.
        photo: ``[H, W, 3]``, frame 0 in full.
        time_factor: Pixel frames of a latent frame.

    Returns:
        ``cadence``, ``carried`` and ``blockiness`` as rows hold them.
    """
    return {
        "cadence": cadence(output, time_factor),
        "carried": float(carried_coherence(output, photo, step=time_factor).nanmean()),
        "blockiness": float(blockiness(output[1:]).mean()),
    }


def measure_codec(vae: VideoVAE, clips: Mapping[str, Frames]) -> list[CodecRow]:
    """Encode and decode every clip, a latent frame at a time.

    Args:
        vae: The video VAE.
        clips: ``[T, H, W, 3]`` by name; T = 4k + 1, sides multiples of the VAE's factor.

    Raises:
        ShapeError: A clip that the VAE does not take.
    """
    rows = []
    for name, truth in clips.items():
        output = np.concatenate(list(_round_trip(vae, truth)))
        rows.append(
            CodecRow(
                clip=name,
                height=truth.shape[1],
                width=truth.shape[2],
                psnr_db=mean_psnr([clip_psnr(output, truth)]),
                coherence=detail_coherence(output, truth),
            )
        )
    return rows


def _round_trip(vae: VideoVAE, frames: Frames) -> Iterator[Frames]:
    encoder, decoder = StreamingEncoder(vae), StreamingDecoder(vae)
    for frame in frames:
        latents = encoder.encode(frames_to_video(frame[None]))
        if latents.shape[2]:
            yield video_to_frames(decoder.decode(latents))
    encoder.finish()


def stage2_methods(
    pipe: SwiftI2VPipeline,
    low_res_frames: Frames,
    photo: Frames,
    config: GenerationConfig,
    variants: Mapping[str, GenerationConfig] | None = None,
    seed: int = 0,
) -> dict[str, Callable[[], Frames]]:
    """Ways to a high-resolution clip, each run when it is called.

    Args:
        pipe: The model.
        low_res_frames: ``[T, h, w, 3]``.
        photo: ``[H, W, 3]``, frame 0 at full size.
        config: Settings of the model's own row.
        variants: Further settings to run, by the name of their row.
        seed: Seed of the model's noise.

    Returns:
        Baselines, model, variants, and the model with the enlarged first low-resolution frame
        in place of the photo (same weights, no detail to look at), in the order of the table.
    """
    height, width = photo.shape[:2]
    soft = lanczos_baseline(low_res_frames[:1], height, width)[0]

    def refine(image: Frames, settings: GenerationConfig) -> Frames:
        segments = pipe.refine(
            low_res_frames, Image.fromarray(image), "", generator=seed, config=settings
        )
        return np.concatenate([segment.frames for segment in segments])

    others = {name: partial(refine, photo, settings) for name, settings in (variants or {}).items()}
    return {
        LANCZOS: partial(lanczos_baseline, low_res_frames, height, width),
        FLOW_WARP: partial(flow_warp_baseline, low_res_frames, photo),
        COPY_DETAIL: partial(copy_detail_baseline, low_res_frames, photo),
        WARP_DETAIL: partial(warp_detail_baseline, low_res_frames, photo),
        CARRIED: partial(carried_baseline, low_res_frames, photo),
        MODEL: partial(refine, photo, config),
        **others,
        MODEL_NO_ANCHOR: partial(refine, soft, config),
    }


def measure_stage2(
    pipe: SwiftI2VPipeline,
    clips: Mapping[str, Frames],
    config: GenerationConfig,
    variants: Mapping[str, GenerationConfig] | None = None,
    seed: int = 0,
    on_row: Callable[[Stage2Row], None] | None = None,
) -> list[Stage2Row]:
    """Rebuild every clip from its downscaled self and its first frame, with every method.

    Frame 0 is the photo and counts nowhere. One output is in memory at a time.

    Args:
        pipe: The model.
        clips: ``[T, H, W, 3]`` by name, of the size and length of ``config``.
        config: Settings; ``stage1.downscale`` is the factor of the low-resolution clip.
        variants: Further settings to run, by the name of their row.
        seed: Seed of the model's noise.
        on_row: Called with each row when it is done.

    Raises:
        ShapeError: A clip of another size or length than ``config`` says.
    """
    for name, truth in clips.items():
        if truth.shape[:3] != (config.num_frames, config.height, config.width):
            raise ShapeError(
                f"clip {name} is {truth.shape}, the settings are {config.num_frames} frames of "
                f"{config.width}x{config.height}; cut and scale the clip to them"
            )
    rows = []
    for name, truth in clips.items():
        low = downscale(truth, config.stage1.downscale)
        methods = stage2_methods(pipe, low, truth[0], config, variants, seed)
        for method, run in methods.items():
            output = run()
            starts = [start for start, _ in pipe.plan(config)]
            row = Stage2Row(
                clip=name,
                method=method,
                psnr_db=mean_psnr([clip_psnr(output[1:], truth[1:])]),
                coherence=detail_coherence(output, truth),
                seam=seam_score(output, starts, pipe.stage2.scale.time),
                hf_ratio=float(hf_energy_ratio(output[1:], truth[1:]).nanmean()),
                **clip_faults(output, truth[0], pipe.stage2.scale.time),
            )
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return rows


def measure_seconds(
    pipe: SwiftI2VPipeline, image: Image.Image, prompt: str, config: GenerationConfig, seed: int = 0
) -> dict[str, float]:
    """Make one clip, keep none of its frames, and time it.

    Returns:
        Seconds of each stage, of the whole run (``total``) and until the first segment was
        finished (``first segment``).
    """
    stopwatch = Stopwatch()
    first = None
    for _ in pipe.stream(image, prompt, generator=seed, config=config, stopwatch=stopwatch):
        first = stopwatch.total() if first is None else first
    return {
        **stopwatch.seconds,
        "first segment": stopwatch.total() if first is None else first,
        "total": stopwatch.total(),
    }
