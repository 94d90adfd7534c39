"""Clips made without a model, which every result has to beat."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from swifti2v.config import Stage2Config
from swifti2v.errors import ShapeError
from swifti2v.media import frames_to_video, video_to_frames
from swifti2v.media.flow import Flow, optical_flow, warp
from swifti2v.pipelines.transition import MotionReference, ReferenceFrames

Uint8: TypeAlias = npt.NDArray[np.uint8]


def lanczos_baseline(low_res_frames: Uint8, height: int, width: int) -> Uint8:
    """Enlarge a low-resolution clip ``[T, h, w, 3]`` uint8 frame by frame, without the photo.

    Raises:
        ShapeError: The clip is not ``[T, h, w, 3]`` uint8 with at least one frame.
    """
    _require_frames(low_res_frames)
    return _collect(_enlarge(low_res_frames, height, width), len(low_res_frames))


def flow_warp_baseline(low_res_frames: Uint8, photo: Uint8) -> Uint8:
    """Move the photo along the motion of the low-resolution clip, both uint8; frame 0 is the photo.

    Flow from each frame straight back to frame 0 is measured on the enlarged clip (twice to four
    times as accurate as on the small frames, and better than summing flow from frame to frame), and
    looks up the photo. Places that the photo does not show are smeared.

    Raises:
        ShapeError: ``low_res_frames`` or ``photo`` has the wrong shape or type.
    """
    _require_photo(low_res_frames, photo)
    frames = (warp(photo, flow) for _, flow in _enlarged_with_flow(low_res_frames, photo))
    return _collect(frames, len(low_res_frames), photo)


def copy_detail_baseline(low_res_frames: Uint8, photo: Uint8) -> Uint8:
    """Enlarge the clip and add the photo's fine detail in place, without motion.

    The detail is the photo minus the enlarged frame 0. Right where nothing moves, a fixed
    pattern over the picture elsewhere. Arguments, result and errors as in
    ``flow_warp_baseline``.
    """
    _require_photo(low_res_frames, photo)
    enlarged = _enlarge(low_res_frames, *photo.shape[:2])
    detail = photo.astype(np.float32) - next(enlarged)
    return _collect((_round(frame + detail) for frame in enlarged), len(low_res_frames), photo)


def warp_detail_baseline(low_res_frames: Uint8, photo: Uint8) -> Uint8:
    """Enlarge the clip and add the photo's fine detail, moved along the motion.

    As ``copy_detail_baseline`` with the flow of ``flow_warp_baseline``: where the flow fails,
    the low frequencies stay right.
    """
    _require_photo(low_res_frames, photo)
    pairs = _enlarged_with_flow(low_res_frames, photo)
    detail = photo.astype(np.float32) - next(_enlarge(low_res_frames[:1], *photo.shape[:2]))
    frames = (_round(frame + warp(detail, flow)) for frame, flow in pairs)
    return _collect(frames, len(low_res_frames), photo)


def carried_baseline(low_res_frames: Uint8, photo: Uint8) -> Uint8:
    """The reference that Stage II is given with ``reference_detail`` carried, as a clip.

    As ``warp_detail_baseline``, but the detail is the moved photo's, and it is added only where the
    motion can be trusted. Arguments, result and errors as in ``flow_warp_baseline``.
    """
    _require_photo(low_res_frames, photo)
    config = Stage2Config(reference_detail="carried")
    full = frames_to_video(photo[None])
    with closing(ReferenceFrames(MotionReference(low_res_frames), full, config)) as reference:
        frames = (
            video_to_frames(reference.read(index, index + 1))[0]
            for index in range(1, len(low_res_frames))
        )
        return _collect(frames, len(low_res_frames), photo)


def _enlarge(frames: Uint8, height: int, width: int) -> Iterator[Uint8]:
    for frame in frames:
        resized = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
        yield np.asarray(resized)


def _enlarged_with_flow(frames: Uint8, photo: Uint8) -> Iterator[tuple[Uint8, Flow]]:
    """Enlarged frames 1 to T-1, each with its flow to frame 0."""
    enlarged = _enlarge(frames, *photo.shape[:2])
    first = next(enlarged)
    for frame in enlarged:
        yield frame, optical_flow(frame, first)


def _round(frame: npt.NDArray[Any]) -> Uint8:
    rounded: Uint8 = np.rint(frame).clip(0, 255).astype(np.uint8)
    return rounded


def _collect(frames: Iterator[Uint8], num_frames: int, photo: Uint8 | None = None) -> Uint8:
    """Frames written into one array as they come, after the photo if there is one."""
    first = next(frames) if photo is None else photo
    result = np.empty((num_frames, *first.shape), np.uint8)
    result[0] = first
    for index, frame in enumerate(frames, start=1):
        result[index] = frame
    return result


def _require_frames(frames: Uint8) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ShapeError(
            f"the low-resolution clip is {frames.dtype} {frames.shape}; "
            "it must be uint8 [T, h, w, 3] with at least one frame"
        )


def _require_photo(frames: Uint8, photo: Uint8) -> None:
    _require_frames(frames)
    if photo.ndim != 3 or photo.shape[-1] != 3 or photo.dtype != np.uint8:
        raise ShapeError(f"the photo is {photo.dtype} {photo.shape}; it must be uint8 [H, W, 3]")
