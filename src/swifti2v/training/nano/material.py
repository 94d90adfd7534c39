"""Training material: clips and photos of a folder or procedural ones, in memory."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from swifti2v.errors import InputError
from swifti2v.media import Frames, fit_image, iter_frames, load_image, probe_clip, video_to_frames
from swifti2v.pipelines.camera_moves import MOVES
from swifti2v.pipelines.course import draw_course
from swifti2v.training.data.camera_motion import Scene, draw_view, render_move
from swifti2v.training.data.procedural import draw_picture
from swifti2v.training.data.readers import CLIP_SUFFIXES, PHOTO_SUFFIXES

logger = logging.getLogger(__name__)

GREY = (128, 128, 128)
"""Colour behind see-through pictures."""
STILL_INTERVAL = 20
"""Distance in frames between those of a clip that also serve as stills."""
PICTURE_INTERVAL = 30
"""Distance in frames between those of a clip that also serve as pictures."""


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

    Files of other kinds are passed over. Names without suffix in ``held_out`` are left out, for
    testing later.

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
    """Material without any file: pictures of noise and shapes, and as many camera moves over them."""
    rng = np.random.default_rng(seed)
    clips = []
    for index in range(num_clips):
        picture = _draw_frame(2 * height, 2 * width, rng)
        move = list(MOVES.values())[index % len(MOVES)]
        view = draw_view((2 * height, 2 * width), (height, width), rng)
        course = draw_course(num_frames, int(rng.integers(2**62)))
        video, _ = render_move(Scene(picture, None, None), view, move, course, (height, width))
        clips.append(video_to_frames(video[None]))
    pictures = [_draw_frame(2 * height, 2 * width, rng) for _ in range(num_clips)]
    return _with_stills(clips, pictures, num_clips)


def _with_stills(clips: Sequence[Frames], pictures: Sequence[Frames], num_photos: int) -> Material:
    """Material whose stills are the first ``num_photos`` pictures and frames of the clips."""
    size = clips[0].shape[1:3]
    photos = [_fit(picture, size) for picture in pictures[:num_photos]]
    from_clips = [clip[i].copy() for clip in clips for i in range(0, len(clip), STILL_INTERVAL)]
    return Material(tuple(clips), (*photos, *from_clips), tuple(pictures))


def _fit(frame: Frames, size: tuple[int, int]) -> Frames:
    return np.asarray(fit_image(Image.fromarray(frame), *size).image)


def _draw_frame(height: int, width: int, rng: np.random.Generator) -> Frames:
    frame: Frames = video_to_frames(draw_picture(height, width, rng)[None, :, None])[0]
    return frame
