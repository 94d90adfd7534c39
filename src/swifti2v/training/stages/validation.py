"""Validation in training: the pipelines as users run them, on the same few clips every time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from PIL import Image

from swifti2v.config import Stage2Config, settings
from swifti2v.evaluation.metrics.detail_coherence import detail_coherence
from swifti2v.evaluation.metrics.fidelity import psnr
from swifti2v.evaluation.metrics.seam import seam_score
from swifti2v.evaluation.metrics.temporal import flicker
from swifti2v.media import Frames, downscale, frames_to_video, open_writer, video_to_frames
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.shapes import latent_frames
from swifti2v.training.data.clips import LoadedClip

NUM_SHOWN = 4
"""Frames of a clip on the grid."""


@settings
class ValidationConfig:
    """Settings of a validation."""

    num_clips: int = 1
    """Clips, the first of the manifest."""
    seed: int = 0
    """Seed of the sampling noise."""


def validate_stage2(
    pipe: SwiftI2VPipeline, clips: list[LoadedClip], directory: Path, seed: int
) -> Mapping[str, float]:
    """Refine small versions of clips, or Stage I's, and compare with the truth.

    ``directory`` gets ``clip-N.mp4`` and ``grid.png``: truth above, refined below.

    Returns:
        Means over the clips: ``psnr`` (dB, frames 1 to T-1), ``detail_coherence``, ``seam_score``
        and ``flicker``.
    """
    results, rows = [], []
    for number, clip in enumerate(clips):
        height, width = clip.frames.shape[1:3]
        config = pipe.configure(num_frames=len(clip.frames), height=height, width=width)
        low = clip.reference
        if low is None:
            low = downscale(clip.frames, config.stage1.downscale)
        photo = Image.fromarray(clip.frames[0])
        pieces = pipe.refine(low, photo, clip.prompt, generator=seed, config=config)
        output = np.concatenate([piece.frames for piece in pieces])
        results.append(_measure(output, clip.frames, config.stage2))
        rows.append((clip.frames, output))
        _write_clip(directory / f"clip-{number}.mp4", output, config.fps)
    _write_grid(directory / "grid.png", rows)
    return _average(results)


def validate_stage1(
    pipe: SwiftI2VPipeline, clips: list[LoadedClip], directory: Path, seed: int
) -> Mapping[str, float]:
    """Make motion references of clips' first frames and compare with the clips.

    ``directory`` gets ``clip-N.mp4`` and ``grid.png``: truth above, generated below.

    Returns:
        Means over the clips: ``psnr`` (dB, frames 1 to T-1) and ``flicker``.
    """
    results, rows = [], []
    for number, clip in enumerate(clips):
        photo = frames_to_video(clip.frames[:1])
        device = pipe.components.device
        conditions = pipe.encoder(Image.fromarray(clip.frames[0]), clip.prompt)
        with torch.no_grad():
            made = pipe.stage1(
                photo.to(device), conditions, len(clip.frames), seed, pipe.config.stage1
            )
        output = video_to_frames(made.video)
        results.append(
            {
                "psnr": float(psnr(output[1:], clip.frames[1:]).mean()),
                "flicker": flicker(output),
            }
        )
        rows.append((clip.frames, output))
        _write_clip(directory / f"clip-{number}.mp4", output, pipe.config.fps)
    _write_grid(directory / "grid.png", rows)
    return _average(results)


def measure_round_trip(
    vae: AutoencoderKLWan, clips: list[LoadedClip], side: int | None, directory: Path
) -> Mapping[str, float]:
    """Encode and decode clips, or the square at their centre; ``grid.png`` has the truth above.

    Returns:
        Means over the clips: ``psnr`` (dB) and ``detail_coherence``.
    """
    results, rows = [], []
    for clip in clips:
        frames = clip.frames
        if side is not None:
            top, left = ((length - side) // 2 for length in frames.shape[1:3])
            frames = frames[:, top : top + side, left : left + side]
        video = frames_to_video(frames).to(vae.device)
        decoded: Any = vae.decode(vae.encode(video).latent_dist.mean)
        output = video_to_frames(decoded.sample)
        results.append(
            {
                "psnr": float(psnr(output, frames).mean()),
                "detail_coherence": detail_coherence(output, frames),
            }
        )
        rows.append((frames, output))
    _write_grid(directory / "grid.png", rows)
    return _average(results)


def _measure(output: Frames, truth: Frames, stage2: Stage2Config) -> dict[str, float]:
    starts = [segment.target[0] for segment in stage2.plan(latent_frames(len(truth)))[1:]]
    metrics = {
        "psnr": float(psnr(output[1:], truth[1:]).mean()),
        "detail_coherence": detail_coherence(output[1:], truth[1:]),
        "flicker": flicker(output),
    }
    if starts and stage2.segment_size != 1:  # segments of one frame have no frames between seams
        metrics["seam_score"] = seam_score(output, starts)
    return metrics


def _average(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([result[name] for result in results])) for name in results[0]}


def _write_clip(path: Path, frames: Frames, fps: float) -> None:
    _, height, width, _ = frames.shape
    with open_writer(path, height=height, width=width, fps=fps) as writer:
        writer.write(frames)


def _write_grid(path: Path, rows: list[tuple[Frames, Frames]]) -> None:
    """Truth above output, for each clip; a few frames from first to last."""
    lines = []
    for truth, output in rows:
        places = np.linspace(0, len(truth) - 1, NUM_SHOWN).round().astype(int)
        lines += [np.concatenate(list(frames[places]), axis=1) for frames in (truth, output)]
    width = max(line.shape[1] for line in lines)
    padded = [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0))) for line in lines]
    Image.fromarray(np.concatenate(padded)).save(path)
