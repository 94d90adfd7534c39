"""Outputs of a run: the video and the contact sheet."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from swifti2v.errors import InputError
from swifti2v.jobs.paths import require_contact_sheet
from swifti2v.jobs.request import ClipRequest
from swifti2v.jobs.settings import RunSettings, VideoSettings
from swifti2v.media import Frames, contact_sheet, open_writer
from swifti2v.media.encoder import EncodingOptions
from swifti2v.media.pixels import Color
from swifti2v.media.sound import Sound, find_sound, require_sound_fits
from swifti2v.media.writer import FrameWriter, is_png_target

SHEET_FRAMES = 8
"""Frames on a contact sheet."""


def require_writable_outputs(
    request: ClipRequest, video: VideoSettings, inputs: Sequence[Path | None]
) -> None:
    """Refuse outputs that cannot be written or would replace an input.

    Raises:
        SwiftI2VError: An output is refused.
    """
    outputs = [request.output, *([request.contact_sheet] if request.contact_sheet else [])]
    # Writes nothing; the real size, always even, is known once the model is.
    open_writer(request.output, height=2, width=2, **_encoding(video))
    if request.contact_sheet is not None:
        require_contact_sheet(request.contact_sheet)
    read = {path.resolve() for path in inputs if path is not None}
    if twice := [str(path) for path in outputs if path.resolve() in read]:
        raise InputError(f"{twice[0]} is an input of this run; choose another output")


def find_kept_sound(
    request: ClipRequest, video: VideoSettings, clip: Path, color: Color | None
) -> tuple[Sound | None, list[str]]:
    """Find the sound of the user's clip that the video keeps, and notes for the user.

    Raises:
        MediaError: The video cannot hold it.
    """
    sound = None if video.no_audio else find_sound(clip, color)
    if sound is None:
        return None, []
    if is_png_target(request.output, video.codec):
        return None, [f"{clip}: its sound is left out, as PNGs hold none"]
    require_sound_fits(request.output.suffix, sound)
    return sound, []


def make_writer(
    path: Path, settings: RunSettings, sound: Sound | None, *, metadata: bool
) -> FrameWriter:
    """Writer of the video, which stores its settings if ``metadata`` is set.

    It makes the file with the first frames it is given.

    Raises:
        MediaError: The file cannot hold this compression or size.
    """
    config = settings.config
    return open_writer(
        path,
        height=config.height,
        width=config.width,
        fps=config.fps,
        metadata={"comment": settings.to_json()} if metadata else None,
        sound=sound,
        **_encoding(settings.video),
    )


def _encoding(video: VideoSettings) -> EncodingOptions:
    encoding: EncodingOptions = {"codec": video.codec, "ten_bit": video.ten_bit}
    if video.crf is not None:
        encoding["crf"] = video.crf
    return encoding


class ContactSheet:
    """Evenly spaced frames, picked while the clip is made; the others are not kept."""

    def __init__(self, num_frames: int) -> None:
        num_shown = min(num_frames, SHEET_FRAMES)
        self._places = set(np.linspace(0, num_frames - 1, num_shown).round().astype(int).tolist())
        self._picked: list[Frames] = []
        self._num_seen = 0

    def add(self, frames: Frames) -> None:
        """Take the next frames of the clip."""
        self._picked += [frame.copy() for frame in self._pick(frames)]
        self._num_seen += len(frames)

    def save(self, path: Path) -> None:
        """Write the PNG."""
        contact_sheet(np.stack(self._picked), path)

    def _pick(self, frames: Frames) -> Iterator[Frames]:
        return (f for place, f in enumerate(frames, self._num_seen) if place in self._places)
