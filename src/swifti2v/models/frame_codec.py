"""One latent frame of any supported video VAE at a time: the seam under the streaming classes."""

from typing import Any, Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, patchify, unpatchify
from torch import Tensor, nn

from swifti2v.errors import LoadingError
from swifti2v.models.codec import BlockCodec

VideoVAE = AutoencoderKLWan | BlockCodec
Cache = list[Any]
"""History of the causal convolutions: a tensor, diffusers' ``"Rep"`` mark or None for each."""


class FrameCodec(Protocol):
    """One latent frame of a video VAE at a time; the caller owns the causal history."""

    encoder_slots: int
    """Length of the cache that ``encode_frame`` reads and updates in place."""
    decoder_slots: int
    """Length of the cache that ``decode_frame`` reads and updates in place."""

    def encode_frame(self, frames: Tensor, cache: Cache) -> Tensor:
        """``[B, 3, T, H, W]`` to ``[B, C, 1, h, w]`` unscaled; T = 1 starts a clip, else whole."""

    def decode_frame(self, latents: Tensor, cache: Cache, *, first: bool) -> Tensor:
        """``[B, C, 1, h, w]`` unscaled to ``[B, 3, T, H, W]``, not clamped; T = 1 if first."""


class _WanFrames:
    """``AutoencoderKLWan``, 2.1 or 2.2, in the calls its own ``encode`` and ``decode`` make."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        config = vae.config
        self._vae: Any = vae
        self._z_dim: int = config["z_dim"]
        self._patch: int = config["patch_size"] or 1
        made = (
            2 ** sum(config["temperal_downsample"]),
            2 ** (len(config["dim_mult"]) - 1) * self._patch,
        )
        declared = (config["scale_factor_temporal"], config["scale_factor_spatial"])
        if made != declared:
            raise LoadingError(
                f"the VAE declares scale factors {declared} for time and space, but its layers make "
                f"{made}: correct scale_factor_temporal and scale_factor_spatial in its config.json"
            )
        # An upper bound: the 1x1 shortcuts keep no history.
        self.encoder_slots = sum(isinstance(m, nn.Conv3d) for m in vae.encoder.modules())
        self.decoder_slots = sum(isinstance(m, nn.Conv3d) for m in vae.decoder.modules())

    def encode_frame(self, frames: Tensor, cache: Cache) -> Tensor:
        frames = patchify(frames, self._patch)  # type: ignore[no-untyped-call]
        moments = self._vae.quant_conv(
            self._vae.encoder(frames, feat_cache=cache, feat_idx=[0])
        )  # [B, 2C, 1, h, w]
        mean: Tensor = moments[:, : self._z_dim]
        return mean

    def decode_frame(self, latents: Tensor, cache: Cache, *, first: bool) -> Tensor:
        hidden = self._vae.post_quant_conv(latents)
        frames = self._vae.decoder(hidden, feat_cache=cache, feat_idx=[0], first_chunk=first)
        video: Tensor = unpatchify(frames, self._patch)  # type: ignore[no-untyped-call]
        return video


class _BlockFrames:
    """``BlockCodec``, which has no history."""

    encoder_slots = 0
    decoder_slots = 0

    def __init__(self, codec: BlockCodec) -> None:
        self._codec = codec

    def encode_frame(self, frames: Tensor, cache: Cache) -> Tensor:
        del cache
        return self._codec.encode_frames(frames)

    def decode_frame(self, latents: Tensor, cache: Cache, *, first: bool) -> Tensor:
        del cache
        return self._codec.decode_frames(latents, first=first)


def frame_codec(vae: VideoVAE) -> FrameCodec:
    """Adapter for the class of ``vae``.

    Raises:
        LoadingError: ``vae`` is of another class, or its configuration contradicts its layers.
    """
    if isinstance(vae, AutoencoderKLWan):
        return _WanFrames(vae)
    if isinstance(vae, BlockCodec):
        return _BlockFrames(vae)
    raise LoadingError(
        f"a VAE of class {type(vae).__name__} cannot be streamed: use AutoencoderKLWan or BlockCodec"
    )


def store_cache(cache: Cache) -> None:
    """Move a history to host memory, in place; pinned, if it comes from a GPU."""
    for slot, entry in enumerate(cache):
        if isinstance(entry, Tensor):
            waiting = torch.empty_like(entry, device="cpu", pin_memory=entry.is_cuda)
            cache[slot] = waiting.copy_(entry)


def fetch_cache(cache: Cache, device: torch.device) -> None:
    """Bring back what ``store_cache`` moved, in place."""
    for slot, entry in enumerate(cache):
        if isinstance(entry, Tensor):
            cache[slot] = entry.to(device, non_blocking=True)
