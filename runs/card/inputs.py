"""Held-out clips and photos of a model card, as they are measured."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import typer
from PIL import Image

from swifti2v.config import GenerationConfig
from swifti2v.errors import InputError
from swifti2v.media import Frames, fit_image, iter_frames, load_image, probe_clip

MAX_FPS = 16.0
"""Faster clips are resampled to this rate; slower ones keep theirs, so no frame is shown twice."""


def say(text: str) -> None:
    """A line of progress."""
    typer.echo(text, err=True)


def find_held_out(names: Sequence[str], clips: Path, photos: Path) -> tuple[list[Path], list[Path]]:
    """Files of the clips and of the photos, in the order of the names.

    Raises:
        InputError: A name is not exactly one file, or there is no clip or no photo.
    """
    found: tuple[list[Path], list[Path]] = ([], [])
    for name in names:
        matches = [
            (paths, file)
            for paths, folder in zip(found, (clips, photos), strict=True)
            if folder.is_dir()
            for file in sorted(folder.iterdir())
            if file.is_file() and name in (file.name, file.stem)
        ]
        if len(matches) != 1:
            files = ", ".join(str(file) for _, file in matches) or "no file"
            raise InputError(
                f"--held-out {name} is {files} in {clips} and {photos}; name exactly one, "
                "with its suffix if need be"
            )
        paths, file = matches[0]
        paths.append(file)
    stems = [file.stem for files in found for file in files]
    if repeated := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise InputError(f"--held-out: {', '.join(repeated)} is there twice; give each file once")
    if not found[0]:
        raise InputError(f"--held-out names no clip in {clips}; Stage II is measured on clips")
    if not found[1]:
        raise InputError(f"--held-out names no photo in {photos}; the camera is measured on photos")
    return found


def find_moving(names: Sequence[str], clips: Sequence[Path]) -> list[str]:
    """Names without suffix of the clips that ``--moving`` gives.

    Raises:
        InputError: A name is not that of a held-out clip.
    """
    by_name = {key: path.stem for path in clips for key in (path.name, path.stem)}
    if unknown := [name for name in names if name not in by_name]:
        raise InputError(
            f"--moving {unknown[0]} is not a held-out clip; give it with --held-out as well, "
            f"or one of {', '.join(path.stem for path in clips)}"
        )
    return [by_name[name] for name in names]


def read_clip(path: Path, config: GenerationConfig) -> Frames:
    """The first frames, at most at ``MAX_FPS``, scaled to cover the size and cropped."""
    info = probe_clip(path)
    for note in info.notes:
        say(f"note: {path}: {note}")
    fps = MAX_FPS if info.fps > MAX_FPS else None
    # One more than is needed, so that a clip that is too short is refused.
    frames = iter_frames(path, fps, max_frames=config.num_frames + 1, min_frames=config.num_frames)
    fitted = [
        np.asarray(fit_image(Image.fromarray(frame), config.height, config.width).image)
        for frame in frames
    ]
    return np.stack(fitted[: config.num_frames])


def read_photo(path: Path, config: GenerationConfig) -> Image.Image:
    """Read a photo and fit it to the size, as ``generate`` does."""
    fitted = fit_image(load_image(path), config.height, config.width)
    if fitted.note:
        say(f"note: {path}: {fitted.note}")
    return fitted.image
