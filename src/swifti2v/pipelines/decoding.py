"""Latents of finished segments to frames, one segment after the other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from swifti2v.media import Frames, video_to_frames
from swifti2v.models.vae.light_decoder import TinyStream
from swifti2v.models.vae.streaming import StreamingDecoder
from swifti2v.pipelines.progress import Stopwatch
from swifti2v.segments import Segment


@dataclass(frozen=True, slots=True)
class SegmentLatents:
    """A segment as Stage II finishes it."""

    segment: Segment
    latents: Tensor
    """``[1, C, len(target), h, w]`` float32."""


@dataclass(frozen=True, slots=True)
class SegmentOutput:
    """One finished piece of the video."""

    index: int
    """Place in the clip, from 0."""
    frames: Frames
    """``[T, H, W, 3]`` uint8; the first segment brings the photo's own frame with it."""
    latent_range: tuple[int, int]
    """Latent frames generated, half open."""
    seconds: float
    """Seconds from the end of the segment before (or the start of the run) to the end of this
    one."""
    latents: Tensor
    """``[1, C, F, h, w]`` float32, for saving and resuming."""


class SegmentDecoder:
    """A causal decoder that takes the segments of one clip in order.

    Args:
        stream: The VAE's decoder or a light one, at the start of a clip.
        stopwatch: Gets the seconds of ``decode``, and tells when a segment was finished.
    """

    def __init__(self, stream: StreamingDecoder | TinyStream, stopwatch: Stopwatch) -> None:
        self._stream, self._stopwatch = stream, stopwatch
        self._finished_at = 0.0

    def decode(self, finished: SegmentLatents, anchor: Tensor | None) -> SegmentOutput:
        """Frames of the next segment.

        Args:
            finished: The segment.
            anchor: ``[1, C, 1, h, w]``, latents of a frame before it that no segment generates: the
                photo's, with the first segment.
        """
        segment, latents = finished.segment, finished.latents
        with self._stopwatch.measure("decode"):
            pieces = latents if anchor is None else torch.cat([anchor, latents], dim=2)
            frames = video_to_frames(self._stream.decode(pieces))
        now = self._stopwatch.total()
        seconds, self._finished_at = now - self._finished_at, now
        return SegmentOutput(segment.index, frames, segment.latent_range, seconds, latents)
