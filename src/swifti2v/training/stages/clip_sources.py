"""A manifest's clips as Stage I and Stage II take them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from swifti2v.config import Stage2Config
from swifti2v.errors import ConfigError
from swifti2v.media import frames_to_video
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.pipelines.course import even_course
from swifti2v.segments import Segment
from swifti2v.shapes import pixel_frames
from swifti2v.training.data.clips import LoadedClip, ManifestClips, Piece
from swifti2v.training.data.crops import cut_pair
from swifti2v.training.engine.draws import Draw
from swifti2v.training.stages.batches import Stage1Batch, Stage2Batch


class Stage1Clips:
    """Clips at Stage I's size, which is that of their buckets.

    Args:
        clips: Of a manifest.
        time_factor: Pixel frames of a latent frame.
    """

    def __init__(self, clips: ManifestClips, time_factor: int) -> None:
        self.clips, self.time_factor = clips, time_factor

    def load(self, draw: Draw) -> Stage1Batch:
        """See ``Stage1Source``."""
        loaded, num_replaced = self.clips.take(self.clips.pieces(draw), self.clips.read)
        return self.batch(loaded, num_replaced)

    def batch(self, loaded: Sequence[LoadedClip], num_replaced: int = 0) -> Stage1Batch:
        """Clips as a batch."""
        video = torch.cat([frames_to_video(clip.frames) for clip in loaded])
        num_latent_frames = (video.shape[2] - 1) // self.time_factor + 1
        return Stage1Batch(
            ids=tuple(clip.id for clip in loaded),
            num_replaced=num_replaced,
            num_latent_frames=num_latent_frames,
            latent_frames=tuple(range(num_latent_frames)),
            video=video,
            course=even_course(video.shape[2]),
            prompts=tuple(clip.prompt for clip in loaded),
        )


class Stage2Clips:
    """Windows of clips at the output size, with their small versions or Stage I's.

    Args:
        clips: Of a manifest; their buckets have the output size.
        vae: A causal one is given all frames up to the window's end.
        downscale: Stage I's.
        crop: Side of a random square that is cut out; None takes whole frames.
        stage2: Says how the reference is made, see ``ReferenceFrames``.
    """

    def __init__(
        self,
        clips: ManifestClips,
        vae: VideoVAE,
        downscale: int,
        crop: int | None,
        stage2: Stage2Config | None = None,
    ) -> None:
        self.clips, self.downscale, self.crop = clips, downscale, crop
        self.stage2 = stage2
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

    def pieces(self, draw: Draw) -> list[Piece]:
        """What a micro-batch trains on."""
        return self.clips.pieces(draw, self.crop, self.downscale)

    def load(self, draw: Draw, segment: Segment, num_latent_frames: int) -> Stage2Batch:
        """See ``Stage2Source``."""
        del num_latent_frames  # that of the bucket
        pieces = self.pieces(draw)
        loaded, num_replaced = self.clips.take(pieces, self.clips.read)
        covered = self.cover(segment.window)
        pairs = [self.cut(clip, piece, covered) for clip, piece in zip(loaded, pieces, strict=True)]
        return Stage2Batch(
            ids=tuple(clip.id for clip in loaded),
            num_replaced=num_replaced,
            segment=segment,
            latent_frames=covered,
            video=torch.cat([video for video, _ in pairs]),
            reference=torch.cat([reference for _, reference in pairs]),
            prompts=tuple(clip.prompt for clip in loaded),
        )

    def cover(self, frames: Sequence[int]) -> tuple[int, ...]:
        """Latent frames that must be encoded to have some: a causal VAE needs all before them."""
        return tuple(range(max(frames) + 1)) if self.is_causal else tuple(sorted({0, *frames}))

    def cut(self, clip: LoadedClip, piece: Piece, covered: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Video and reference ``[1, 3, T, h, w]`` of some latent frames, 0 among them."""
        places = [pixel for latent in covered for pixel in pixel_frames(latent)]
        return cut_pair(
            clip.id,
            clip.frames,
            clip.reference,
            places,
            piece.crop,
            self.downscale,
            self.stage2,
        )
