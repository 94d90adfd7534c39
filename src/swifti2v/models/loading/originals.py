"""Original Wan files need no configuration beside them: it is read off the weights here."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig, UMT5Config

from swifti2v.errors import LoadingError
from swifti2v.models.weights.names import (
    clip_state_dict,
    umt5_state_dict,
    wan_vae_state_dict,
)
from swifti2v.models.weights.packed import Weight

# Mean and deviation of the Wan2.2 VAE's latents: constants of its reference code
# (Wan2.2 `wan/modules/vae2_2.py`), not part of its weights.
WAN22_LATENTS_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542,
    0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109,
    0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899,
    -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_LATENTS_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344,
    0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804,
    0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999,
    0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

State = Mapping[str, Tensor]


def _find(state: Mapping[str, Weight], key: str) -> Weight:
    if key not in state:
        raise LoadingError(f"the file lacks {key}: it is another model or only a part of one")
    return state[key]


def convert_vision_names(state: State) -> dict[str, Tensor]:
    """Transformers' names of today for a CLIP vision model that any version of it saved."""
    return {k: v for k, v in clip_state_dict(state).items() if "position_ids" not in k}


def convert_vae(state: State) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and diffusers names of an original Wan2.1 or Wan2.2 VAE.

    Raises:
        LoadingError: It is neither of the two.
    """
    converted = wan_vae_state_dict(state)
    z_dim = int(_find(converted, "post_quant_conv.weight").shape[0])
    config: dict[str, Any] = {
        "z_dim": z_dim,
        "base_dim": int(_find(converted, "encoder.conv_in.weight").shape[0]),
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
    }
    if z_dim == 16:
        return config, converted
    if z_dim == 48:
        widest = int(_find(converted, "decoder.conv_in.weight").shape[0])
        config |= {
            "decoder_base_dim": widest // config["dim_mult"][-1],
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "latents_mean": WAN22_LATENTS_MEAN,
            "latents_std": WAN22_LATENTS_STD,
        }
        return config, converted
    raise LoadingError(f"a Wan VAE has 16 or 48 latent channels; this file has {z_dim}")


def convert_text_encoder(
    state: Mapping[str, Weight],
) -> tuple[UMT5Config, dict[str, Weight]]:
    """Configuration and transformers names of an original UMT5 encoder."""
    converted = umt5_state_dict(state)
    block = "encoder.block.0.layer."
    vocabulary, width = _find(converted, "shared.weight").shape
    buckets, heads = _find(
        converted, f"{block}0.SelfAttention.relative_attention_bias.weight"
    ).shape
    inner = _find(converted, f"{block}0.SelfAttention.q.weight").shape[0]
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=_find(converted, f"{block}1.DenseReluDense.wi_0.weight").shape[0],
        num_layers=len(
            {key.split(".")[2] for key in converted if key.startswith("encoder.block.")}
        ),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )
    return config, converted


def convert_image_encoder(state: State) -> tuple[CLIPVisionConfig, dict[str, Tensor]]:
    """Configuration and transformers names of Wan's CLIP image encoder (heads of width 80)."""
    converted = clip_state_dict(state)
    weight = _find(converted, "embeddings.patch_embedding.weight")
    width, patch = weight.shape[0], weight.shape[-1]
    if width % 80:
        raise LoadingError(f"Wan's CLIP has attention heads of width 80; this one is {width} wide")
    positions = _find(converted, "embeddings.position_embedding.weight").shape[0]
    layers = {key.split(".")[2] for key in converted if key.startswith("encoder.layers.")}
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=_find(converted, "encoder.layers.0.mlp.fc1.weight").shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=width // 80,
        image_size=round((positions - 1) ** 0.5) * patch,
        patch_size=patch,
        hidden_act="gelu",
    )
    return config, converted
