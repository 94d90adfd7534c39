"""Names of the same weights in the files of Wan and in diffusers and transformers."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor

from swifti2v.errors import LoadingError
from swifti2v.models.weights.packed import Weight

WAN_NAMES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
WAN_ATTENTION_NAMES = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
WAN_BLOCK_NAMES = {
    **{f"self_attn.{old}": f"attn1.{new}" for old, new in WAN_ATTENTION_NAMES.items()},
    **{f"cross_attn.{old}": f"attn2.{new}" for old, new in WAN_ATTENTION_NAMES.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",  # Wan numbers the norms by kind, diffusers by order; norm1 has no weight
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
VAE_STAGE = re.compile(r"(encoder|decoder)\.(?:down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.")
VAE_RESNET_NAMES = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
UMT5_NAMES = {
    "attn": "layer.0.SelfAttention",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm1": "layer.0.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
    "norm2": "layer.1.layer_norm",
}
TOKENIZER = "spiece_model"
"""Key of the tokenizer in ComfyUI's text encoders."""
GGUF_UMT5_NAMES = {
    "token_embd.weight": "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
}
"""Names of llama.cpp, ``gguf.constants`` under ``T5ENCODER``."""
GGUF_UMT5_BLOCK_NAMES = {
    "attn_norm": "layer.0.layer_norm",
    **{f"attn_{name}": f"layer.0.SelfAttention.{name}" for name in "qkvo"},
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
CLIP_NAMES = {
    "patch_embedding": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",  # spelled so in transformers
    "post_norm": "post_layernorm",
}
CLIP_BLOCK_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}

WRAPPER_NAMES = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
"""Parts that PyTorch puts into the names of sharded, recomputed or compiled modules."""


def drop_wrappers(key: str) -> str:
    """A weight's name as it was before PyTorch wrapped the modules."""
    return ".".join(part for part in key.split(".") if part not in WRAPPER_NAMES)


def shorten(items: Iterable[str], limit: int = 4) -> str:
    """The first few items of a list, and how many were left out, as one line."""
    texts = list(items)
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def wan_names(num_layers: int) -> dict[str, str]:
    """Original Wan path of each module or bare parameter -> its diffusers path."""
    return WAN_NAMES | {
        f"blocks.{layer}.{old}": f"blocks.{layer}.{new}"
        for layer in range(num_layers)
        for old, new in WAN_BLOCK_NAMES.items()
    }


def wan_transformer_state_dict(state: Mapping[str, Weight]) -> dict[str, Weight]:
    """Rename an original Wan (or DiffSynth) transformer to ``WanTransformer3DModel`` names.

    A state dict that has diffusers names already is passed through. Tensors are not copied.

    Raises:
        LoadingError: A key is not one of the Wan text- or image-to-video transformer.

    Source:
        Wan2.1 ``wan/modules/model.py``; tested equal to diffusers' single-file conversion,
        which lacks the first-and-last-frame model's ``img_emb.emb_pos``.
    """
    if any(key.startswith("condition_embedder.") for key in state):
        return dict(state)
    layers = [int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)]
    names = wan_names(max(layers, default=-1) + 1)
    renamed, unknown = {}, []
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        if key in names:
            renamed[names[key]] = tensor
        elif module in names and leaf in ("weight", "bias"):
            renamed[f"{names[module]}.{leaf}"] = tensor
        else:
            unknown.append(f"{key} {tuple(tensor.shape)}")
    if unknown:
        raise LoadingError(
            f"not a Wan transformer checkpoint: {len(unknown)} of {len(state)} keys are unknown: "
            f"{shorten(unknown)}; text- and image-to-video models load"
        )
    return renamed


def wan_vae_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an original ``Wan2.1_VAE`` or ``Wan2.2_VAE`` to ``AutoencoderKLWan`` names.

    diffusers' converter does all but the nested stages of Wan2.2, which it leaves half renamed.
    A state dict that has diffusers names already is passed through. Tensors are not copied.

    Raises:
        LoadingError: The state dict is not a Wan VAE.
    """
    if "decoder.conv_in.weight" in state:
        return dict(state)
    if "decoder.conv1.weight" not in state:
        raise LoadingError(f"not a Wan VAE checkpoint; its keys begin with {shorten(state)}")
    stages, rest = {}, {}
    for key, tensor in state.items():
        if match := VAE_STAGE.match(key):
            side, stage, layer = match.groups()
            direction = "down" if side == "encoder" else "up"
            leaf = key[match.end() :]
            module, _, parameter = leaf.rpartition(".")
            if module in VAE_RESNET_NAMES:
                leaf = f"resnets.{layer}.{VAE_RESNET_NAMES[module]}.{parameter}"
            else:
                leaf = f"{direction}sampler.{leaf}"
            stages[f"{side}.{direction}_blocks.{stage}.{leaf}"] = tensor
        else:
            rest[key] = tensor
    converted: dict[str, Tensor] = convert_wan_vae_to_diffusers(rest)  # type: ignore[no-untyped-call]
    return stages | converted


def umt5_state_dict(state: Mapping[str, Weight]) -> dict[str, Weight]:
    """Rename ``models_t5_umt5-xxl-enc-bf16.pth`` to transformers' ``UMT5EncoderModel`` names.

    A state dict that has transformers names already is passed through, but for the tokenizer that
    ComfyUI puts into its files; that of GGUF's T5 encoders is renamed, too. Tensors are not copied.

    Raises:
        LoadingError: A key is not one of the original encoder, or the file holds a T5, which shares
            one position bias among all blocks where UMT5 has one for each.
    """
    if "token_embd.weight" in state:
        return _gguf_umt5_state_dict(state)
    if "shared.weight" in state or "encoder.embed_tokens.weight" in state:
        return {key: tensor for key, tensor in state.items() if key != TOKENIZER}
    renamed, unknown = {}, []
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        if key == "token_embedding.weight":
            renamed["shared.weight"] = tensor
        elif key == "norm.weight":
            renamed["encoder.final_layer_norm.weight"] = tensor
        elif (block := re.fullmatch(r"blocks\.(\d+)\.(.+)", module)) and block[2] in UMT5_NAMES:
            renamed[f"encoder.block.{block[1]}.{UMT5_NAMES[block[2]]}.{leaf}"] = tensor
        elif block and (attention := re.fullmatch(r"attn\.([qkvo])", block[2])):
            name = f"{UMT5_NAMES['attn']}.{attention[1]}"
            renamed[f"encoder.block.{block[1]}.{name}.{leaf}"] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise LoadingError(f"not a UMT5 encoder checkpoint; unknown keys: {shorten(unknown)}")
    return renamed


def _gguf_umt5_state_dict(state: Mapping[str, Weight]) -> dict[str, Weight]:
    renamed, unknown = {}, []
    for key, weight in state.items():
        block = re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)\.weight", key)
        if key in GGUF_UMT5_NAMES:
            renamed[GGUF_UMT5_NAMES[key]] = weight
        elif block and block[2] in GGUF_UMT5_BLOCK_NAMES:
            name = GGUF_UMT5_BLOCK_NAMES[block[2]]
            renamed[f"encoder.block.{block[1]}.{name}.weight"] = weight
        else:
            unknown.append(key)
    if unknown:
        raise LoadingError(f"not a UMT5 encoder in GGUF; unknown keys: {shorten(unknown)}")
    queries = {key.split(".")[2] for key in state if key.endswith("attn_q.weight")}
    biases = {key.split(".")[2] for key in state if key.endswith("attn_rel_b.weight")}
    if queries != biases:
        raise LoadingError(
            f"{len(biases)} of {len(queries)} blocks have a position bias: this is a T5, and UMT5 "
            "has one in each; take umt5-xxl-encoder"
        )
    return renamed


def clip_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the image half of Wan's CLIP file to transformers' ``CLIPVisionModel`` names.

    The file is ``models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth``. Its text half and
    its projection head are left out: Wan reads the hidden states before them. The fused
    ``to_qkv`` is split in three; no other tensor is copied.

    Raises:
        LoadingError: The state dict has no image half, or an unknown key in it.
    """
    if any(key.endswith("embeddings.class_embedding") for key in state):
        vision = {key.removeprefix("vision_model."): tensor for key, tensor in state.items()}
        return {key: tensor for key, tensor in vision.items() if key != "visual_projection.weight"}
    visual = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    if not visual:
        raise LoadingError(f"no image encoder (visual.*) among the keys {shorten(state)}")
    renamed, unknown = {}, []
    for key, tensor in visual.items():
        module, _, leaf = key.rpartition(".")
        block = re.fullmatch(r"transformer\.(\d+)\.(.+)", module)
        prefix = f"encoder.layers.{block[1]}." if block else ""
        if key == "cls_embedding":  # [1, 1, D]
            renamed["embeddings.class_embedding"] = tensor.flatten()
        elif key == "pos_embedding":  # [1, L, D]
            renamed["embeddings.position_embedding.weight"] = tensor.squeeze(0)
        elif module in CLIP_NAMES:
            renamed[f"{CLIP_NAMES[module]}.{leaf}"] = tensor
        elif block and block[2] in CLIP_BLOCK_NAMES:
            renamed[f"{prefix}{CLIP_BLOCK_NAMES[block[2]]}.{leaf}"] = tensor
        elif block and block[2] == "attn.to_qkv":  # [3D, D] or [3D]
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{prefix}self_attn.{name}_proj.{leaf}"] = part
        elif key != "head":
            unknown.append(f"visual.{key}")
    if unknown:
        raise LoadingError(f"not Wan's CLIP checkpoint; unknown keys: {shorten(unknown)}")
    return renamed


def infer_wan_config(
    state: Mapping[str, Weight], *, attention_head_dim: int = 128
) -> dict[str, Any]:
    """Read the ``WanTransformer3DModel`` config off the shapes of its weights.

    Args:
        state: A transformer under diffusers names (see ``wan_transformer_state_dict``).
        attention_head_dim: Width of a head; shapes do not tell it, all Wan models have 128.

    Returns:
        Keyword arguments of ``WanTransformer3DModel``.

    Raises:
        LoadingError: A needed key is missing, the width is no multiple of
            ``attention_head_dim``, or the weights do not fit the model the config describes.
    """
    image = "condition_embedder.image_embedder."
    try:
        width, in_channels, *patch_size = state["patch_embedding.weight"].shape
        patch_volume = math.prod(patch_size)
        config: dict[str, Any] = {
            "patch_size": tuple(patch_size),
            "num_attention_heads": width // attention_head_dim,
            "attention_head_dim": attention_head_dim,
            "in_channels": in_channels,
            "out_channels": state["proj_out.weight"].shape[0] // patch_volume,
            "text_dim": state["condition_embedder.text_embedder.linear_1.weight"].shape[1],
            "freq_dim": state["condition_embedder.time_embedder.linear_1.weight"].shape[1],
            "ffn_dim": state["blocks.0.ffn.net.0.proj.weight"].shape[0],
            "num_layers": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
            "cross_attn_norm": "blocks.0.norm2.weight" in state,
        }
        if f"{image}norm1.weight" in state:
            config["image_dim"] = state[f"{image}norm1.weight"].shape[0]
            config["added_kv_proj_dim"] = state["blocks.0.attn2.add_k_proj.weight"].shape[1]
        if f"{image}pos_embed" in state:
            config["pos_embed_seq_len"] = state[f"{image}pos_embed"].shape[1]
    except (KeyError, ValueError) as error:
        raise LoadingError(f"not a Wan transformer under diffusers names: {error}") from error
    if len(patch_size) != 3 or width % attention_head_dim:
        raise LoadingError(
            f"patch_embedding.weight {tuple(state['patch_embedding.weight'].shape)} does not fit "
            f"heads of width {attention_head_dim} and a patch of time, height and width"
        )
    _require_fit(config, state)
    return config


def _require_fit(config: dict[str, Any], state: Mapping[str, Weight]) -> None:
    with torch.device("meta"):
        model: Any = WanTransformer3DModel(**config)  # type: ignore[no-untyped-call]
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items()}
    found = {key: tensor.shape for key, tensor in state.items()}
    wrong = [
        f"{key} (checkpoint {found.get(key)}, expected {wanted.get(key)})"
        for key in sorted(wanted.keys() | found.keys())
        if found.get(key) != wanted.get(key)
    ]
    if wrong:
        raise LoadingError(f"the weights contradict each other: {shorten(wrong)}")
