import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from swifti2v.errors import InputError, LoadingError, NumericalError, StorageError
from swifti2v.models.lora.export import (
    LORA_STYLES,
    LoraStyle,
    convert_lora,
    fold,
    save_lora,
)
from swifti2v.models.lora.merge import merge_lora
from swifti2v.models.weights.files import read_tensors, write_tensors
from swifti2v.training.adapters import AdapterConfig, adapter_state_dict, add_adapter
from tests.unit.models.lora.test_merge import (
    FAMILIES,
    State,
    delta,
    forward,
    lightx2v_file,
    make_pairs,
    pair_file,
    tiny_transformer,
    weights,
)

RANK = 4
IN_BLOCKS = (r"blocks\.\d+\..*",)
THEIR_READERS: dict[str, Any] = {
    "original": lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers,
    "kohya": lora_conversion_utils._convert_musubi_wan_lora_to_diffusers,
}


def trained(alpha: float | None = None, targets: tuple[str, ...] = (".*",), **options: Any) -> Any:
    """A tiny transformer whose adapter has learned something."""
    model = tiny_transformer()
    add_adapter(model, AdapterConfig(rank=RANK, alpha=alpha, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in adapter_state_dict(model).values():
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return model


def fused_weights(model: Any) -> State:
    """The weights as peft itself merges them."""
    model.fuse_lora()
    state = {k.replace(".base_layer.", "."): t.clone() for k, t in model.state_dict().items()}
    model.unfuse_lora()
    return {key: tensor for key, tensor in state.items() if ".lora_" not in key}


def assert_weights(found: Any, expected: State) -> None:
    # float32 sums of four products of numbers below 10, in another order
    torch.testing.assert_close(weights(found), expected, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("alpha", [None, 2.0, 5.3])
@pytest.mark.parametrize("style", LORA_STYLES)
def test_a_saved_adapter_merges_to_what_peft_merges_and_to_the_trained_output(
    tmp_path: Path, style: LoraStyle, alpha: float | None
) -> None:
    model, fresh = trained(alpha), tiny_transformer()
    file = tmp_path / "lora.safetensors"
    state = adapter_state_dict(model)
    save_lora(state, file, style, alpha=alpha or RANK)
    report = merge_lora(fresh, file)
    assert report.format == style
    num_alphas = sum(key.endswith(".alpha") for key in load_file(file))
    assert report.applied == len(state) + num_alphas
    assert (num_alphas > 0) == (style in ("original", "kohya"))
    assert_weights(fresh, fused_weights(model))
    torch.testing.assert_close(forward(fresh), forward(model), atol=3e-5, rtol=3e-5)
    assert (forward(fresh) - forward(tiny_transformer())).abs().max() > 0.1


def test_keys_are_those_of_each_format(tmp_path: Path) -> None:
    model = trained(targets=("blocks.1.attn2.to_out.0", "blocks.1.ffn.net.0.proj"))
    stems = {
        "peft": "transformer.blocks.1.attn2.to_out.0.lora_A.weight",
        "original": "diffusion_model.blocks.1.cross_attn.o.lora_down.weight",
        "diffsynth": "blocks.1.cross_attn.o.lora_A.default.weight",
        "kohya": "lora_unet_blocks_1_cross_attn_o.lora_down.weight",
    }
    last = {
        "peft": "transformer.blocks.1.ffn.net.0.proj.lora_B.weight",
        "original": "diffusion_model.blocks.1.ffn.0.alpha",
        "diffsynth": "blocks.1.ffn.0.lora_B.default.weight",
        "kohya": "lora_unet_blocks_1_ffn_0.alpha",
    }
    for style in LORA_STYLES:
        save_lora(adapter_state_dict(model), tmp_path / "x.safetensors", style, alpha=RANK)
        keys = load_file(tmp_path / "x.safetensors").keys()
        assert {stems[style], last[style]} <= keys
        assert len(keys) == (6 if style in THEIR_READERS else 4)


def changes_without_header(file: State) -> State:
    """Scale as ComfyUI, LightX2V and musubi-tuner read it: alpha / rank by a tensor, else 1."""
    changes = {}
    for key, up in file.items():
        if match := re.fullmatch(r"(.+)\.lora_(?:up|B)(?:\.default)?\.weight", key):
            sides = [t for k, t in file.items() if k.startswith(f"{match[1]}.lora_")]
            down = next(tensor for tensor in sides if tensor is not up)
            alpha = file.get(f"{match[1]}.alpha", torch.tensor(float(len(down))))
            changes[match[1]] = alpha / len(down) * delta(up, down)
    return changes


@pytest.mark.parametrize("alpha", [4.0, 5.3])
@pytest.mark.parametrize("style", LORA_STYLES)
def test_programs_that_know_no_header_take_the_same_scale(
    tmp_path: Path, style: LoraStyle, alpha: float
) -> None:
    state = adapter_state_dict(trained(alpha))
    save_lora(state, tmp_path / "lora.safetensors", style, alpha=alpha)
    expected = {
        FAMILIES[style](name, 0).rpartition(".lora_")[0]: alpha / RANK * change
        for name, change in changes_without_header(state).items()
    }
    found = changes_without_header(load_file(tmp_path / "lora.safetensors"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alpha", [4.0, 6.0])
@pytest.mark.parametrize("style", ["original", "kohya"])
def test_diffusers_own_readers_take_the_original_and_the_kohya_file(
    tmp_path: Path, style: LoraStyle, alpha: float
) -> None:
    # kohya's layers are those of the blocks; patch embeddings have no place in diffusers' reader
    targets = IN_BLOCKS if style == "kohya" else (*IN_BLOCKS, "condition_embedder.*", "proj_out")
    model, theirs = trained(alpha, targets), tiny_transformer()
    file = tmp_path / "lora.safetensors"
    save_lora(adapter_state_dict(model), file, style, alpha=alpha)
    theirs.load_lora_adapter(THEIR_READERS[style](load_file(file)), prefix="transformer")
    torch.testing.assert_close(forward(theirs), forward(model), atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_diffusers_loads_the_peft_file(tmp_path: Path, use_dora: bool) -> None:
    targets = IN_BLOCKS if use_dora else (".*",)
    model, theirs = trained(6.0, targets, use_dora=use_dora), tiny_transformer()
    state = adapter_state_dict(model)
    save_lora(state, tmp_path / "lora.safetensors", "peft", alpha=6)
    theirs.load_lora_adapter(tmp_path, weight_name="lora.safetensors")
    torch.testing.assert_close(forward(theirs), forward(model), atol=3e-5, rtol=3e-5)
    assert any("magnitude" in key for key in state) == use_dora


def test_a_dora_goes_into_peft_only(tmp_path: Path) -> None:
    state = adapter_state_dict(trained(None, IN_BLOCKS, use_dora=True))
    file = tmp_path / "lora.safetensors"
    for style in set(LORA_STYLES) - {"peft"}:
        with pytest.raises(InputError, match=f"{style}.*cannot carry a DoRA.*use 'peft'"):
            save_lora(state, file, style, alpha=RANK)
    assert not file.exists()
    save_lora(state, file, "peft", alpha=RANK)
    with pytest.raises(LoadingError, match="DoRA"):
        merge_lora(tiny_transformer(), file)
    with pytest.raises(LoadingError, match="DoRA"):
        convert_lora(file, tmp_path / "other.safetensors", "peft")
    del state[next(key for key in state if "magnitude" in key)]
    with pytest.raises(LoadingError, match=r"has a pair and a magnitude.*attn1\.to_q"):
        save_lora(state, file, "peft", alpha=RANK)


def test_the_peft_config_of_another_lora_in_the_folder_does_not_count(tmp_path: Path) -> None:
    model, fresh = trained(2.0), tiny_transformer()
    config = {"r": RANK, "lora_alpha": 64}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_lora(adapter_state_dict(model), tmp_path / "lora.safetensors", "peft", alpha=2)
    merge_lora(fresh, tmp_path / "lora.safetensors")
    assert_weights(fresh, fused_weights(model))


def test_metadata_come_back_and_go_along_into_another_format(tmp_path: Path) -> None:
    state = adapter_state_dict(trained())
    own = {"swifti2v_base": "Wan-AI/x", "swifti2v_config": '{"rank": 4}'}
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_lora(state, first, "peft", alpha=2, metadata=own)
    convert_lora(first, second, "kohya")
    for file in (first, second):
        found = read_tensors(file)[1]
        assert own.items() <= found.items()
        assert found["swifti2v_rank"] == "4"
        assert found["swifti2v_version"]
    assert read_tensors(first)[1]["swifti2v_alpha"] == "2"
    assert "lora_adapter_metadata" not in read_tensors(second)[1]


@pytest.mark.parametrize("style", LORA_STYLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_file_changes_the_weights_as_the_source_does(
    tmp_path: Path, family: str, style: LoraStyle
) -> None:
    one, other = tiny_transformer(), tiny_transformer()
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(pair_file(family, make_pairs(one), alpha=1.7), source)
    merge_lora(one, source)
    done = convert_lora(source, target, style)
    report = merge_lora(other, target)
    assert done.source_style in family
    assert report.format == style
    assert report.applied == report.total
    assert done.num_layers == len(make_pairs(one))
    # products reach 50; float32 keeps seven digits
    torch.testing.assert_close(weights(other), weights(one), atol=1e-5, rtol=2e-6)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.sampled_from(LORA_STYLES), min_size=1, max_size=4),
    st.floats(0.01, 100),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_chain_of_conversions_keeps_the_change(
    tmp_path: Path, chain: list[LoraStyle], alpha: float, dtype: torch.dtype
) -> None:
    pairs = {n: p for n, p in make_pairs(tiny_transformer()).items() if "blocks.1" in n}
    pairs = {name: (up.to(dtype), down.to(dtype)) for name, (up, down) in pairs.items()}
    file = tmp_path / "0.safetensors"
    save_file(pair_file("original", pairs, alpha), file)
    for number, style in enumerate(chain, 1):
        convert_lora(file, tmp_path / f"{number}.safetensors", style)
        file = tmp_path / f"{number}.safetensors"
    model = tiny_transformer()
    before = weights(model)
    merge_lora(model, file)
    for name, (up, down) in pairs.items():
        expected = before[f"{name}.weight"].double() + delta(up.double(), down.double()) * alpha / 3
        found = model.get_parameter(f"{name}.weight").double()
        # a few roundings to float32 of values that reach 50 * alpha
        torch.testing.assert_close(found, expected, atol=2e-5 * max(1, alpha), rtol=1e-6)


def test_pairs_keep_every_bit_where_the_format_has_alpha(tmp_path: Path) -> None:
    state = adapter_state_dict(trained(5.3, IN_BLOCKS))
    for style in ("original", "kohya"):
        save_lora(state, tmp_path / "x.safetensors", style, alpha=5.3)
        saved = load_file(tmp_path / "x.safetensors").values()
        for tensor in state.values():
            assert any(torch.equal(tensor, found) for found in saved)


def test_folding_keeps_the_dtype_only_where_nothing_is_rounded() -> None:
    tensor = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert fold(tensor, 1.0) is tensor
    assert fold(tensor, 0.25).dtype == torch.bfloat16
    torch.testing.assert_close(fold(tensor, 0.25).float(), tensor.float() / 4, atol=0, rtol=0)
    assert fold(tensor, 0.3).dtype == torch.float32
    torch.testing.assert_close(fold(tensor, 0.3), tensor.float() * 0.3, atol=0, rtol=2**-23)


def test_full_differences_go_into_the_original_format_only(tmp_path: Path) -> None:
    one, other = tiny_transformer(), tiny_transformer()
    tensors, _ = lightx2v_file(one, make_pairs(one))
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, source)
    done = convert_lora(source, target, "original")
    assert done.num_full == len(tensors) - 2 * done.num_layers
    merge_lora(one, source)
    merge_lora(other, target)
    torch.testing.assert_close(weights(other), weights(one), atol=0, rtol=0)
    for style in set(LORA_STYLES) - {"original"}:
        with pytest.raises(InputError, match=r"no place for the full differences of .*\(diff"):
            convert_lora(source, tmp_path / "c.safetensors", style)
    assert not (tmp_path / "c.safetensors").exists()


def test_biases_of_a_peft_lora_become_bias_differences(tmp_path: Path) -> None:
    one, other = tiny_transformer(), tiny_transformer()
    tensors = pair_file("peft", {"blocks.0.attn1.to_q": make_pairs(one)["blocks.0.attn1.to_q"]})
    tensors["transformer.blocks.0.attn1.to_q.lora_B.bias"] = torch.arange(24.0)
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    config = {"transformer.r": 3, "transformer.lora_alpha": 6}
    save_file(tensors, source, {"lora_adapter_metadata": json.dumps(config)})
    convert_lora(source, target, "original")
    for model, file in ((one, source), (other, target)):
        merge_lora(model, file)
    assert_weights(other, weights(one))
    added = other.get_parameter("blocks.0.attn1.to_q.bias")
    base = tiny_transformer().get_parameter("blocks.0.attn1.to_q.bias")
    torch.testing.assert_close(added, base + 2 * torch.arange(24.0))
    convert_lora(source, tmp_path / "c.safetensors", "peft")
    third = tiny_transformer()
    merge_lora(third, tmp_path / "c.safetensors")
    assert_weights(third, weights(one))
    with pytest.raises(InputError, match=r"'kohya' has no place for the biases of blocks\.0"):
        convert_lora(source, target, "kohya")


KEY = "blocks.0.attn1.to_q.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "options", "kind", "message"),
    [
        ({KEY: None}, {}, LoadingError, "no pair of one rank"),
        ({KEY: torch.ones(3, 24)}, {}, LoadingError, "no pair of one rank"),
        ({"blocks.0.attn7.to_q.lora_A.weight": torch.ones(4, 24)}, {}, LoadingError, "attn7"),
        ({"blocks.9999.attn1.to_q.diff": torch.ones(1)}, {}, LoadingError, "no such layer"),
        ({KEY: torch.full((4, 24), torch.nan)}, {}, NumericalError, "NaN or infinity in blocks.0"),
        ({"blocks.0.attn1.to_q.alpha": torch.ones(())}, {}, InputError, "alpha is an argument"),
        ({}, {"alpha": 0.0}, InputError, "alpha is 0.0"),
        ({}, {"style": "lycoris"}, InputError, "'lycoris' is unknown; use one of peft, original"),
        ({}, {"name": "lora.pt"}, InputError, "must end in .safetensors"),
        ({}, {"metadata": {"rank": 4}}, InputError, "metadata rank is not text"),
        ({}, {"name": "no/such/lora.safetensors"}, StorageError, "cannot be written"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_the_old_file_stays(
    tmp_path: Path, change: dict[str, Any], options: dict[str, Any], kind: Any, message: str
) -> None:
    state = adapter_state_dict(trained()) | change
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    given: dict[str, Any] = {
        "name": "lora.safetensors",
        "style": "original",
        "alpha": 4.0,
    } | options
    file = tmp_path / given.pop("name")
    old = tmp_path / "lora.safetensors"
    old.write_text("old")
    with pytest.raises(kind, match=message):
        save_lora(state, file, given.pop("style"), **given)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]
    assert old.read_text() == "old"


def test_a_source_that_is_no_lora_is_refused(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for tensors, message in (
        (weights(tiny_transformer()), "a checkpoint of whole weights, not a LoRA"),
        ({"lora_te_x.lora_down.weight": torch.ones(2, 2)}, "for a text encoder"),
        ({"blocks.0.attn1.to_q.dora_scale": torch.ones(2, 2)}, "is a DoRA"),
        ({KEY: torch.full((2, 2), torch.inf)}, "NaN or infinity"),
    ):
        save_file(tensors, source)
        with pytest.raises(LoadingError, match=message):
            convert_lora(source, target, "peft")
    assert not target.exists()


def test_tensors_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_tensors({"a": torch.arange(6).view(2, 3).T}, file, {"k": "v"})
    write_tensors({"a": torch.arange(3)}, file, {})
    assert load_file(file)["a"].tolist() == [0, 1, 2]
    assert read_tensors(file)[1] == {"format": "pt"}
    assert list(tmp_path.iterdir()) == [file]
