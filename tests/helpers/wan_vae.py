"""Wan VAEs with all layers of the published ones and few channels."""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

RESIDUAL: dict[str, Any] = {
    "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "scale_factor_spatial": 16,
}  # fmt: skip


def deep_vae(name: str) -> AutoencoderKLWan:
    """``wan21`` or ``wan22`` at its true depth, with random weights.

    Their scale keeps values of one size through the layers, as in a trained model.
    """
    torch.manual_seed(0)
    changes: dict[str, Any] = {} if name == "wan21" else {**RESIDUAL, "decoder_base_dim": 4}
    channels = 4 if name == "wan21" else 6
    statistics = {"latents_mean": [0.1] * channels, "latents_std": [1.5] * channels}
    vae: AutoencoderKLWan = AutoencoderKLWan(
        base_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=2, z_dim=channels, **statistics, **changes
    )
    return vae.eval().requires_grad_(False)
