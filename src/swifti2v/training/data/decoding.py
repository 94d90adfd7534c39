"""Decode a sample into frames for training: resampled, cut out in time, fitted to a bucket."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from swifti2v.errors import MediaError
from swifti2v.media import Frames, iter_frames, load_image
from swifti2v.shapes import PixelShape
from swifti2v.training.data.buckets import MediaFacts, format_bucket, plan_usable, probe
from swifti2v.training.data.samples import MediaFile, Sample, local_media


def draw_first(
    sample: Sample, bucket: PixelShape, fps: float, rng: np.random.Generator, facts: MediaFacts
) -> int:
    """Draw the frame at which ``decode_clip`` begins, counted at ``fps``; 0 for an image.

    Raises:
        MediaError: The clip is shorter than the bucket.
    """
    if sample.kind == "image":
        return 0
    usable = plan_usable(sample, facts, fps)
    _require_length(len(usable), bucket)
    return usable.start + int(rng.integers(len(usable) - bucket.num_frames + 1))


def decode_clip(
    sample: Sample,
    bucket: PixelShape,
    fps: float,
    rng: np.random.Generator,
    *,
    facts: MediaFacts | None = None,
    num_frames: int | None = None,
) -> Frames:
    """Read a piece of a sample that fills its bucket, beginning at a random frame.

    The clip is resampled to ``fps`` by its frames' own times (the last frame that has started is
    shown); frames are scaled down to cover the bucket and cropped at the centre. ``rng`` is called
    once for a clip, never for an image. Facts are those of ``probe``, looked up by default.
    ``num_frames`` takes that many of the bucket's frames, by default all.

    Returns:
        ``[T, H, W, 3]`` uint8 of the bucket's shape, or its first ``num_frames``.

    Raises:
        MediaError: The file is missing or damaged (which may show only in its midst), or smaller or
            shorter than the bucket, or image and clip are mixed up; the message names the sample.
    """
    if (sample.kind == "image") != (bucket.num_frames == 1):
        kind = "picture" if sample.kind == "image" else "video"
        raise MediaError(
            f"sample {sample.id} is a {kind}; bucket {format_bucket(bucket)} is not for it"
        )
    if sample.kind == "image":
        with local_media(sample) as path:
            return np.stack([_fit(np.asarray(load_image(path)), bucket)])
    return _decode_piece(sample, bucket, fps, rng, facts or probe(sample), num_frames)[0]


def decode_pair(
    sample: Sample,
    bucket: PixelShape,
    fps: float,
    rng: np.random.Generator,
    *,
    facts: MediaFacts | None = None,
    num_frames: int | None = None,
) -> tuple[Frames, Frames]:
    """Read the same piece of a stage-transition sample and of its reference.

    The reference's first frame belongs to the sample's ``start``. Arguments and errors are those
    of ``decode_clip``.

    Returns:
        ``[T, H, W, 3]`` of the bucket's shape, and ``[T, h, w, 3]`` of the reference's own size.

    Raises:
        MediaError: Also if the sample has no reference, or that cannot be read.
    """
    if sample.reference is None:
        raise MediaError(f"sample {sample.id} has no reference; add one to the manifest")
    frames, offset = _decode_piece(sample, bucket, fps, rng, facts or probe(sample), num_frames)
    reference = Sample(
        id=f"{sample.id} (reference)",
        media=MediaFile(sample.reference),
        kind="video",
        prompt=sample.prompt,
    )
    with local_media(reference) as path:
        return frames, _read(path, fps, offset, bucket, np.asarray, num_frames)


def _decode_piece(
    sample: Sample,
    bucket: PixelShape,
    fps: float,
    rng: np.random.Generator,
    facts: MediaFacts,
    num_frames: int | None,
) -> tuple[Frames, int]:
    """The piece, and how many frames after the sample's start it begins."""
    with local_media(sample) as path:
        first = draw_first(sample, bucket, fps, rng, facts)
        frames = _read(path, fps, first, bucket, partial(_fit, bucket=bucket), num_frames)
    return frames, first - plan_usable(sample, facts, fps).start


def _read(
    path: Path,
    fps: float,
    first: int,
    bucket: PixelShape,
    fit: Callable[[Frames], Frames],
    num_frames: int | None,
) -> Frames:
    """Read the bucket's frames, or some of them, from ``first`` on."""
    number = num_frames or bucket.num_frames
    shown = iter_frames(path, fps, first=first, max_frames=number, min_frames=1)
    frames: Frames | None = None
    num_read = 0
    for frame in map(fit, shown):
        frames = np.empty((number, *frame.shape), np.uint8) if frames is None else frames
        frames[num_read] = frame
        num_read += 1
    if frames is None or num_read < number:
        _require_length(num_read, bucket)
    assert frames is not None
    return frames


def _require_length(num_frames: int, bucket: PixelShape) -> None:
    if num_frames < bucket.num_frames:
        raise MediaError(
            f"it has {num_frames} frames to use; bucket {format_bucket(bucket)} needs "
            f"{bucket.num_frames}"
        )


def _fit(frame: Frames, bucket: PixelShape) -> Frames:
    """Scale a frame down to cover the bucket, cut to whole pixels at the centre.

    PyTorch's kernel for 8 bits gives what Pillow's bicubic one does in a fifth of the time.
    """
    height, width, _ = frame.shape
    size = (bucket.height, bucket.width)
    if (height, width) == size:
        return frame
    if height < bucket.height or width < bucket.width:
        raise MediaError(
            f"it is {width}x{height} px; bucket {format_bucket(bucket)} would enlarge it"
        )
    shrinking = min(height / bucket.height, width / bucket.width)
    rows, columns = (round(side * shrinking) for side in size)
    top, left = (height - rows) // 2, (width - columns) // 2
    part = np.require(frame[top : top + rows, left : left + columns], requirements=["C", "W"])
    pixels = torch.from_numpy(part).permute(2, 0, 1)[None]
    fitted = F.interpolate(pixels, size, mode="bicubic", antialias=True)[0]
    shown: Frames = fitted.permute(1, 2, 0).numpy()
    return shown
