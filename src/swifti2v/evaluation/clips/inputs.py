"""Inputs of an evaluation: clips and photos, checked before any measuring starts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swifti2v.errors import MediaError, ShapeError
from swifti2v.media import fit_image, iter_frames, load_image, probe_clip
from swifti2v.media.flow import MIN_SIDE
from swifti2v.media.images import Fit
from swifti2v.shapes import TIME_FACTOR, latent_frames, pixel_frames

SAME_ASPECT = 0.01
"""Widths over heights that differ by less than this part are taken for equal."""
SAME_FPS = 0.01
"""Frames a second that differ by less are equal (29.97 is not 30)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFile:
    """A checked video file: iterating reads it from the start, a frame ``[1, H, W, 3]`` a time."""

    path: Path
    """The file."""
    resample_fps: float | None
    """Rate to which the clip is resampled, on request or because its own varies; None keeps its
    frames."""
    fps: float
    """Frames a second as read."""
    num_frames: int
    """Frames as read, counted."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    notes: tuple[str, ...] = ()
    """Changes made to the clip while it is read."""

    def __iter__(self) -> Iterator[npt.NDArray[np.uint8]]:
        for frame in iter_frames(self.path, self.resample_fps):
            yield frame[None]

    @property
    def size(self) -> str:
        """Width and height, for messages."""
        return f"{self.width}x{self.height}"


def check_clip(path: Path, fps: float | None = None) -> ClipFile:
    """Decode a whole clip once to check that it can be measured.

    Without a rate to resample to it keeps its own, or the constant rate of a varying one.

    Raises:
        MediaError: It cannot be read to its end, is HDR or has fewer than two frames.
        ShapeError: Its sides are too small for optical flow.
    """
    info = probe_clip(path)
    if min(info.height, info.width) < MIN_SIDE:
        raise ShapeError(
            f"clip {path} is {info.width}x{info.height}; sides of at least {MIN_SIDE} pixels are "
            "needed to measure motion"
        )
    num_frames = sum(1 for _ in iter_frames(path, fps))
    if fps is None and num_frames < info.num_frames:
        raise MediaError(
            f"clip {path} holds {info.num_frames} frames but gives only {num_frames}; it is cut "
            "off or damaged: export or copy it again"
        )
    return ClipFile(
        path=path,
        resample_fps=fps or (info.fps if info.is_resampled else None),
        fps=fps or info.fps,
        num_frames=num_frames,
        height=info.height,
        width=info.width,
        notes=info.notes,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoFile:
    """The photo of a clip, and the way to fit it to the clip's size."""

    path: Path
    """An image file."""
    fit: Fit | None
    """Crop or pad; None refuses a photo of another aspect than the clip's."""
    background: tuple[int, int, int] | None = None
    """Colour behind a see-through photo."""

    def load(self, height: int, width: int) -> tuple[npt.NDArray[np.uint8], str | None]:
        """Load the photo ``[height, width, 3]`` with a note on the fitting.

        Raises:
            MediaError: It cannot be read, or has another aspect and ``fit`` is None.
        """
        image = load_image(self.path, background=self.background)
        aspect = image.width / image.height / (width / height)
        if self.fit is None and abs(aspect - 1) > SAME_ASPECT:
            raise MediaError(
                f"photo {self.path} is {image.width}x{image.height}, the clip {width}x{height}: "
                "different aspects, and the clip does not say how the photo was fitted; give "
                "--fit crop or --fit pad"
            )
        fitted = fit_image(image, height, width, self.fit or "crop")
        return np.asarray(fitted.image), fitted.note


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipInputs:
    """A clip and the files it is compared with."""

    name: str
    """Name in tables."""
    video: ClipFile
    """The clip."""
    photo: PhotoFile | None = None
    """Photo that frame 0 has to show."""
    reference: ClipFile | None = None
    """The true clip, of the same size and length."""
    motion_reference: ClipFile | None = None
    """Stage I's clip, of the same length."""
    segment_starts: tuple[int, ...] | None = None
    """Latent frames at which segments start; None if unknown."""
    segments_source: str = "no segment starts were given"
    """Source of ``segment_starts``, or the reason why there are none."""
    notes: tuple[str, ...] = ()
    """Notes for the reader of the result."""

    def check(self) -> None:
        """Check that the clips fit together; ``PhotoFile.load`` checks the photo.

        Raises:
            ShapeError: Sizes or frame counts differ.
            MediaError: Rates differ.
        """
        if self.reference is not None:
            _require_same_times(self.video, self.reference, "reference")
            if (self.reference.height, self.reference.width) != (
                self.video.height,
                self.video.width,
            ):
                raise ShapeError(
                    f"clip {self.video.path} is {self.video.size}, reference "
                    f"{self.reference.path} is {self.reference.size}; scale one to the other first"
                )
        if self.motion_reference is not None:
            _require_same_times(self.video, self.motion_reference, "motion reference")
            _require_smaller(self.video, self.motion_reference)


def _require_same_times(video: ClipFile, other: ClipFile, role: str) -> None:
    if video.num_frames != other.num_frames:
        raise ShapeError(
            f"clip {video.path} has {video.num_frames} frames, {role} {other.path} has "
            f"{other.num_frames}; cut them to the same frames first"
        )
    if abs(video.fps - other.fps) > SAME_FPS:
        raise MediaError(
            f"clip {video.path} plays at {video.fps:g} fps, {role} {other.path} at "
            f"{other.fps:g}; give --fps to resample both"
        )


def _require_smaller(video: ClipFile, motion: ClipFile) -> None:
    aspect = motion.width / motion.height / (video.width / video.height)
    if motion.height > video.height or motion.width > video.width:
        problem = "larger than the clip"
    elif abs(aspect - 1) > SAME_ASPECT:
        problem = "of another aspect"
    else:
        return
    raise ShapeError(
        f"motion reference {motion.path} is {motion.size}, {problem} ({video.size}); give "
        "Stage I's own clip"
    )


def latent_starts(pixel_starts: Sequence[int], num_frames: int) -> tuple[int, ...]:
    """Latent frames of segments that start at pixel frames such as 1, 13, 25; 1 may be left out.

    Raises:
        ShapeError: A start is not ``4k + 1`` or outside the clip.
    """
    for start in pixel_starts:
        if start < 1 or (start - 1) % TIME_FACTOR:
            lower = max(1, (start - 1) // TIME_FACTOR * TIME_FACTOR + 1)
            raise ShapeError(
                f"segment start {start} does not fit: segments start at pixel frames "
                f"{TIME_FACTOR}k + 1; the nearest are {lower} and {lower + TIME_FACTOR}"
            )
        if start >= num_frames:
            raise ShapeError(f"segment start {start} is outside the clip of {num_frames} frames")
    return tuple(sorted({latent_frames(start) for start in pixel_starts}))


def pixel_starts(latent: Sequence[int]) -> list[int]:
    """First pixel frames of latent frames (see ``latent_starts``)."""
    return [pixel_frames(index).start for index in latent]


def describe_inputs(inputs: ClipInputs) -> dict[str, Any]:
    """Plain values for a result file."""
    video = inputs.video
    others = {"image": inputs.photo, "reference": inputs.reference}
    others["motion_reference"] = inputs.motion_reference
    return {
        "name": inputs.name,
        "video": str(video.path),
        **{key: None if other is None else str(other.path) for key, other in others.items()},
        "num_frames": video.num_frames,
        "width": video.width,
        "height": video.height,
        "fps": video.fps,
        "segment_starts": None
        if inputs.segment_starts is None
        else pixel_starts(inputs.segment_starts),
        "segments_source": inputs.segments_source,
    }
