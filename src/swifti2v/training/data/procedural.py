"""Training clips and images made from nothing, as files with a manifest: what the shipped configurations run on."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from swifti2v.media import (
    open_writer,
    video_to_frames,
)
from swifti2v.pipelines.camera_moves import MOVES
from swifti2v.pipelines.course import draw_course
from swifti2v.shapes import PixelShape
from swifti2v.storage import whole_file, write_whole
from swifti2v.training.data.camera_motion import Scene, draw_view, render_move
from swifti2v.training.data.motion_prompts import ask_for

MANIFEST_NAME = "manifest.jsonl"
CAPTION = "coloured shapes, drawn"
"""Caption of the images."""


def write_procedural_clips(
    directory: Path, buckets: Sequence[PixelShape], num_clips: int, seed: int, fps: float
) -> Path:
    """Write clips of camera motions over drawn pictures, and a manifest of them, which is returned.

    There are ``num_clips`` for each bucket, with prompts that name the motion; a bucket of one
    frame gets the pictures themselves. What is in the directory already is kept.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for place, bucket in enumerate(buckets):
        for number in range(num_clips):
            rng = np.random.default_rng((seed, place, number))
            is_image = bucket.num_frames == 1
            motion = list(MOVES)[number % len(MOVES)]
            name = f"{'x'.join(map(str, bucket))}-{number:03d}.{'png' if is_image else 'mkv'}"
            prompt = CAPTION if is_image else ask_for(motion, rng)
            rows.append({"image" if is_image else "video": name, "prompt": prompt})
            if (directory / name).exists():
                continue
            size = (bucket.height, bucket.width)
            if is_image:
                still = video_to_frames(draw_picture(*size, rng)[None, :, None])[0]
                with whole_file(directory / name, ending=".png") as unfinished:
                    Image.fromarray(still).save(unfinished)
                continue
            picture = video_to_frames(draw_picture(2 * size[0], 2 * size[1], rng)[None, :, None])[0]
            scene, view = Scene(picture, None, None), draw_view(picture.shape[:2], size, rng)
            course = draw_course(bucket.num_frames, int(rng.integers(2**62)))
            video, _ = render_move(scene, view, MOVES[motion], course, size)
            with (
                whole_file(directory / name, ending=".mkv") as unfinished,
                open_writer(
                    unfinished, height=size[0], width=size[1], fps=fps, codec="ffv1"
                ) as writer,
            ):
                writer.write(video_to_frames(video[None]))
    manifest = directory / MANIFEST_NAME
    write_whole(manifest, "".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def draw_picture(height: int, width: int, rng: np.random.Generator) -> Tensor:
    """``[3, H, W]`` in [-1, 1]: coloured noise of all scales with hard-edged discs and bars."""
    picture = torch.zeros(1, 3, height, width)
    for octave in range(7):
        rows, columns = 2 + 2**octave, 3 + 2**octave
        noise = rng.standard_normal((1, 3, rows, columns)) * 0.6**octave
        grey = noise.mean(axis=1, keepdims=True)
        layer = torch.from_numpy(0.4 * noise + 0.6 * grey).float()
        picture += 0.6 * F.interpolate(layer, (height, width), mode="bicubic")
    row = torch.linspace(-1, 1, height)[:, None]
    column = torch.linspace(-1, 1, width)[None, :]
    for _ in range(24):
        x, y = rng.uniform(-1, 1, size=2)
        a, b = rng.uniform(0.02, 0.3, size=2)
        if rng.random() < 0.5:
            inside = ((column - x) / a) ** 2 + ((row - y) / b) ** 2 < 1
        else:
            inside = ((column - x).abs() < a) & ((row - y).abs() < b)
        colour = torch.from_numpy(rng.uniform(-0.9, 0.9, size=(3, 1, 1))).float()
        picture[0] = torch.where(inside, 0.3 * picture[0] + 0.7 * colour, picture[0])
    return picture[0].clamp(-1, 1)
