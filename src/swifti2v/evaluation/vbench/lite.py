"""``vbench-lite``: seven dimensions measured by our own code; never mixed with official results."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swifti2v.errors import MediaError
from swifti2v.evaluation.intervals import Estimate, bootstrap_mean
from swifti2v.evaluation.metrics.temporal import flicker
from swifti2v.evaluation.vbench import formulas
from swifti2v.evaluation.vbench import frame_transforms as transforms
from swifti2v.evaluation.vbench.backbones import (
    CLIP_B,
    Embed,
    EstimateFlow,
    load_aesthetic_score,
    load_clip,
    load_dino,
    load_dreamsim,
    load_raft,
)
from swifti2v.evaluation.vbench.suite import SuiteVideo
from swifti2v.media import iter_frames, load_image, probe_clip

KIND = "vbench-lite"
BATCH_SIZE = 8
"""Frames, already scaled down, that an extractor takes at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiteVideo:
    """A video to be measured."""

    video: SuiteVideo
    """Video of the suite."""
    path: Path
    """File of the video."""
    photo: Path
    """Photo that it was made from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoScore:
    """Score of one video."""

    value: float
    """0 to 1."""
    num_frames: int
    """Frames of the clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiteResult:
    """One dimension over a set of videos."""

    value: float
    """Mean as in VBench: of consistency over all frames, of the others over videos."""
    interval: Estimate
    """Mean over prompts with its 95 % interval, bootstrapped over prompts."""
    videos: dict[str, VideoScore]
    """Scores by file name."""


Measure: TypeAlias = Callable[[LiteVideo], VideoScore]


def load_measure(dimension: str, weights: Path | None, device: torch.device) -> Measure:
    """Load the models of one dimension of ``LITE``; weights that are not local are downloaded.

    Raises:
        LoadingError: Weights are missing or do not fit.
        ConfigError: A library of the extra ``eval`` is missing.
    """
    match dimension:
        case "i2v_subject":
            return photo_measure(
                load_dino(weights, device), transforms.dino_centre, transforms.dino_photo, device
            )
        case "i2v_background":
            return photo_measure(
                load_dreamsim(weights, device),
                transforms.dreamsim_frame,
                transforms.dreamsim_photo,
                device,
            )
        case "subject_consistency":
            return consistency_measure(load_dino(weights, device), transforms.dino_frame, device)
        case "background_consistency":
            clip = load_clip(CLIP_B, weights, device)
            return consistency_measure(clip, transforms.clip_frame, device)
        case "aesthetic_quality":
            return aesthetic_measure(load_aesthetic_score(weights, device), device)
        case "dynamic_degree":
            return dynamic_measure(load_raft(weights, device), device)
        case "temporal_flickering":
            return measure_flickering
    raise ValueError(f"{dimension} is not a dimension of {KIND}")


def photo_measure(
    embed: Embed,
    frame_transform: transforms.Transform,
    photo_transform: Callable[..., Tensor],
    device: torch.device,
) -> Measure:
    """Likeness of a clip to its photo in an extractor's eyes (``formulas.photo_similarity``)."""

    @torch.inference_mode()
    def measure(item: LiteVideo) -> VideoScore:
        photo = embed(photo_transform(load_image(item.photo)).to(device))
        features = embed_frames(item.path, embed, frame_transform, device)
        value = formulas.photo_similarity(features, photo.reshape(-1).cpu())
        return VideoScore(value=value, num_frames=len(features))

    return measure


def consistency_measure(
    embed: Embed, frame_transform: transforms.Transform, device: torch.device
) -> Measure:
    """Likeness of frames to each other in an extractor's eyes (``formulas.consistency``)."""

    @torch.inference_mode()
    def measure(item: LiteVideo) -> VideoScore:
        features = embed_frames(item.path, embed, frame_transform, device)
        return VideoScore(value=formulas.consistency(features), num_frames=len(features))

    return measure


def aesthetic_measure(score: Embed, device: torch.device) -> Measure:
    """Mean over frames of a score of 0 to 10, divided by 10."""

    @torch.inference_mode()
    def measure(item: LiteVideo) -> VideoScore:
        scores = embed_frames(item.path, score, transforms.clip_frame, device)
        return VideoScore(value=float(scores.double().mean()) / 10, num_frames=len(scores))

    return measure


def dynamic_measure(estimate_flow: EstimateFlow, device: torch.device) -> Measure:
    """1 for a clip that moves, else 0 (``formulas.is_dynamic``); two frames are held at a time."""

    @torch.inference_mode()
    def measure(item: LiteVideo) -> VideoScore:
        info = probe_clip(item.path)
        step = formulas.sampling_step(info.fps)
        previous, fastest, num_frames = None, [], 0
        for index, frame in enumerate(iter_frames(item.path)):
            num_frames = index + 1
            if index % step:
                continue
            pixels = transforms.frame_to_pixels(frame, device)
            if previous is not None:
                fastest.append(formulas.fastest_flow(estimate_flow(previous, pixels)))
            previous = pixels
        moves = formulas.is_dynamic(fastest, len(fastest) + 1, info.height, info.width)
        return VideoScore(value=float(moves), num_frames=num_frames)

    return measure


def measure_flickering(item: LiteVideo) -> VideoScore:
    """Similarity of neighbouring frames (``metrics.temporal.flicker``)."""
    num_frames = 0

    def frames() -> Iterator[NDArray[np.uint8]]:
        nonlocal num_frames
        for frame in iter_frames(item.path):
            num_frames += 1
            yield frame[None]

    value = flicker(frames())
    return VideoScore(value=value, num_frames=num_frames)


def embed_frames(
    path: Path, embed: Embed, transform: transforms.Transform, device: torch.device
) -> Tensor:
    """Features ``[T, D]`` on the CPU; one frame of the clip and one batch of small ones are held."""
    features, batch = [], []
    for frame in iter_frames(path):
        batch.append(transform(transforms.frame_to_pixels(frame, device)))
        if len(batch) == BATCH_SIZE:
            features.append(_embed_batch(embed, batch))
            batch = []
    if batch:
        features.append(_embed_batch(embed, batch))
    return torch.cat(features)


def _embed_batch(embed: Embed, batch: Sequence[Tensor]) -> Tensor:
    return embed(torch.cat(list(batch))).reshape(len(batch), -1).float().cpu()


def measure_all(
    dimension: str,
    videos: Sequence[LiteVideo],
    measure: Measure,
    on_video: Callable[[str, int], None] | None = None,
) -> LiteResult:
    """Measure those videos of a suite that a dimension is for.

    Raises:
        MediaError: A video cannot be read, or has one frame only.
    """
    scores: dict[str, VideoScore] = {}
    by_prompt: dict[str, list[float]] = {}
    for item in videos:
        entry = item.video.entry
        if dimension not in entry.dimension:
            continue
        score = scores[item.path.name] = measure(item)
        by_prompt.setdefault(entry.prompt_en, []).append(score.value)
        if on_video is not None:
            on_video(item.path.name, len(scores))
    if not scores:
        raise MediaError(
            f"no video is for {dimension}; name other dimensions, or videos of the suite"
        )
    is_by_frame = dimension.endswith("_consistency")
    value = formulas.weighted_mean(
        [score.value for score in scores.values()],
        [score.num_frames - 1 if is_by_frame else 1 for score in scores.values()],
    )
    prompt_means = [sum(values) / len(values) for values in by_prompt.values()]
    return LiteResult(value=value, interval=bootstrap_mean(prompt_means), videos=scores)
