import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from swifti2v.errors import LoadingError
from swifti2v.models.weights.files import load_weights
from swifti2v.models.weights.names import (
    clip_state_dict,
    infer_wan_config,
    umt5_state_dict,
    wan_transformer_state_dict,
    wan_vae_state_dict,
)

State = dict[str, Any]
KINDS: dict[str, dict[str, Any]] = {
    "text-to-video": {},
    "image-to-video": {"image_dim": 10, "added_kv_proj_dim": 24, "in_channels": 9},
    "first-and-last-frame": {
        "image_dim": 10,
        "added_kv_proj_dim": 24,
        "in_channels": 9,
        "pos_embed_seq_len": 6,
    },
    "no norm before cross-attention": {"cross_attn_norm": False},
}
RESNET = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def tiny_transformer(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 3,
        "text_dim": 8,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
    }
    return WanTransformer3DModel(**config | changes).eval()


def tiny_vae(is_residual: bool, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    channels = {"in_channels": 12, "out_channels": 12, "patch_size": 2} if is_residual else {}
    model = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 4, 4],
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        is_residual=is_residual,
        **channels,
    ).eval()
    return randomized(model)


def tiny_umt5(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 20,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 12,
        "num_layers": 2,
        "num_heads": 2,
    }
    return randomized(UMT5EncoderModel(UMT5Config(**sizes)).train(False))


def tiny_clip(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    config = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4)
    return randomized(CLIPVisionModel(config).train(False))


@torch.no_grad()
def randomized(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def original_transformer(state: State) -> State:
    rules = [
        (r"^condition_embedder\.(text|time)_embedder\.linear_1", r"\1_embedding.0"),
        (r"^condition_embedder\.(text|time)_embedder\.linear_2", r"\1_embedding.2"),
        (r"^condition_embedder\.time_proj", "time_projection.1"),
        (r"^condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
        (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
        (r"^condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
        (r"^condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
        (r"^condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
        (r"^proj_out", "head.head"),
        (r"^scale_shift_table", "head.modulation"),
        (r"scale_shift_table", "modulation"),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_out\.0\.", ".o."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.add_([kv])_proj\.", r".\1_img."),
        (r"\.norm_added_k\.", ".norm_k_img."),
        (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
    ]
    return rename(state, rules)


def rename(state: State, rules: Any) -> State:
    renamed = {}
    for key, tensor in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        assert key not in renamed
        renamed[key] = tensor
    return renamed


def original_vae(state: State, is_residual: bool) -> State:
    rules: list[tuple[str, Any]] = [
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"\.conv_in\.", ".conv1."),
        (r"\.norm_out\.", ".head.0."),
        (r"\.conv_out\.", ".head.2."),
        (r"\.mid_block\.attentions\.0\.", ".middle.1."),
        (r"\.mid_block\.resnets\.0\.", ".middle.0."),
        (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    ]
    if is_residual:
        rules += [
            (r"\.(down|up)_blocks\.(\d)\.resnets\.(\d)\.", r".\1samples.\2.\1samples.\3."),
            (r"\.down_blocks\.(\d)\.downsampler\.", r".downsamples.\1.downsamples.2."),
            (r"\.up_blocks\.(\d)\.upsampler\.", r".upsamples.\1.upsamples.3."),
        ]
    else:

        def flat(match: re.Match[str]) -> str:  # three resnets and a resampler a stage
            return f".upsamples.{4 * int(match[1]) + int(match[2] or 3)}."

        rules += [
            (r"\.down_blocks\.", ".downsamples."),
            (r"\.up_blocks\.(\d)\.(?:resnets\.(\d)|upsamplers\.0)\.", flat),
        ]
    rules += [(rf"\.{new}\.", f".{old}.") for new, old in RESNET.items() if "conv1" not in new]
    rules += [(r"(samples\.\d+|middle\.\d)\.conv1\.", r"\1.residual.2.")]
    return rename(state, rules)


def original_umt5(state: State) -> State:
    state = {key: tensor for key, tensor in state.items() if key != "encoder.embed_tokens.weight"}
    rules = [
        (r"^shared\.", "token_embedding."),
        (r"^encoder\.final_layer_norm\.", "norm."),
        (r"^encoder\.block\.", "blocks."),
        (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
        (r"\.layer\.0\.SelfAttention\.", ".attn."),
        (r"\.layer\.0\.layer_norm\.", ".norm1."),
        (r"\.layer\.1\.layer_norm\.", ".norm2."),
        (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
        (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
        (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
    ]
    return rename(state, rules)


def original_clip(state: State) -> State:
    state = dict(state)
    for key in [key for key in state if "q_proj" in key]:
        parts = [state.pop(key.replace("q_proj", f"{name}_proj")) for name in "qkv"]
        state[key.replace("self_attn.q_proj", "attn.to_qkv")] = torch.cat(parts)
    state["cls_embedding"] = state.pop("embeddings.class_embedding")[None, None]
    state["pos_embedding"] = state.pop("embeddings.position_embedding.weight")[None]
    rules = [
        (r"^embeddings\.patch_embedding", "patch_embedding"),
        (r"^pre_layrnorm", "pre_norm"),
        (r"^post_layernorm", "post_norm"),
        (r"^encoder\.layers\.", "transformer."),
        (r"\.layer_norm([12])\.", r".norm\1."),
        (r"\.self_attn\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.2."),
    ]
    visual = {f"visual.{key}": tensor for key, tensor in rename(state, rules).items()}
    extra = {"visual.head": torch.ones(8, 4), "textual.head.0.weight": torch.ones(2, 2)}
    return visual | extra | {"log_scale": torch.ones(())}


def assert_same_state(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("kind", KINDS)
def test_original_transformer_reads_back_and_needs_no_config(kind: str) -> None:
    model = tiny_transformer(**KINDS[kind])
    original = original_transformer(model.state_dict())
    renamed: State = dict(wan_transformer_state_dict(original))
    assert_same_state(renamed, model.state_dict())
    config = infer_wan_config(renamed, attention_head_dim=12)
    assert config.items() <= dict(model.config).items()
    rebuilt = WanTransformer3DModel(**config)
    assert dict(rebuilt.config).items() >= config.items()
    load_weights(rebuilt, renamed, source="test")
    assert_same_state(rebuilt.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["text-to-video", "image-to-video"])
def test_transformer_names_equal_those_of_diffusers_own_converter(kind: str) -> None:
    original = original_transformer(tiny_transformer(**KINDS[kind]).state_dict())
    expected = convert_wan_transformer_to_diffusers(dict(original))  # type: ignore[no-untyped-call]
    assert_same_state(wan_transformer_state_dict(original), expected)


def test_library_names_pass_through_every_converter() -> None:
    for model, convert in (
        (tiny_transformer(), wan_transformer_state_dict),
        (tiny_vae(True), wan_vae_state_dict),
        (tiny_umt5(), umt5_state_dict),
        (tiny_clip(), clip_state_dict),
    ):
        assert_same_state(convert(model.state_dict()), model.state_dict())
    older = {f"vision_model.{key}": t for key, t in tiny_clip().state_dict().items()}
    assert_same_state(clip_state_dict(older), tiny_clip().state_dict())


def test_foreign_checkpoints_are_refused_by_name() -> None:
    foreign = {"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}
    original = original_transformer(tiny_transformer().state_dict())
    with pytest.raises(LoadingError, match=r"1 of 1 keys are unknown: double_blocks.0.img"):
        wan_transformer_state_dict(foreign)
    with pytest.raises(LoadingError, match=r"blocks.0.self_attn.q.scale_weight \(1,\)"):
        wan_transformer_state_dict(original | {"blocks.0.self_attn.q.scale_weight": torch.ones(1)})
    for convert in (wan_vae_state_dict, umt5_state_dict, clip_state_dict):
        with pytest.raises(LoadingError, match="double_blocks"):
            convert(foreign)
    with pytest.raises(LoadingError, match=r"visual.transformer.0.attn.oops.weight"):
        clip_state_dict({"visual.transformer.0.attn.oops.weight": torch.ones(1)})


@torch.no_grad()
@pytest.mark.parametrize("is_residual", [False, True], ids=["Wan2.1", "Wan2.2"])
def test_original_vae_gives_the_same_model(is_residual: bool) -> None:
    model, rebuilt = tiny_vae(is_residual), tiny_vae(is_residual, seed=1)
    original = original_vae(model.state_dict(), is_residual)
    assert not {"encoder.conv_in.weight", "quant_conv.weight"} & original.keys()
    renamed = wan_vae_state_dict(original)
    assert_same_state(renamed, model.state_dict())
    load_weights(rebuilt, renamed, source="test")
    video = torch.randn(1, 3, 5, 16, 16)
    latents = model.encode(video).latent_dist.mode()
    assert torch.equal(rebuilt.encode(video).latent_dist.mode(), latents)
    assert torch.equal(rebuilt.decode(latents).sample, model.decode(latents).sample)


def test_diffusers_own_vae_converter_is_not_enough_for_wan22() -> None:
    model = tiny_vae(True)
    original = original_vae(model.state_dict(), True)
    converted = convert_wan_vae_to_diffusers(original)  # type: ignore[no-untyped-call]
    assert converted.keys() != model.state_dict().keys()


@torch.no_grad()
def test_original_umt5_gives_the_same_model() -> None:
    model, rebuilt = tiny_umt5(), tiny_umt5(seed=1)
    renamed: State = dict(umt5_state_dict(original_umt5(model.state_dict())))
    load_weights(rebuilt, renamed, source="test")
    tokens = torch.arange(12)[None]
    expected = model(tokens).last_hidden_state
    assert torch.equal(rebuilt(tokens).last_hidden_state, expected)
    assert (tiny_umt5(seed=1)(tokens).last_hidden_state - expected).abs().max() > 0.01


@torch.no_grad()
def test_original_clip_gives_the_same_image_encoder() -> None:
    model, rebuilt = tiny_clip(), tiny_clip(seed=1)
    load_weights(rebuilt, clip_state_dict(original_clip(model.state_dict())), source="test")
    pixels = torch.randn(1, 3, 8, 8)
    expected = model(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(rebuilt(pixels, output_hidden_states=True).hidden_states[-2], expected)
    assert_same_state(rebuilt.state_dict(), model.state_dict())


def test_weights_that_contradict_each_other_have_no_config() -> None:
    good = dict(tiny_transformer().state_dict())
    with pytest.raises(LoadingError, match="heads of width 128"):
        infer_wan_config(good)
    wrong = {
        "a block is missing": {k: v for k, v in good.items() if not k.startswith("blocks.0.ffn")},
        "blocks not from 0": {k.replace("blocks.1.", "blocks.5."): v for k, v in good.items()},
        "one odd width": good | {"blocks.1.ffn.net.2.weight": torch.ones(24, 30)},
        "flat patches": good | {"patch_embedding.weight": torch.ones(24, 16)},
        "unknown key": good | {"control_adapter.weight": torch.ones(1)},
        "nothing": {},
    }
    for state in wrong.values():
        with pytest.raises(LoadingError):
            infer_wan_config(state, attention_head_dim=12)
