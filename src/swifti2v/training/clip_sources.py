"""A manifest's clips as Stage I and Stage II take them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from swifti2v.errors import ConfigError, ShapeError
from swifti2v.media import frames_to_video, resize_video
from swifti2v.models.codec import BlockCodec
from swifti2v.models.frame_codec import VideoVAE
from swifti2v.segments import Segment
from swifti2v.training.data import Frames, degrade, pixel_frames
from swifti2v.training.draws import Draw
from swifti2v.training.manifest_clips import LoadedClip, ManifestClips
from swifti2v.training.stage1_sources import Stage1Batch
from swifti2v.training.stage2_sources import Stage2Batch


def cut_square(frames: Frames, side: int | None, step: int, rng: np.random.Generator) -> Tensor:
    """A random square of a clip.

    Args:
        frames: ``[T, H, W, 3]``.
        side: In pixels; None takes the whole frames.
        step: Its corner lies on multiples of this.
        rng: Source of randomness.

    Returns:
        ``[1, 3, T, side, side]`` in [-1, 1].
    """
    if side is None:
        return frames_to_video(frames)
    top, left = (
        step * int(rng.integers((length - side) // step + 1)) for length in frames.shape[1:3]
    )
    return frames_to_video(frames[:, top : top + side, left : left + side])


class Stage1Clips:
    """Whole clips at Stage I's size.

    Args:
        clips: Of a manifest; their buckets have Stage I's size.
        time_factor: Pixel frames of a latent frame.
    """

    def __init__(self, clips: ManifestClips, time_factor: int) -> None:
        self.clips, self.time_factor = clips, time_factor

    def load(self, draw: Draw) -> Stage1Batch:
        """See ``Stage1Source``."""
        loaded, num_replaced = self.clips.load(draw)
        video = torch.cat([frames_to_video(clip.frames) for clip in loaded])
        num_latent_frames = (video.shape[2] - 1) // self.time_factor + 1
        return Stage1Batch(
            ids=tuple(clip.id for clip in loaded),
            num_replaced=num_replaced,
            num_latent_frames=num_latent_frames,
            latent_frames=tuple(range(num_latent_frames)),
            video=video,
            prompts=tuple(clip.prompt for clip in loaded),
        )


class Stage2Clips:
    """Windows of clips at the output size, with their small versions or Stage I's.

    Args:
        clips: Of a manifest; their buckets have the output size.
        vae: A causal one is given all frames up to the window's end.
        downscale: Stage I's.
        crop: Side of a random square that is cut out; None takes whole frames.
    """

    def __init__(
        self, clips: ManifestClips, vae: VideoVAE, downscale: int, crop: int | None
    ) -> None:
        self.clips, self.downscale, self.crop = clips, downscale, crop
        self.is_causal = not isinstance(vae, BlockCodec)
        for bucket in clips.plan.shares:
            if crop is not None and crop > min(bucket.height, bucket.width):
                raise ConfigError(
                    f"crop {crop} is larger than the bucket {bucket.width}x{bucket.height}; take a "
                    "smaller one"
                )

    def num_frames(self, draw: Draw, rng: np.random.Generator) -> int:  # noqa: ARG002
        """See ``Stage2Source``."""
        return self.clips.bucket(draw.step).num_frames

    def load(self, draw: Draw, segment: Segment, num_latent_frames: int) -> Stage2Batch:
        """See ``Stage2Source``."""
        del num_latent_frames  # that of the bucket
        loaded, num_replaced = self.clips.load(draw)
        covered = tuple(range(segment.window[-1] + 1)) if self.is_causal else segment.window
        frames = [pixel for latent in covered for pixel in pixel_frames(latent)]
        pairs = [
            self._cut(clip, frames, rng) for clip, rng in zip(loaded, draw.samples(), strict=True)
        ]
        return Stage2Batch(
            ids=tuple(clip.id for clip in loaded),
            num_replaced=num_replaced,
            segment=segment,
            latent_frames=covered,
            video=torch.cat([video for video, _ in pairs]),
            reference=torch.cat([reference for _, reference in pairs]),
            prompts=tuple(clip.prompt for clip in loaded),
        )

    def _cut(
        self, clip: LoadedClip, frames: Sequence[int], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Video and reference ``[1, 3, T, H, W]``."""
        height, width = clip.frames.shape[1:3]
        top, left, low = 0, 0, self.downscale
        if self.crop is not None:
            top, left = (
                low * int(rng.integers((side - self.crop) // low + 1)) for side in (height, width)
            )
            height = width = self.crop
        video = frames_to_video(clip.frames[frames, top : top + height, left : left + width])
        if clip.reference is None:
            return video, degrade(video, low)
        if clip.reference.shape[1] * low != clip.frames.shape[1]:
            raise ShapeError(
                f"the reference of {clip.id} is {clip.reference.shape[2]}x{clip.reference.shape[1]}; "
                f"make it again for clips of {clip.frames.shape[2]}x{clip.frames.shape[1]}"
            )
        rows = slice(top // low, (top + height) // low)
        columns = slice(left // low, (left + width) // low)
        small = frames_to_video(clip.reference[frames, rows, columns])
        reference = resize_video(small, height, width, "lanczos")
        reference[:, :, 0] = video[:, :, 0]
        return video, reference
