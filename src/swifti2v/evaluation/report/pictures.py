"""Pictures of a clip in a report: a contact sheet, a slice through time, and spectra."""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from swifti2v.evaluation.clips.inputs import ClipInputs
from swifti2v.evaluation.metrics.frames import iterate_frames
from swifti2v.evaluation.metrics.spectrum import radial_spectrum

NUM_THUMBNAILS = 8
THUMBNAIL_WIDTH = 320
SLICE_HEIGHT, SLICE_FRAME_WIDTH = 200, 12
"""Pixels of the slice: its height, and the width of one frame in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipPictures:
    """Pictures of one clip, compressed."""

    thumbnails: dict[int, bytes]
    """JPEG by frame."""
    time_slice: bytes
    """PNG: the middle column of every frame, from left to right."""
    spectra: dict[str, list[float]]
    """Energy on rings of equal frequency, by picture."""


def picture_clip(inputs: ClipInputs) -> ClipPictures:
    """Read a clip once more for its pictures; one frame is in memory at a time."""
    video = inputs.video
    num_shown = min(NUM_THUMBNAILS, video.num_frames)
    shown = set(np.linspace(0, video.num_frames - 1, num_shown).round().astype(int).tolist())
    thumbnails, columns, spectra = {}, [], {}
    for index, frame in enumerate(iterate_frames(video)):
        columns.append(np.array(frame[:, frame.shape[1] // 2]))
        if index in shown:
            thumbnails[index] = _thumbnail(np.asarray(frame))
        if index in (0, video.num_frames // 2, video.num_frames - 1):
            spectra[f"frame {index}"] = radial_spectrum(frame).tolist()
    if inputs.photo is not None:
        photo, _ = inputs.photo.load(video.height, video.width)
        spectra = {"photo": radial_spectrum(photo).tolist(), **spectra}
    return ClipPictures(
        thumbnails=thumbnails, time_slice=_time_slice(np.stack(columns, axis=1)), spectra=spectra
    )


def _thumbnail(frame: npt.NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(frame)
    if image.width > THUMBNAIL_WIDTH:
        height = max(1, round(image.height * THUMBNAIL_WIDTH / image.width))
        image = image.resize((THUMBNAIL_WIDTH, height), Image.Resampling.LANCZOS)
    return _compress(image, "JPEG")


def _time_slice(columns: npt.NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(columns)  # [H, T, 3]
    height = min(SLICE_HEIGHT, image.height)
    image = image.resize((image.width, height), Image.Resampling.BOX)
    size = (image.width * SLICE_FRAME_WIDTH, height)
    return _compress(image.resize(size, Image.Resampling.NEAREST), "PNG")


def _compress(image: Image.Image, kind: str) -> bytes:
    data = io.BytesIO()
    image.save(data, format=kind)
    return data.getvalue()
