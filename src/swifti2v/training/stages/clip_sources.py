"""A manifest's clips as frames for Stage I and Stage II."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from swifti2v.config import Stage2Config
from swifti2v.errors import ConfigError
from swifti2v.media import Frames, downscale, frames_to_video
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.pipelines.course import even_course
from swifti2v.segments import Segment
from swifti2v.shapes import latent_frames, pixel_frames
from swifti2v.training.data.clips import LoadedClip, ManifestClips, Piece
from swifti2v.training.data.crops import cut_clip, cut_pair
from swifti2v.training.engine.draws import Draw
from swifti2v.training.stages.batches import Stage1Frames, Stage2Pixels, VideoBatch
from swifti2v.training.windows import WindowConfig, draw_window


class ClipCrops:
    """Clips or images of manifests at the size of their bucket, or squares of them."""

    def __init__(self, clips: ManifestClips, crop: int | None) -> None:
        self.clips, self.crop = clips, crop

    def load(self, draw: Draw) -> VideoBatch:
        """See ``FrameSource``."""
        pieces = self.clips.pieces(draw, self.crop)
        loaded, num_replaced = self.clips.take(pieces, self.clips.read)
        pairs = zip(loaded, pieces, strict=True)
        return VideoBatch(
            ids=tuple(clip.id for clip in loaded),
            num_replaced=num_replaced,
            prompts=tuple(clip.prompt for clip in loaded),
            video=torch.cat([cut_clip(clip.frames, piece.crop) for clip, piece in pairs]),
        )


class Stage1Clips:
    """Clips at Stage I's size, which is that of their buckets."""

    def __init__(self, clips: ManifestClips) -> None:
        self.clips = clips

    def load(self, draw: Draw) -> Stage1Frames:
        """See ``FrameSource``."""
        return self.batch(*self.clips.take(self.clips.pieces(draw), self.clips.read))

    def batch(self, loaded: Sequence[LoadedClip], num_replaced: int = 0) -> Stage1Frames:
        """Clips as a batch."""
        video = torch.cat([frames_to_video(clip.frames) for clip in loaded])
        return Stage1Frames(
            ids=tuple(clip.id for clip in loaded),
            num_replaced=num_replaced,
            prompts=tuple(clip.prompt for clip in loaded),
            course=even_course(video.shape[2]),
            video=video,
        )


class Stage2Clips:
    """Windows of clips at the output size, with their small versions or Stage I's.

    A causal VAE is given all frames up to the window's end.
    """

    def __init__(
        self,
        clips: ManifestClips,
        windows: WindowConfig,
        vae: VideoVAE,
        downscale: int,
        crop: int | None,
        stage2: Stage2Config,
    ) -> None:
        self.clips, self.windows, self.downscale, self.crop = clips, windows, downscale, crop
        self.stage2, self.time_factor = stage2, int(vae.config["scale_factor_temporal"])
        self.is_causal = not isinstance(vae, BlockCodec)
        for bucket in clips.plan.shares:
            if crop is not None and crop > min(bucket.height, bucket.width):
                raise ConfigError(
                    f"crop {crop} is larger than the bucket {bucket.width}x{bucket.height}; take a "
                    "smaller one"
                )

    def ask(self, draw: Draw) -> tuple[list[Piece], Segment]:
        """Choose pieces of clips for a micro-batch, and the segment of the whole step."""
        return self.clips.pieces(draw, self.crop, self.downscale), self.segment(draw)

    def segment(self, draw: Draw) -> Segment:
        """Choose the segment of a step."""
        num_latent_frames = latent_frames(self.clips.bucket(draw.step).num_frames, self.time_factor)
        return draw_window(self.windows, self.stage2, num_latent_frames, draw.shared())

    def all_frames(self, piece: Piece) -> tuple[int, ...]:
        """Latent frames of a whole piece."""
        bucket = self.clips.placements[piece.name].bucket
        return tuple(range(latent_frames(bucket.num_frames, self.time_factor)))

    def load(self, draw: Draw) -> Stage2Pixels:
        """See ``FrameSource``; no frame behind the window is read."""
        pieces, segment = self.ask(draw)
        covered = self.cover(segment.window)
        num_frames = pixel_frames(covered[-1], self.time_factor).stop
        loaded, num_replaced = self.clips.take(
            pieces, lambda piece: self.clips.read(piece, num_frames)
        )
        pairs = [self.cut(clip, piece, covered) for clip, piece in zip(loaded, pieces, strict=True)]
        # What follows from the videos of all need not be sent.
        is_given = any(small is not None for _, small in pairs)
        return Stage2Pixels(
            ids=tuple(clip.id for clip in loaded),
            num_replaced=num_replaced,
            prompts=tuple(clip.prompt for clip in loaded),
            segment=segment,
            latent_frames=covered,
            video=_stack([video for video, _ in pairs]),
            small=_stack([self._small_of(*pair) for pair in pairs]) if is_given else None,
        )

    def _small_of(self, video: Frames, small: Frames | None) -> Frames:
        return downscale(video, self.downscale) if small is None else small

    def cover(self, frames: Sequence[int]) -> tuple[int, ...]:
        """Latent frames that must be encoded to have some: a causal VAE needs all before them."""
        return tuple(range(max(frames) + 1)) if self.is_causal else tuple(sorted({0, *frames}))

    def cut(
        self, clip: LoadedClip, piece: Piece, covered: Sequence[int]
    ) -> tuple[Frames, Frames | None]:
        """Frames of some latent frames, 0 among them, and Stage I's if there are some."""
        places = [pixel for latent in covered for pixel in pixel_frames(latent, self.time_factor)]
        return cut_pair(clip.id, clip.frames, clip.reference, places, piece.crop, self.downscale)


def _stack(clips: Sequence[Frames]) -> Tensor:
    """``[b, T, H, W, 3]``; one clip is not copied."""
    if len(clips) == 1:
        return torch.from_numpy(np.ascontiguousarray(clips[0]))[None]
    return torch.from_numpy(np.stack(clips))
