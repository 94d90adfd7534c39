"""Weights of fp8 and GGUF files: what they mean, in the memory that their file takes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import gguf
import pytest
import torch
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from swifti2v.errors import ConfigError, LoadingError
from swifti2v.models.loading.components import load_model
from swifti2v.models.loading.sources import Reference
from swifti2v.models.lora.merge import merge_lora
from swifti2v.models.weights.files import read_state_dict, read_weights
from swifti2v.models.weights.names import umt5_state_dict
from swifti2v.models.weights.packed import (
    PackedLinear,
    PackedWeight,
    is_packed,
    packed_layers,
)
from swifti2v.models.weights.quantization import quantize
from tests.helpers import hub
from tests.helpers import packed_files as layouts
from tests.helpers.packed_files import SAFETENSORS, WRITABLE, State
from tests.unit.models.weights import test_names as wan_files

WIDE = hub.SIZES | {"num_attention_heads": 2, "ffn_dim": 256}
"""Rows of 256 values, which the blocks of GGUF's K types have."""
WIDE_TEXT = UMT5Config(**hub.TEXT.to_dict() | {"d_model": 64, "d_ff": 64, "d_kv": 32})


@pytest.fixture(scope="module")
def native() -> State:
    """A 5B at a tiny size, under the names of Wan's own files."""
    return wan_files.original_transformer(hub.state_of(hub.stage2_base()))


@pytest.fixture(scope="module")
def encoder() -> State:
    state = hub.state_of(hub.make(UMT5EncoderModel, WIDE_TEXT))
    return {k: v for k, v in state.items() if k != "encoder.embed_tokens.weight"}


def load(role: str, file: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(role, file, dtype).eval()


def load_meaning(
    role: str, meaning: State, folder: Path, dtype: torch.dtype = torch.float32
) -> Any:
    """The same model from whole weights."""
    save_file({k: t.contiguous().clone() for k, t in meaning.items()}, folder / "whole.safetensors")
    return load(role, folder / "whole.safetensors", dtype)


@torch.no_grad()
def denoise(transformer: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 48, 2, 4, 4, generator=generator).to(dtype)
    text = torch.randn(1, 5, 16, generator=generator).to(dtype)
    inputs = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": text}
    found: torch.Tensor = transformer(latents, **inputs, return_dict=False)[0]
    return found


@torch.no_grad()
def encode(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([[3, 4, 5, 1]]))[0]
    return found


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_transformer_computes_what_its_file_means(
    name: str, native: State, tmp_path: Path
) -> None:
    layout = layouts.write(SAFETENSORS[name](native), tmp_path / "a.safetensors")
    found = load("stage1_transformer", tmp_path / "a.safetensors")
    wanted = load_meaning("stage1_transformer", layout.meaning, tmp_path)
    assert torch.equal(denoise(found), denoise(wanted))
    assert is_packed(found) == (name in layouts.PACKED)
    for _, layer in packed_layers(found):  # a byte for each value, not four
        scale = 0 if layer.scale is None else int(layer.scale.nbytes)
        size = layer.out_features * layer.in_features
        assert layer.packed.nbytes == size
        assert scale <= size // 4


@pytest.mark.parametrize("names", ["transformers", "Wan"])
@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_text_encoder_computes_what_its_file_means(
    name: str, names: str, encoder: State, tmp_path: Path
) -> None:
    state = encoder if names == "transformers" else wan_files.original_umt5(encoder)
    layout = SAFETENSORS[name](state)
    if names == "transformers":  # as ComfyUI packs it
        layout.tensors["spiece_model"] = torch.arange(50, dtype=torch.uint8)
    layouts.write(layout, tmp_path / "a.safetensors")
    found = load("text_encoder", tmp_path / "a.safetensors")
    wanted = load_meaning("text_encoder", layout.meaning, tmp_path)
    assert torch.equal(encode(found), encode(wanted))
    assert found.shared.weight is found.encoder.embed_tokens.weight
    assert is_packed(found) == (name in layouts.PACKED)


@pytest.mark.parametrize("flat", [False, True], ids=["5 dimensions", "4 dimensions"])
@pytest.mark.parametrize("kind", WRITABLE)
def test_a_gguf_transformer_computes_what_its_file_means(
    kind: str, flat: bool, tmp_path: Path
) -> None:
    state = hub.state_of(hub.make(diffusers.WanTransformer3DModel, **hub.STAGE2 | WIDE))
    native = wan_files.original_transformer(state)
    meaning = layouts.write_gguf(native, tmp_path / "a.gguf", kind, flat=flat)
    found = load("stage1_transformer", tmp_path / "a.gguf")
    wanted = load_meaning("stage1_transformer", meaning, tmp_path)
    assert torch.equal(denoise(found), denoise(wanted))
    block_size, type_size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    for name, layer in packed_layers(found):
        assert layer.packed.nbytes * block_size == wanted.get_submodule(name).weight.numel() * (
            type_size
        )
    assert is_packed(found) == (kind not in ("F32", "F16", "BF16"))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_a_gguf_text_encoder_computes_what_its_file_means(
    kind: str, encoder: State, tmp_path: Path
) -> None:
    def keeps(key: str, tensor: torch.Tensor) -> bool:  # the embedding, too, as city96 does
        return tensor.ndim == 2 and "rel_b" not in key

    state = layouts.gguf_umt5(encoder)
    meaning = layouts.write_gguf(state, tmp_path / "a.gguf", kind, "t5encoder", keeps=keeps)
    found = load("text_encoder", tmp_path / "a.gguf")
    names = {k: t for k, t in umt5_state_dict(meaning).items() if isinstance(t, torch.Tensor)}
    assert torch.equal(encode(found), encode(load_meaning("text_encoder", names, tmp_path)))
    assert found.shared.weight is found.encoder.embed_tokens.weight
    assert len(list(packed_layers(found))) == 7 * WIDE_TEXT.num_layers


def test_transformers_reads_the_same_from_a_gguf_text_encoder(
    encoder: State, tmp_path: Path
) -> None:
    """Its reader unpacks all weights at once, and takes the file for a T5 by another name."""

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(WIDE_TEXT.num_layers)
        writer.add_embedding_length(WIDE_TEXT.d_model)
        writer.add_feed_forward_length(WIDE_TEXT.d_ff)
        writer.add_head_count(WIDE_TEXT.num_heads)
        writer.add_key_length(WIDE_TEXT.d_kv)
        writer.add_vocab_size(WIDE_TEXT.vocab_size)
        writer.add_relative_attn_buckets_count(WIDE_TEXT.relative_attention_num_buckets)

    state = layouts.gguf_umt5(encoder)
    file = tmp_path / "a.gguf"
    layouts.write_gguf(state, file, "Q8_0", "t5encoder", name="umt5-xxl", describe=describe)
    theirs: Any = UMT5EncoderModel.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    assert torch.equal(encode(load("text_encoder", file)), encode(theirs.eval()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ComfyUI old e5m2", "musubi block", "BFL"])
def test_values_are_rounded_once(
    name: str, dtype: torch.dtype, native: State, tmp_path: Path
) -> None:
    layout = layouts.write(SAFETENSORS[name](native), tmp_path / "a.safetensors")
    for key, weight in read_weights(tmp_path / "a.safetensors").items():
        if isinstance(weight, PackedWeight):
            assert torch.equal(weight.unpack(dtype), layout.meaning[key].to(dtype))
    found = load("stage1_transformer", tmp_path / "a.safetensors", dtype)
    wanted = load_meaning("stage1_transformer", layout.meaning, tmp_path, dtype)
    assert torch.equal(denoise(found, dtype), denoise(wanted, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_text_encoder_keeps_its_float32_layers_in_float16(
    dtype: torch.dtype, encoder: State, tmp_path: Path
) -> None:
    layout = layouts.write(SAFETENSORS["ComfyUI new"](encoder), tmp_path / "a.safetensors")
    found = load("text_encoder", tmp_path / "a.safetensors", dtype)
    wanted = load_meaning("text_encoder", layout.meaning, tmp_path, dtype)
    assert torch.equal(encode(found), encode(wanted))
    layer = found.encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(layer, PackedLinear)
    assert layer.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)


@pytest.mark.parametrize("reference", ["channels", "none"])
def test_stage2_is_made_of_a_packed_base(
    reference: Reference, native: State, tmp_path: Path
) -> None:
    layout = layouts.write(SAFETENSORS["ComfyUI new"](native), tmp_path / "a.safetensors")
    found = load_model("stage2_transformer", tmp_path / "a.safetensors", torch.float32, reference)
    save_file(layout.meaning, tmp_path / "whole.safetensors")
    wanted = load_model(
        "stage2_transformer", tmp_path / "whole.safetensors", torch.float32, reference
    )
    assert is_packed(found)
    assert found.config["in_channels"] == (96 if reference == "channels" else 48)
    for name, layer in packed_layers(found):
        assert torch.equal(layer.unpack(torch.float32), wanted.get_submodule(name).weight)


@pytest.mark.parametrize("count", [1, 128])
def test_scales_of_a_convolution_are_applied(count: int, native: State, tmp_path: Path) -> None:
    layout = SAFETENSORS["BFL"](native)
    key = "patch_embedding.weight"
    layout.tensors[key] = native[key].to(layouts.E4M3)
    scale = layout.tensors["patch_embedding.weight_scale"] = torch.linspace(0.5, 2, count)
    layout.meaning[key] = layout.tensors[key].float() * scale.reshape(-1, 1, 1, 1, 1)
    layouts.write(layout, tmp_path / "a.safetensors")
    found = load("stage1_transformer", tmp_path / "a.safetensors")
    wanted = load_meaning("stage1_transformer", layout.meaning, tmp_path)
    assert torch.equal(denoise(found), denoise(wanted))


@pytest.mark.parametrize("layout", ["ComfyUI old", "GGUF Q8_0"])
def test_loras_are_added_to_packed_layers(layout: str, native: State, tmp_path: Path) -> None:
    if layout.startswith("GGUF"):
        file = tmp_path / "a.gguf"
        meaning = layouts.write_gguf(native, file, "Q8_0")
    else:
        file = tmp_path / "a.safetensors"
        meaning = layouts.write(SAFETENSORS[layout](native), file).meaning
    found = load("stage1_transformer", file)
    wanted = load_meaning("stage1_transformer", meaning, tmp_path)
    before = denoise(found)
    torch.manual_seed(2)
    for rank, strength in ((2, 0.7), (3, 1.5)):  # one after the other
        lora: State = {"diffusion_model.blocks.1.ffn.2.diff_b": torch.randn(128)}
        for place in ("blocks.0.self_attn.q", "blocks.1.ffn.2", "head.head"):
            out, inside = native[f"{place}.weight"].shape
            lora[f"diffusion_model.{place}.lora_down.weight"] = torch.randn(rank, inside) / 9
            lora[f"diffusion_model.{place}.lora_up.weight"] = torch.randn(out, rank) / 9
        reports = [merge_lora(model, lora, strength) for model in (found, wanted)]
        assert reports[0].applied == reports[1].applied == len(lora)
    assert not torch.allclose(denoise(found), before)
    torch.testing.assert_close(denoise(found), denoise(wanted), atol=2e-5, rtol=2e-5)


def test_a_whole_difference_is_refused_by_a_packed_layer(native: State, tmp_path: Path) -> None:
    layouts.write(SAFETENSORS["BFL"](native), tmp_path / "a.safetensors")
    model = load("stage1_transformer", tmp_path / "a.safetensors")
    before = denoise(model)
    lora = {"diffusion_model.blocks.0.ffn.2.diff": torch.ones(128, 32)}
    with pytest.raises(LoadingError, match=r"whole difference.*use the bf16 files"):
        merge_lora(model, lora)
    assert torch.equal(denoise(model), before)


def test_packed_weights_are_not_packed_again(native: State, tmp_path: Path) -> None:
    layouts.write(SAFETENSORS["BFL"](native), tmp_path / "a.safetensors")
    model = load("stage1_transformer", tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="packed already"):
        quantize(model, "int8", torch.device("cpu"))


def test_other_readers_get_whole_weights(native: State, tmp_path: Path) -> None:
    layout = layouts.write(SAFETENSORS["musubi channel"](native), tmp_path / "a.safetensors")
    state = read_state_dict(tmp_path / "a.safetensors")
    assert state.keys() == layout.meaning.keys()
    assert all(torch.equal(state[key].float(), layout.meaning[key].float()) for key in state)


def test_a_layer_tells_the_type_that_code_casts_to(native: State, tmp_path: Path) -> None:
    layouts.write(SAFETENSORS["BFL"](native), tmp_path / "a.safetensors")
    model = load("stage1_transformer", tmp_path / "a.safetensors", torch.bfloat16)
    layer = model.blocks[0].attn1.to_q
    assert isinstance(layer, PackedLinear)
    assert (layer.weight.dtype, layer.weight.shape) == (torch.bfloat16, (128, 128))
    assert model.to(torch.float64).blocks[0].attn1.to_q.packed.dtype == torch.uint8


Change = Callable[[State, dict[str, str]], None]
Q = "blocks.0.self_attn.q"


def drop(key: str) -> Change:
    return lambda tensors, _: tensors.__delitem__(key)


def put(key: str, value: torch.Tensor) -> Change:
    return lambda tensors, _: tensors.__setitem__(key, value)


def note(value: Any) -> Change:
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    return put(f"{Q}.comfy_quant", text)


def head(layer: str) -> Change:
    def change(_: State, metadata: dict[str, str]) -> None:
        layers = {layer: {"format": "float8_e4m3fn"}}
        metadata["_quantization_metadata"] = json.dumps({"layers": layers})

    return change


def without_scales(tensors: State, _: dict[str, str]) -> None:
    for key in [key for key in tensors if key.endswith((".scale_weight", ".scale_input"))]:
        del tensors[key]


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("BFL", drop(f"{Q}.weight"), f"{Q}.weight_scale and no weight for it"),
        ("ComfyUI new", drop(f"{Q}.weight"), "layers that are not in it|no weight for it"),
        ("BFL", drop(f"{Q}.weight_scale"), f"none of 1: {Q}.weight.*mixed from two files"),
        ("ComfyUI old", without_scales, "holds no scale of any layer: they were lost"),
        ("BFL", put(f"{Q}.scale_weight", torch.ones(1)), f"two scales of {Q}.weight"),
        ("BFL", put(f"{Q}.weight_scale", torch.ones(7)), "is no scale of a weight"),
        ("BFL", put(f"{Q}.weight_scale", torch.full((128,), torch.nan)), "fetch it again"),
        ("BFL", put(f"{Q}.weight_scale", torch.zeros(128)), "zero, negative or no numbers"),
        ("BFL", put(f"{Q}.weight", torch.zeros(128, 128, dtype=torch.int8)), "torch.int8"),
        ("BFL", put(f"{Q}.weight_scale_2", torch.ones(1)), "NVFP4"),
        ("BFL", put(f"{Q}.pre_quant_scale", torch.ones(128)), "AWQ"),
        ("ComfyUI new", note({"format": "nvfp4"}), "formats that are not read.*nvfp4"),
        ("ComfyUI new", note([1]), "cannot be read"),
        ("ComfyUI new", head("blocks.9.ffn.0"), "tells of 1 layers that are not in it"),
    ],
)
def test_scales_are_applied_or_the_file_is_refused(
    layout: str, change: Change, message: str, native: State, tmp_path: Path
) -> None:
    found = SAFETENSORS[layout](native)
    change(found.tensors, found.metadata)
    layouts.write(found, tmp_path / "a.safetensors")
    with pytest.raises(LoadingError, match=message):
        load("stage1_transformer", tmp_path / "a.safetensors")


def test_files_of_two_models_do_not_load_as_one(native: State, tmp_path: Path) -> None:
    first = layouts.write(SAFETENSORS["bf16"](native), tmp_path / "a-00001-of-00002.safetensors")
    layouts.write(first, tmp_path / "b-00002-of-00002.safetensors")
    with pytest.raises(LoadingError, match=r"a-00001-of-00002.*b-00002-of-00002.*name one of them"):
        read_weights(tmp_path)


def test_malformed_gguf_is_refused_with_the_reason(native: State, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    layouts.write_gguf(native, file, "Q8_0", architecture=None)
    with pytest.raises(LoadingError, match=r"does not say which model.*city96 and QuantStack"):
        load("stage1_transformer", file)
    layouts.write_gguf(native, file, "Q8_0", architecture="llama")
    with pytest.raises(LoadingError, match="says 'llama'"):
        load("stage1_transformer", file)
    flat = {k: t.squeeze(0) if "modulation" in k else t for k, t in native.items()}
    layouts.write_gguf(flat, file, "Q8_0")
    with pytest.raises(LoadingError, match=r"scale_shift_table.*\[6, 128\].*\[1, 6, 128\]"):
        load("stage1_transformer", file)


def test_a_gguf_file_of_an_unknown_type_is_refused(native: State, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    key = f"{Q}.weight"
    kind = gguf.GGMLQuantizationType.TQ1_0  # gguf knows it, diffusers does not
    wide = {key: torch.randn(2, 256)}
    writer = gguf.GGUFWriter(file, "wan")
    writer.add_tensor(key, gguf.quantize(wide[key].numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LoadingError, match=rf"{key} is of the type TQ1_0.*Q4_K"):
        read_weights(file)
    content = bytearray(file.read_bytes())
    place = content.index(key.encode()) + len(key) + 4 + 2 * 8
    content[place : place + 4] = (999).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(LoadingError, match=r"999.*pip install -U gguf"):
        read_weights(file)


def test_the_package_for_gguf_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'swifti2v\[gguf\]'"):
        read_weights(tmp_path / "a.gguf")


@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
def test_a_gguf_file_that_is_cut_short_is_refused(
    part: float, native: State, tmp_path: Path
) -> None:
    file = tmp_path / "a.gguf"
    layouts.write_gguf(native, file, "Q8_0")
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * part)])
    with pytest.raises(LoadingError, match="damaged or cut short"):
        read_weights(file)


def test_a_t5_is_not_taken_for_umt5(encoder: State, tmp_path: Path) -> None:
    """It has one position bias; transformers tells the two by ``general.name`` alone."""
    state = layouts.gguf_umt5(encoder)
    del state["enc.blk.1.attn_rel_b.weight"]
    layouts.write_gguf(state, tmp_path / "a.gguf", "Q8_0", "t5encoder")
    with pytest.raises(LoadingError, match="1 of 2 blocks have a position bias: this is a T5"):
        load("text_encoder", tmp_path / "a.gguf")
