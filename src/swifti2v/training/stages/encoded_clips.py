"""Frames of clips for Stage I and Stage II, encoded in each step by the frozen models."""

from collections.abc import Callable
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from swifti2v.config import Stage1Config
from swifti2v.errors import ConfigError
from swifti2v.media import video_to_frames
from swifti2v.models.image_encoder import encode_image
from swifti2v.models.loading.components import Components
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.pipelines.stage1 import Stage1Pipeline
from swifti2v.training.data.crops import show_pair
from swifti2v.training.engine.draws import Draw
from swifti2v.training.stages.batches import FrameSource, Stage1Frames, Stage2Frames, Stage2Pixels
from swifti2v.training.stages.clip_sources import Stage2Clips
from swifti2v.training.stages.latents import each_clip, encode_clips

EncodePhotos = Callable[[Tensor], Tensor]
"""``[b, 3, 1, h, w]`` photos to the embeddings ``[b, L, D]`` of CLIP."""


class EncodedStage1:
    """Clips of Stage I as a ``Stage1Source``, with the embeddings of photos that some models take."""

    def __init__(
        self,
        frames: FrameSource[Stage1Frames],
        pipeline: Stage1Pipeline,
        stage1: Stage1Config,
        encode_photos: EncodePhotos | None = None,
    ) -> None:
        self.frames, self.pipeline, self.stage1 = frames, pipeline, stage1
        self.encode_photos = encode_photos

    def load(self, draw: Draw) -> Stage1Frames:
        """See ``Stage1Source``."""
        return self.frames.load(draw)

    @torch.no_grad()
    def encode(self, batch: Stage1Frames) -> tuple[Tensor, Tensor, Tensor | None]:
        """See ``Stage1Source``."""
        pipeline, video = self.pipeline, batch.video.to(self.pipeline.vae.device)
        photos = video[:, :, :1]
        after = pipeline.continue_image(photos, batch.course, self.stage1)
        condition = each_clip(
            pipeline.vae,
            lambda clips: pipeline.prepare_condition(clips[:, :, :1], clips[:, :, 1:]),
            torch.cat([photos, after], dim=2),
        )
        embeds = None if self.encode_photos is None else self.encode_photos(photos)
        return encode_clips(pipeline.vae, video), condition, embeds


class EncodedStage2:
    """Windows of clips as a ``Stage2Source``."""

    def __init__(self, frames: FrameSource[Stage2Frames], vae: VideoVAE) -> None:
        self.frames, self.vae = frames, vae

    def load(self, draw: Draw) -> Stage2Frames:
        """See ``Stage2Source``."""
        return self.frames.load(draw)

    @torch.no_grad()
    def encode(self, batch: Stage2Frames) -> tuple[Tensor, Tensor]:
        """See ``Stage2Source``; a causal VAE needs all frames before the window.

        Raises:
            ConfigError: A causal VAE was given the window alone.
        """
        window, covered = batch.segment.window, batch.latent_frames
        if not (isinstance(self.vae, BlockCodec) or covered == tuple(range(window[-1] + 1))):
            raise ConfigError(f"a causal VAE needs the frames before a window, not {covered} alone")
        places = [covered.index(frame) for frame in window]
        video, reference = (encode_clips(self.vae, own) for own in (batch.video, batch.reference))
        return video[:, :, places], reference[:, :, places]


class EncodedPixels:
    """Windows of manifests' clips as a ``Stage2Source``; references are made on the VAE's device.

    Args:
        clips: Loads the windows.
        vae: Encodes them.
    """

    def __init__(self, clips: Stage2Clips, vae: VideoVAE) -> None:
        self.clips, self.vae = clips, vae

    def load(self, draw: Draw) -> Stage2Pixels:
        """See ``Stage2Source``."""
        return self.clips.load(draw)

    @torch.no_grad()
    def encode(self, batch: Stage2Pixels) -> tuple[Tensor, Tensor]:
        """See ``Stage2Source``."""
        places = [batch.latent_frames.index(frame) for frame in batch.segment.window]
        pairs = [
            self.encode_pair(video, None if batch.small is None else batch.small[number])
            for number, video in enumerate(batch.video)
        ]
        latents, reference = (torch.cat(own)[:, :, places] for own in zip(*pairs, strict=True))
        return latents, reference

    @torch.no_grad()
    def encode_pair(self, video: Tensor, small: Tensor | None) -> tuple[Tensor, Tensor]:
        """Latents ``[1, C, F, h, w]`` of one clip's frames and of their reference, see ``show_pair``."""
        device = self.vae.device
        with torch.autocast(device.type, enabled=False):  # resizing is a matrix product
            shown = show_pair(video.to(device), small, self.clips.downscale, self.clips.stage2)
        latents, reference = (encode_clips(self.vae, own) for own in shown)
        return latents, reference


def photo_encoder(parts: Components) -> EncodePhotos | None:
    """Return the encoder of photos for a model; None without an image encoder."""
    return None if parts.image_encoder is None else partial(_embed_photos, parts)


@torch.no_grad()
def _embed_photos(parts: Components, photos: Tensor) -> Tensor:
    encoder, processor = parts.image_encoder, parts.image_processor
    assert encoder is not None
    assert processor is not None
    images = [Image.fromarray(video_to_frames(photo[None])[0]) for photo in photos]
    with torch.autocast(encoder.device.type, enabled=False):
        return torch.cat([encode_image(encoder, processor, image) for image in images])
