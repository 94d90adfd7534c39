"""Clips to latents in training: what a sample gives does not depend on the others of its batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.models.vae.streaming import StreamingEncoder, normalize_latents


@torch.no_grad()
def encode_clips(vae: VideoVAE, video: Tensor) -> Tensor:
    """Scaled latents of clips.

    Args:
        vae: Frozen. A causal one is given one clip after the other: its kernels round differently
            in larger batches. It computes in its own precision, whatever the model is trained in.
        video: ``[b, 3, T, H, W]`` in [-1, 1], on any device; ``BlockCodec`` also takes clips with
            latent frames left out.

    Returns:
        ``[b, C, F, h, w]`` float32 on the VAE's device.
    """
    video = video.to(vae.device)
    return each_clip(vae, lambda clips: _encode(vae, clips), video)


def each_clip(vae: VideoVAE, encode: Callable[[Tensor], Tensor], video: Tensor) -> Tensor:
    """Encode each clip of a batch alone with ``encode`` and ``vae``; without autocast."""
    with torch.autocast(video.device.type, enabled=False):
        if isinstance(vae, BlockCodec):  # computes every cell on its own
            return encode(video)
        return torch.cat([encode(clip[None]) for clip in video])


def _encode(vae: VideoVAE, video: Tensor) -> Tensor:
    if isinstance(vae, BlockCodec):
        return encode_window(vae, video)
    return StreamingEncoder(vae).encode(video, final=True)


def encode_window(codec: BlockCodec, video: Tensor) -> Tensor:
    """Scaled latents of a window: one frame that stands alone, then whole latent frames.

    ``[B, 3, 1 + 4k, H, W]`` in [-1, 1] becomes ``[B, C, 1 + k, H/n, W/n]`` float32.
    """
    pieces = [codec.encode_frames(video[:, :, :1])]
    if video.shape[2] > 1:
        pieces.append(codec.encode_frames(video[:, :, 1:]))
    return normalize_latents(codec, torch.cat(pieces, dim=2))
