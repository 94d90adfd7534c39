"""Weight of each latent channel in a loss."""

import torch
from torch import Tensor

from swifti2v.errors import ConfigError
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.frame_codec import VideoVAE


def weigh_channels(codec: VideoVAE, limit: float) -> Tensor:
    """Weight of each channel in a loss, ``[C]``: its share of a pixel error, at most ``limit``.

    The limit counts before scaling to a mean of 1. The transform is orthonormal, so a latent error
    costs the divisor squared in pixels.

    Raises:
        ConfigError: Another VAE: its channels have no share of a pixel error.
    """
    if not isinstance(codec, BlockCodec):
        raise ConfigError(
            f"channel_weight_limit is {limit:g}, but only BlockCodec's channels can be weighed, not "
            f"those of {type(codec).__name__}; set it null"
        )
    weight = torch.tensor(codec.config["latents_std"]).square().clamp(max=limit)
    return weight / weight.mean()
