"""Training material: clips and photos of a folder (or procedural ones) and crops drawn from them."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from swifti2v.config import Stage2Config
from swifti2v.errors import InputError
from swifti2v.media import (
    Frames,
    fit_image,
    iter_frames,
    load_image,
    probe_clip,
    resize_video,
    video_to_frames,
)
from swifti2v.pipelines.camera_moves import MOVES
from swifti2v.pipelines.course import draw_course
from swifti2v.pipelines.transition import MotionReference, make_reference
from swifti2v.training.data.camera_motion import Scene, draw_view, render_move

logger = logging.getLogger(__name__)

CLIP_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"})
PHOTO_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".avif", ".heic", ".heif"}
)
GREY = (128, 128, 128)
"""Behind what is see-through."""
STILL_INTERVAL = 20
"""Every so many frames of a clip serve as stills too."""
PICTURE_INTERVAL = 30
"""Every so many frames of a clip serve as pictures too."""


@dataclass(frozen=True, slots=True)
class Material:
    """All there is to train on, of one size and one frame rate."""

    clips: tuple[Frames, ...]
    """``[T, H, W, 3]`` uint8 each; T differs."""
    stills: tuple[Frames, ...]
    """``[H, W, 3]`` uint8 each: photos, and frames of the clips."""
    pictures: tuple[Frames, ...]
    """Photos and frames of the clips again, in their own sizes."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of clips and stills."""
        height, width, _ = self.stills[0].shape
        return height, width

    def require_clips(self, num_frames: int) -> None:
        """Refuse material without a clip of ``num_frames`` frames.

        Raises:
            InputError: Saying how long the longest clip is.
        """
        longest = max((len(clip) for clip in self.clips), default=0)
        if longest < num_frames:
            raise InputError(
                f"the longest of {len(self.clips)} training clips has {longest} frames; at least "
                f"one must have {num_frames}: add longer clips to the data folder"
            )


def read_material(
    directory: Path,
    *,
    height: int,
    width: int,
    fps: float,
    held_out: Collection[str] = (),
    max_frames: int | None = None,
) -> Material:
    """Read every clip and photo below a folder, cropped to one size and resampled in time.

    Args:
        directory: Searched with its subfolders; files of other kinds are passed over.
        height: Pixels.
        width: Pixels.
        fps: Frames a second.
        held_out: File names without suffix to leave out, for testing later.
        max_frames: Of each clip; None reads all.

    Raises:
        InputError: The folder is missing, holds no clip, or a held-out name is not in it.
        MediaError: A file cannot be read.
    """
    paths = find_material(directory, held_out)
    clip_paths = [path for path in paths if path.suffix.lower() in CLIP_SUFFIXES]
    photo_paths = [path for path in paths if path.suffix.lower() in PHOTO_SUFFIXES]
    if not clip_paths:
        raise InputError(
            f"data folder {directory} holds no clip ({', '.join(sorted(CLIP_SUFFIXES))}) to train on"
        )
    size = (height, width)
    pictures = [np.asarray(load_image(path, background=GREY)) for path in photo_paths]
    clips = []
    for path in clip_paths:
        fitted = []
        for note in probe_clip(path, background=GREY).notes:
            logger.warning("%s: %s", path.name, note)
        frames = iter_frames(path, fps, max_frames=max_frames, background=GREY)
        for number, frame in enumerate(frames):
            if number % PICTURE_INTERVAL == 0:
                pictures.append(frame.copy())
            fitted.append(_fit(frame, size))
        clips.append(np.stack(fitted))
        logger.info("%s: %d frames", path.name, len(clips[-1]))
    return _with_stills(clips, pictures, len(photo_paths))


def find_material(directory: Path, held_out: Collection[str] = ()) -> list[Path]:
    """Clips and photos below a folder that are trained on.

    Raises:
        InputError: The folder is missing, or a held-out name is not in it.
    """
    if not directory.is_dir():
        raise InputError(
            f"data folder {directory} does not exist; name a folder of clips and photos"
        )
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    if unknown := sorted(set(held_out) - {path.stem for path in found}):
        raise InputError(f"held-out {', '.join(unknown)} not found in {directory}; check held_out")
    kinds = CLIP_SUFFIXES | PHOTO_SUFFIXES
    return [p for p in found if p.stem not in held_out and p.suffix.lower() in kinds]


def make_procedural_material(
    *, height: int, width: int, num_frames: int, num_clips: int, seed: int
) -> Material:
    """Material without any file: pictures of noise and shapes, and camera moves over them.

    Args:
        height: Pixels.
        width: Pixels.
        num_frames: Of each clip.
        num_clips: Clips; there are as many photos beside them.
        seed: Of everything drawn.
    """
    rng = np.random.default_rng(seed)
    clips = []
    for index in range(num_clips):
        picture = _to_frames(draw_picture(2 * height, 2 * width, rng).permute(1, 2, 0))
        move = list(MOVES.values())[index % len(MOVES)]
        view = draw_view((2 * height, 2 * width), (height, width), rng)
        course = draw_course(num_frames, int(rng.integers(2**62)))
        video, _ = render_move(Scene(picture, None, None), view, move, course, (height, width))
        clips.append(_to_frames(video.permute(1, 2, 3, 0)))
    pictures = [
        _to_frames(draw_picture(2 * height, 2 * width, rng).permute(1, 2, 0))
        for _ in range(num_clips)
    ]
    return _with_stills(clips, pictures, num_clips)


def degrade(video: Tensor, downscale: int, stage2: Stage2Config | None = None) -> Tensor:
    """What Stage II is given for a clip, made of the clip's own small version.

    Args:
        video: ``[B, 3, T, H, W]`` in [-1, 1]; frame 0 is the photo.
        downscale: Stage I's; the small clip is rounded to 8 bits as a motion reference is.
        stage2: Says how the reference is made, see ``ReferenceFrames``.

    Returns:
        ``[B, 3, T, H, W]``; not clamped, as in the pipeline.
    """
    height, width = video.shape[-2:]
    small = resize_video(video, height // downscale, width // downscale, "area")
    references = [
        make_reference(MotionReference(video_to_frames(own[None])), clip[None, :, :1], stage2)
        for own, clip in zip(small, video, strict=True)
    ]
    return torch.cat(references)


def _with_stills(clips: Sequence[Frames], pictures: Sequence[Frames], num_photos: int) -> Material:
    """Material whose stills are the first ``num_photos`` pictures and frames of the clips."""
    size = clips[0].shape[1:3]
    photos = [_fit(picture, size) for picture in pictures[:num_photos]]
    from_clips = [clip[i].copy() for clip in clips for i in range(0, len(clip), STILL_INTERVAL)]
    return Material(tuple(clips), (*photos, *from_clips), tuple(pictures))


def _fit(frame: Frames, size: tuple[int, int]) -> Frames:
    return np.asarray(fit_image(Image.fromarray(frame), *size).image)


def _to_frames(values: Tensor) -> Frames:
    frames: Frames = ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    return np.ascontiguousarray(frames)


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
