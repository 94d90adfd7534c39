"""Stage-transition samples: true clips as Stage I would have drawn them, for Stage II to train on.

A clip is scaled down to Stage I's size, encoded, noised to a level sigma and denoised by Stage I from
there, with its own first frame and prompt as conditions. The result keeps the true motion but has
what Stage II meets in use: the distortion of Stage I's VAE, flicker, and noise that is left over.
Stage II learns to turn it back into the true clip.

Source: SwiftI2V, arXiv:2605.06356 (stage transition); it leaves the range of sigma open.
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from swifti2v.config import GenerationConfig, settings, to_dict
from swifti2v.errors import ConfigError, MediaError, ShapeError
from swifti2v.evaluation.metrics.fidelity import psnr
from swifti2v.media import Frames, downscale_video, video_to_frames
from swifti2v.media.timing import exact_rate
from swifti2v.models.fingerprints import fingerprint_model
from swifti2v.pipelines.progress import OnProgress
from swifti2v.pipelines.stage1 import plan_redraw_sigmas
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.sampling import SAMPLING_VERSION
from swifti2v.shards import is_in_shard
from swifti2v.training.data.buckets import BucketRules, plan_bucket, plan_range, probe
from swifti2v.training.data.decoding import decode_clip
from swifti2v.training.data.samples import Manifest, MediaFile, Reject, Sample

MAX_PSNR = 99.0
"""Decibels written where frames are equal."""


@settings
class TransitionConfig:
    """All settings that decide a sample, besides clip, prompt and weights."""

    generation: GenerationConfig
    """Size, length and rate of the clips, and Stage I's settings; Stage II's play no part."""
    sigma_low: float = 0.2
    """Lowest noise level; the clip comes back nearly as it was."""
    sigma_high: float = 0.6
    """Highest noise level; at 1 nothing but the first frame is left."""
    seed: int = 0
    """Seed of noise levels and noise; each sample mixes its id in."""

    def __post_init__(self) -> None:
        if not 0 < self.sigma_low <= self.sigma_high <= 1:
            raise ConfigError(
                f"the sigma range is {self.sigma_low:g} to {self.sigma_high:g}; it must lie in "
                "(0, 1] and not fall"
            )


class TransitionDraw(NamedTuple):
    """Random values of a sample."""

    sigma: float
    """Noise level."""
    seed: int
    """Seed of the noise."""
    place: float
    """Start of its window among all possible frames, in [0, 1)."""


class ClipWindow(NamedTuple):
    """The part of a clip that a sample is made of."""

    frames: Frames
    """``[T, H, W, 3]`` uint8 of the size and length of the settings."""
    start: float
    """Seconds after the clip's first frame."""
    end: float
    """Seconds after the clip's first frame; the last frame begins before it."""
    notes: tuple[str, ...] = ()
    """Changes made to the clip while it is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransitionSample:
    """A clip as Stage I draws it again."""

    frames: Frames
    """``[T, h, w, 3]`` uint8, at Stage I's size."""
    draw: TransitionDraw
    """Random values of the sample."""
    sigmas: tuple[float, ...]
    """Noise levels from the first to 0."""
    psnr: float
    """Likeness to the true clip at this size, in dB; the first frame does not count."""
    still_psnr: float
    """PSNR of a clip that repeats the true first frame: the value without any motion."""


def draw_for(config: TransitionConfig, sample_id: str) -> TransitionDraw:
    """Draw a sample's random values from the seed of the settings and its id alone.

    Neither the order of samples nor sharding or a stop changes them.
    """
    digest = hashlib.sha256(f"{config.seed} {sample_id}".encode(errors="surrogateescape")).digest()
    level, seed, place = (int.from_bytes(digest[i : i + 6], "big") for i in (0, 8, 16))
    sigma = config.sigma_low + (config.sigma_high - config.sigma_low) * level / 2**48
    return TransitionDraw(min(sigma, config.sigma_high), seed, place / 2**48)


def take_shard(listed: Manifest, index: int, num_shards: int) -> Manifest:
    """The samples and rejects of one shard, see ``is_in_shard``."""
    return Manifest(
        tuple(item for item in listed.samples if is_in_shard(item.id, index, num_shards)),
        tuple(item for item in listed.rejects if is_in_shard(item.id, index, num_shards)),
    )


def read_window(sample: Sample, config: TransitionConfig) -> ClipWindow | Reject:
    """Read the part of a clip that its sample is made of.

    The window begins at a frame drawn from the seed of the settings and the id. Frames are
    resampled, scaled down and cropped exactly as training does it (``decode_clip``).

    Returns:
        The window, or the reason against it: the clip cannot be read, is too small, too short or of
        another aspect, lies in an archive, is a picture, or has a reference already.
    """
    if sample.kind != "video":
        return Reject(sample.id, "no clip: a picture has no motion to keep")
    if sample.reference is not None:
        return Reject(sample.id, f"has a reference: {sample.reference}")
    if not isinstance(sample.media, MediaFile):
        return Reject(sample.id, "in an archive: unpack it, a manifest's row must name a file")
    generation = config.generation
    bucket = (generation.num_frames, generation.height, generation.width)
    rules = BucketRules(buckets=(bucket,), fps=generation.fps)
    try:
        facts = probe(sample)
        placed = plan_bucket(sample, facts, rules)
        if isinstance(placed, Reject):
            return placed
        assert facts.fps is not None  # plan_bucket refuses pictures
        usable = plan_range(facts.num_frames, facts.fps, rules.fps, sample)
        num_places = len(usable) - generation.num_frames + 1
        first = usable.start + int(draw_for(config, sample.id).place * num_places)
        step, seconds = 1 / exact_rate(rules.fps), facts.num_frames / exact_rate(facts.fps)
        start, end = float(first * step), float(min((first + bucket[0]) * step, seconds))
        # As long as the bucket, so nothing is left for the generator to draw.
        exact = replace(sample, start=start, end=end)
        frames = decode_clip(exact, placed.bucket, rules.fps, np.random.default_rng(0))
    except MediaError as error:
        return Reject(sample.id, f"cannot be read: {error}")
    return ClipWindow(frames, start, end, facts.notes)


def make_row(sample: Sample, clip: Path, start: float, end: float, folder: Path) -> dict[str, Any]:
    """Row of a manifest in ``folder``: the source's, with the window in seconds and the new clip."""
    assert isinstance(sample.media, MediaFile)  # read_window refuses others
    base = folder.resolve()
    row = {
        "video": os.path.relpath(sample.media.path.resolve(), base),
        "prompt": sample.prompt,
        "reference": os.path.relpath(clip.resolve(), base),
        "start": start,
        "end": end,
        "fps": sample.fps,
        "width": sample.width,
        "height": sample.height,
        "split": sample.split,
        "weight": sample.weight,
        "source": sample.source,
    }
    return {name: value for name, value in row.items() if value is not None}


def make_transition_sample(
    pipe: SwiftI2VPipeline,
    frames: Frames,
    prompt: str,
    sample_id: str,
    config: TransitionConfig,
    on_progress: OnProgress | None = None,
) -> TransitionSample:
    """Draw a true clip, ``[T, H, W, 3]`` uint8, again with Stage I.

    Its id decides noise level and noise, together with the seed of the settings.

    Raises:
        ShapeError: ``frames`` is not as stated, or its size does not fit the model.
        PromptError: The prompt is longer than the text encoder takes.
        NumericalError: The model returned NaN or infinity.
    """
    generation = config.generation
    expected = (generation.num_frames, generation.height, generation.width, 3)
    if frames.dtype != np.uint8 or frames.shape != expected:
        raise ShapeError(
            f"clip {sample_id}: frames must be uint8 {expected}; these are {frames.dtype} "
            f"{frames.shape}"
        )
    pipe.require_fit(generation)
    stage1, draw = generation.stage1, draw_for(config, sample_id)
    is_guided = stage1.sampling.guidance_scale > 1
    conditions = pipe.encoder(
        Image.fromarray(frames[0]), prompt, generation.negative_prompt if is_guided else None
    )
    with torch.inference_mode():
        small = downscale_video(frames, stage1.downscale, pipe.components.device)
        clip = pipe.stage1.redraw(small, conditions, draw.seed, stage1, draw.sigma, on_progress)
    made, true = video_to_frames(clip.video), video_to_frames(small)
    return TransitionSample(
        frames=made,
        draw=draw,
        sigmas=tuple(plan_redraw_sigmas(stage1.sampling, draw.sigma)),
        psnr=_mean_psnr(made, true),
        still_psnr=_mean_psnr(np.broadcast_to(true[:1], true.shape), true),
    )


def _mean_psnr(frames: Frames, true: Frames) -> float:
    values = psnr(torch.tensor(frames[1:]), torch.tensor(true[1:]))
    return round(float(values.clamp(max=MAX_PSNR).mean()), 3)


def describe_run(pipe: SwiftI2VPipeline, config: TransitionConfig) -> dict[str, Any]:
    """Describe what decides all samples of a run, in plain values: settings and hashes of weights.

    LoRAs count as part of the weights they are merged into.
    """
    parts = pipe.components
    settings = json.loads(json.dumps(to_dict(config)))  # lists, as it is read back
    del settings["generation"]["stage2"]
    models: dict[str, Any] = {
        "stage1_transformer": parts.stage1_transformer,
        "stage1_vae": parts.stage1_vae,
        "text_encoder": parts.text_encoder,
        "image_encoder": parts.image_encoder,
    }
    weights = {role: fingerprint_model(m) for role, m in models.items() if m is not None}
    return {"settings": settings, "weights": weights, "sampling_version": SAMPLING_VERSION}


def describe_sample(sample: Sample) -> dict[str, Any]:
    """Describe what decides one sample besides its run and its id, in plain values."""
    return {
        "prompt": sample.prompt,
        "source_sha256": sample.media.fingerprint(),
        "source_start": sample.start,
        "source_end": sample.end,
    }
