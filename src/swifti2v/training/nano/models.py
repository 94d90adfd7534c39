"""The networks of the nano model: their sizes, and how they are made."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn
from torch.nn import functional as F

from swifti2v.config import settings
from swifti2v.errors import ConfigError
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.block_codec import count_channels
from swifti2v.shapes import NUM_WAYS, ScaleFactors

STAGE1_SCALE = ScaleFactors(time=4, space=4, patch=2)
"""Scale factors of Stage I's codec and patches."""
STAGE2_SCALE = ScaleFactors(time=4, space=8, patch=2)
"""Scale factors of Stage II's codec and patches."""


@settings
class NanoSize:
    """Size of a transformer."""

    num_heads: int = 4
    """Heads of 64 features; at least 2."""
    num_layers: int = 4
    """Blocks."""

    def __post_init__(self) -> None:
        if self.num_heads < 2 or self.num_layers < 1:
            raise ConfigError(
                f"a transformer of {self.num_heads} heads and {self.num_layers} layers is too small; "
                "give at least 2 and 1"
            )


class PatchLinear(nn.Conv3d):
    """A convolution with a kernel (1, n, n) that is its stride, computed as a matrix product.

    The gradient of such a convolution in bfloat16 is NaN on CPUs (torch 2.13).
    """

    first_channel: int = 0
    """Input channels before it are not read; as an ordinary convolution has weights of 0 for them."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[B, C, F, h, w]`` to ``[B, D, F, h / n, w / n]``."""
        assert self.bias is not None
        batch, _, num_frames, _, _ = input.shape
        read = input[:, self.first_channel :]
        frames = read.to(self._dtype(input)).transpose(1, 2).flatten(0, 1)
        patches = F.pixel_unshuffle(frames, self.kernel_size[1])  # [B F, C n n, h', w']
        weight = self.weight[:, self.first_channel :].flatten(1)
        tokens = weight @ patches.flatten(2) + self.bias[:, None]
        tokens = tokens.reshape(batch, num_frames, -1, *patches.shape[2:])
        return tokens.transpose(1, 2)

    @staticmethod
    def _dtype(input: torch.Tensor) -> torch.dtype:
        kind = input.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype


def make_stage1_transformer(size: NanoSize, text_dim: int) -> WanTransformer3DModel:
    """A new Stage I transformer: latents, mask and condition in, displacement and latents out.

    Its output layer is 0: it begins with the photo at rest.
    """
    channels = count_channels(STAGE1_SCALE.space)
    kind: Any = WanTransformer3DModel
    model: WanTransformer3DModel = kind(
        **transformer_config(size, text_dim),
        in_channels=2 * channels + 4,
        out_channels=NUM_WAYS + channels,
        patch_size=(1, STAGE1_SCALE.patch, STAGE1_SCALE.patch),
    )
    model.patch_embedding.__class__ = PatchLinear
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


def make_stage2_transformer(
    size: NanoSize, text_dim: int, *, reads_noise: bool = True
) -> SegmentTransformer3DModel:
    """A new Stage II transformer: latents and reference in, latents out.

    Its output layer is 0: it begins with the reference. A model of one step need not read the
    noise, which says nothing to it.
    """
    channels = count_channels(STAGE2_SCALE.space)
    made: Any = SegmentTransformer3DModel(
        **transformer_config(size, text_dim), in_channels=2 * channels, out_channels=channels
    )
    made.patch_embedding.__class__ = PatchLinear
    if not reads_noise:
        made.patch_embedding.first_channel = channels
        nn.init.zeros_(made.patch_embedding.weight[:, :channels])
    nn.init.zeros_(made.proj_out.weight)
    nn.init.zeros_(made.proj_out.bias)
    model: SegmentTransformer3DModel = made
    return model


def transformer_config(size: NanoSize, text_dim: int) -> dict[str, Any]:
    """Configuration that both stages' transformers share."""
    return {
        "num_attention_heads": size.num_heads,
        "attention_head_dim": 64,
        "text_dim": text_dim,
        "freq_dim": 64,
        "ffn_dim": 4 * 64 * size.num_heads,
        "num_layers": size.num_layers,
    }
