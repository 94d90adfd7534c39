import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from swifti2v.errors import InputError, LoadingError
from swifti2v.models.lora.merge import merge_lora

RANK = 3
State = dict[str, torch.Tensor]
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
ORIGINAL = [  # diffusers -> original Wan, in this order
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"^proj_out", "head.head"),
    (r"^scale_shift_table", "head.modulation"),
    (r"scale_shift_table$", "modulation"),
    (r"attn1", "self_attn"),
    (r"attn2", "cross_attn"),
    (r"\.to_out\.0$", ".o"),
    (r"\.to_([qkv])$", r".\1"),
    (r"\.add_([kv])_proj$", r".\1_img"),
    (r"norm_added_k", "norm_k_img"),
    (r"^(blocks\.\d+)\.norm2", r"\1.norm3"),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
]


convert_lora: Any = lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers


def original(name: str) -> str:
    for pattern, replacement in ORIGINAL:
        name = re.sub(pattern, replacement, name)
    return name


def tiny_transformer(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
        "text_dim": 8, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "image_dim": 10,
        "added_kv_proj_dim": 24, "patch_size": (1, 2, 2),
    }  # fmt: skip
    model = WanTransformer3DModel(**sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def forward(model: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    return model(
        hidden_states=torch.randn(1, 4, 2, 4, 4, generator=generator),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 5, 8, generator=generator),
        encoder_hidden_states_image=torch.randn(1, 6, 10, generator=generator),
    ).sample


def weights(model: Any) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def make_pairs(model: Any, seed: int = 1) -> Pairs:
    """Every linear and convolutional layer -> random (up, down)."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv3d):
            out, *rest = layer.weight.shape
            up = torch.randn(out, RANK, *[1] * (len(rest) - 1), generator=generator)
            pairs[name] = up, torch.randn(RANK, *rest, generator=generator)
    return pairs


def delta(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return torch.einsum("or,r...->o...", up.flatten(1), down)


# side 0 is up (B), side 1 is down (A)
FAMILIES: dict[str, Callable[[str, int], str]] = {
    "peft": lambda name, side: f"transformer.{name}.lora_{'BA'[side]}.weight",
    "bare peft": lambda name, side: f"{name}.lora_{'BA'[side]}.weight",
    "original": lambda name, side: (
        f"diffusion_model.{original(name)}.lora_{('up', 'down')[side]}.weight"
    ),
    "original ab": lambda name, side: f"diffusion_model.{original(name)}.lora_{'BA'[side]}.weight",
    "diffsynth": lambda name, side: f"{original(name)}.lora_{'BA'[side]}.default.weight",
    "kohya": lambda name, side: (
        f"lora_unet_{original(name).replace('.', '_')}.lora_{('up', 'down')[side]}.weight"
    ),
}


def pair_file(family: str, pairs: Pairs, alpha: float | None = None) -> State:
    key = FAMILIES[family]
    tensors = {key(name, side): pair[side] for name, pair in pairs.items() for side in (0, 1)}
    if alpha is not None:
        for name in pairs:
            tensors[key(name, 0).rsplit(".lora_", 1)[0] + ".alpha"] = torch.tensor(float(alpha))
    return tensors


def lightx2v_file(model: Any, pairs: Pairs, seed: int = 2) -> tuple[State, State]:
    """Pairs of the blocks' linear layers and full differences of everything else in use."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {name: pair for name, pair in pairs.items() if name.startswith("blocks.")}
    tensors, deltas = pair_file("original", pairs), {}
    for name, (up, down) in pairs.items():
        deltas[f"{name}.weight"] = delta(up, down)
    for name, parameter in model.named_parameters():
        if name in deltas:
            continue
        deltas[name] = 0.3 * torch.randn(parameter.shape, generator=generator)
        module, _, leaf = name.rpartition(".")
        if leaf == "scale_shift_table":
            key = original(name).removesuffix("modulation") + "diff_m"
        else:
            key = f"{original(module)}.{'diff' if leaf == 'weight' else 'diff_b'}"
        tensors[f"diffusion_model.{key}"] = deltas[name]
    return tensors, deltas


def assert_merged(model: Any, before: State, deltas: State, factor: float = 1.0) -> None:
    for name, tensor in model.state_dict().items():
        expected = before[name] + factor * deltas.get(name, torch.zeros(()))
        torch.testing.assert_close(tensor, expected, atol=2e-6, rtol=2e-6, msg=name)


@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_adds_the_product_of_its_pairs_to_every_layer(
    tmp_path: Path, family: str, alpha: float | None
) -> None:
    model = tiny_transformer()
    before, pairs = weights(model), make_pairs(model)
    tensors = pair_file(family, pairs, alpha)
    save_file(tensors, tmp_path / "lora.safetensors")
    report = merge_lora(model, tmp_path / "lora.safetensors", 0.7)
    scale = 1 if alpha is None else alpha / RANK
    assert_merged(model, before, {f"{n}.weight": delta(*p) for n, p in pairs.items()}, 0.7 * scale)
    assert report.format == family.split()[-1 if family == "bare peft" else 0]
    assert report.applied == report.total == len(tensors)
    assert report.skipped == ()


def test_lightx2v_file_changes_every_parameter_and_reports_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_transformer()
    before = weights(model)
    tensors, deltas = lightx2v_file(model, make_pairs(model))
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"swifti2v_base": "abc"})
    with caplog.at_level(logging.INFO, "swifti2v"):
        report = merge_lora(model, str(tmp_path / "lora.safetensors"))
    assert deltas.keys() == before.keys()
    assert_merged(model, before, deltas)
    assert f"{len(tensors)} of {len(tensors)} keys merged" in caplog.text
    assert report.format == "original"
    assert report.metadata["swifti2v_base"] == "abc"


def test_output_equals_the_model_with_all_deltas_where_diffusers_own_loader_drops_some() -> None:
    model = tiny_transformer()
    tensors, deltas = lightx2v_file(model, make_pairs(model))
    embedding = ("diffusion_model.text_", "diffusion_model.time_")  # no full weights in diffusers
    dropped = {key for key in tensors if key.startswith(embedding) or "head.head" in key}
    kept = {key: tensor for key, tensor in tensors.items() if key not in dropped}
    outside = r"condition_embedder\.(text|time)|proj_out"
    wanted = tiny_transformer()
    with torch.no_grad():
        for name, parameter in wanted.named_parameters():
            if not re.match(outside, name):
                parameter += deltas[name]
    merge_lora(model, kept)
    torch.testing.assert_close(forward(model), forward(wanted), atol=1e-4, rtol=1e-4)

    theirs = tiny_transformer()
    converted = convert_lora(dict(kept))
    theirs.load_lora_adapter(converted, prefix="transformer")
    lost = {key for key in kept if re.search(r"norm.*\.diff|diff_m$|patch_embedding|img_emb", key)}
    assert len(converted) == len(kept) - len(lost)
    error = (forward(theirs) - forward(wanted)).norm() / forward(wanted).norm()
    assert error > 0.1


def test_pairs_alone_give_what_diffusers_own_loader_gives() -> None:
    model, theirs = tiny_transformer(), tiny_transformer()
    pairs = {n: p for n, p in make_pairs(model).items() if n.startswith("blocks.")}
    tensors = pair_file("original", pairs, alpha=2)
    merge_lora(model, tensors)
    converted = convert_lora(tensors)  # scales tensors in place
    theirs.load_lora_adapter(converted, prefix="transformer")
    torch.testing.assert_close(forward(model), forward(theirs), atol=1e-4, rtol=1e-4)


@settings(max_examples=8, deadline=None)
@given(st.floats(-2, 2), st.floats(-2, 2))
def test_strengths_add_up(first: float, second: float) -> None:
    twice, once = tiny_transformer(), tiny_transformer()
    tensors = pair_file("kohya", make_pairs(once))
    merge_lora(twice, tensors, first)
    merge_lora(twice, tensors, second)
    merge_lora(once, tensors, first + second)
    torch.testing.assert_close(twice.state_dict(), once.state_dict(), atol=5e-6, rtol=1e-5)


def test_several_loras_compose_in_any_order() -> None:
    forth, back = tiny_transformer(), tiny_transformer()
    first = pair_file("diffsynth", make_pairs(forth, 1))
    second, _ = lightx2v_file(forth, make_pairs(forth, 2))
    for model, order in ((forth, (first, second)), (back, (second, first))):
        for tensors in order:
            merge_lora(model, tensors)
    torch.testing.assert_close(forth.state_dict(), back.state_dict(), atol=5e-6, rtol=1e-5)


def test_strength_zero_checks_the_file_and_changes_no_bit() -> None:
    model = tiny_transformer()
    before = weights(model)
    tensors = pair_file("peft", make_pairs(model))
    assert merge_lora(model, tensors, 0.0).applied == len(tensors)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    with pytest.raises(LoadingError):
        merge_lora(model, tensors | {"transformer.blocks.9.x.diff": torch.ones(1)}, 0.0)


def test_low_precision_weights_are_summed_in_float32_and_rounded_once() -> None:
    model = tiny_transformer().to(torch.bfloat16)
    before, pairs = weights(model), make_pairs(model)
    merge_lora(model, pair_file("diffsynth", pairs))
    for name, pair in pairs.items():
        exact = before[f"{name}.weight"].float() + delta(*pair)
        merged = model.get_parameter(f"{name}.weight")
        assert merged.dtype == torch.bfloat16
        # one rounding of bfloat16 is at most 2^-8 of the value
        torch.testing.assert_close(merged.float(), exact, atol=1e-5, rtol=2**-8)


def peft_config(**changes: Any) -> peft.LoraConfig:
    options: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["to_q", "to_k", "ffn.net.2"],
    }
    return peft.LoraConfig(**options | {"init_lora_weights": False} | changes)


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")  # lora_bias is 1-D by nature
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"blocks.1.attn2.to_k": 1}},
        {"lora_bias": True},
    ],
)
@pytest.mark.parametrize("writer", ["diffusers", "peft"])
def test_adapter_saved_by_diffusers_or_peft_merges_to_the_same_output(
    tmp_path: Path, writer: str, changes: Any
) -> None:
    model, trained = tiny_transformer(), tiny_transformer()
    torch.manual_seed(5)
    if writer == "diffusers":
        trained.add_adapter(peft_config(**changes))
        trained.save_lora_adapter(tmp_path)
    else:
        trained = peft.get_peft_model(trained, peft_config(**changes))
        trained.save_pretrained(str(tmp_path))
    report = merge_lora(model, tmp_path)
    assert report.format == "peft"
    torch.testing.assert_close(forward(model), forward(trained), atol=1e-4, rtol=1e-4)
    assert (forward(model) - forward(tiny_transformer())).abs().max() > 1e-2


def test_pipeline_style_metadata_with_a_transformer_prefix_sets_alpha(tmp_path: Path) -> None:
    model = tiny_transformer()
    before, pairs = weights(model), make_pairs(model)
    config = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 6})
    file = tmp_path / "lora.safetensors"
    save_file(pair_file("peft", pairs), file, metadata={"lora_adapter_metadata": config})
    merge_lora(model, file)
    assert_merged(model, before, {f"{n}.weight": delta(*p) for n, p in pairs.items()}, 6 / RANK)


def refusals() -> dict[str, tuple[State, str]]:
    pairs = make_pairs(tiny_transformer())
    good = pair_file("original", pairs)
    key = "diffusion_model.blocks.1.self_attn.q"
    down = f"{key}.lora_down.weight"
    return {
        "wrong shape": (good | {down: torch.ones(RANK, 25)}, r"blocks.1.attn1.to_q.weight \(24, 24"),
        "wrong rank": (good | {down: torch.ones(RANK + 1, 24)}, "does not fit"),
        "unknown layer": (good | {"diffusion_model.blocks.2.modulation.diff": torch.ones(1, 6, 24)}, "no such layer"),
        "unknown kind": (good | {f"{key}.magic": torch.ones(2, 2)}, "magic.*not a known kind"),
        "no such bias": (good | {"diffusion_model.blocks.0.cross_attn.norm_q.diff_b": torch.ones(24)}, "no blocks.0.attn2.norm_q.bias"),
        "half a pair": ({k: v for k, v in good.items() if k != down}, "is missing"),
        "lone alpha": (good | {"diffusion_model.head.modulation.alpha": torch.ones(())}, "is missing"),
        "alpha shape": (good | {f"{key}.alpha": torch.ones(2)}, "not one number"),
        "same layer twice": (good | {"transformer.blocks.1.attn1.to_q.lora_A.weight": good[down]}, "the same as"),
    }  # fmt: skip


@pytest.mark.parametrize("case", refusals())
def test_a_key_that_does_not_fit_refuses_the_file_and_leaves_the_model_untouched(case: str) -> None:
    model = tiny_transformer()
    before = weights(model)
    tensors, message = refusals()[case]
    with pytest.raises(LoadingError, match=message) as error:
        merge_lora(model, tensors)
    assert f"of {len(tensors)} keys match" in str(error.value)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


@pytest.mark.parametrize("case", refusals())
def test_partial_merges_all_other_layers_and_lists_what_it_skipped(case: str) -> None:
    model = tiny_transformer()
    before, pairs = weights(model), make_pairs(model)
    tensors, message = refusals()[case]
    report = merge_lora(model, tensors, allow_partial=True)
    assert report.applied + len(report.skipped) == report.total == len(tensors)
    assert any(re.search(message, text) for text in report.skipped)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    rest = {f"{n}.weight" for n in pairs} - {"blocks.1.attn1.to_q.weight"}
    assert rest <= changed <= {f"{n}.weight" for n in pairs}
    assert_merged(model, before, {n: delta(*pairs[n.removesuffix(".weight")]) for n in changed})


def test_a_file_that_matches_nothing_is_refused_even_if_partial_is_allowed() -> None:
    tensors = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 2)}
    with pytest.raises(LoadingError, match="0 of 1 keys match"):
        merge_lora(tiny_transformer(), tensors, allow_partial=True)
    with pytest.raises(LoadingError, match="empty"):
        merge_lora(tiny_transformer(), {}, allow_partial=True)


def test_values_and_models_that_cannot_be_merged_are_refused(tmp_path: Path) -> None:
    model = tiny_transformer()
    before, tensors = weights(model), pair_file("peft", make_pairs(model))
    key = next(iter(tensors))
    with pytest.raises(LoadingError, match=f"NaN or infinity in {key}"):
        merge_lora(model, tensors | {key: tensors[key] * math.nan}, allow_partial=True)
    with pytest.raises(InputError, match="inf"):
        merge_lora(model, tensors, math.inf)
    file = tmp_path / "lora.safetensors"
    for config, message in (
        ('{"use_dora": true}', "DoRA"),
        ('{"r": 8, "lora_alpha": 8}', "rank 8"),
        ("[1", "cannot be read"),
    ):
        save_file(tensors, file, metadata={"lora_adapter_metadata": config})
        with pytest.raises(LoadingError, match=message):
            merge_lora(model, file)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    with pytest.raises(LoadingError, match="load them before"):
        merge_lora(tiny_transformer().to("meta"), tensors)
    with pytest.raises(LoadingError, match="quantized"):
        merge_lora(tiny_transformer().to(torch.float8_e4m3fn), tensors)
