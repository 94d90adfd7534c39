"""Few-step LoRAs of Wan2.2-TI2V-5B as they are published: FastWan's and LongLive-Plug's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from swifti2v.errors import LoadingError
from swifti2v.models.lora.merge import merge_lora
from tests.unit.models.lora.test_merge import (
    RANK,
    Pairs,
    State,
    assert_merged,
    delta,
    make_pairs,
    original,
    tiny_transformer,
    weights,
)

ALPHA = 6.0


def block_pairs(seed: int) -> Pairs:
    pairs = make_pairs(tiny_transformer(), seed)
    return {name: pair for name, pair in pairs.items() if name.startswith("blocks.")}


def write_plug(folder: Path, pairs: Pairs) -> Path:
    """A PEFT adapter over Wan's own names: alpha stands in the file beside it."""
    folder.mkdir()
    tensors = {
        f"base_model.model.{original(name)}.lora_{'BA'[side]}.weight": pair[side].contiguous()
        for name, pair in pairs.items()
        for side in (0, 1)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_both_files_of_longlive_plug_merge_in_full_each_with_its_weight(tmp_path: Path) -> None:
    model, base = tiny_transformer(), weights(tiny_transformer())
    steps, guidance = block_pairs(1), block_pairs(2)
    for name, pairs, strength in (("few-step", steps, 1.0), ("cfg", guidance, 0.5)):
        folder = write_plug(tmp_path / name, pairs)
        before = weights(model)
        report = merge_lora(model, folder / "adapter_model.safetensors", strength)
        assert report.applied == report.total == 2 * len(pairs)
        scaled = {f"{k}.weight": strength * delta(*pair) for k, pair in pairs.items()}
        assert_merged(model, before, scaled, ALPHA / RANK)
    both = {f"{k}.weight": delta(*steps[k]) + 0.5 * delta(*guidance[k]) for k in steps}
    assert_merged(model, base, both, ALPHA / RANK)


@pytest.mark.parametrize("stranger", ["blocks.7.self_attn.q", "vace_blocks.0.self_attn.q"])
def test_a_key_of_longlive_plug_without_a_layer_refuses_all_of_it(
    tmp_path: Path, stranger: str
) -> None:
    model = tiny_transformer()
    before = weights(model)
    folder = write_plug(tmp_path / "plug", block_pairs(1))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = f"base_model.model.{stranger}.lora_A.weight"
    save_file(tensors | {key: torch.ones(RANK, 24)}, file)
    with pytest.raises(LoadingError, match=f"{len(tensors)} of {len(tensors) + 1} keys match"):
        merge_lora(model, file)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def fastwan(model: Any, pairs: Pairs) -> tuple[State, State]:
    """Pairs and biases of the linear layers, norms, and the bias alone of the patch embedding; no
    alpha.
    """
    tensors: State = {}
    deltas: State = {}
    for name, layer in model.named_modules():
        stem, bias = f"diffusion_model.{original(name)}", getattr(layer, "bias", None)
        if isinstance(layer, torch.nn.Linear):
            for side, word in enumerate(("up", "down")):
                tensors[f"{stem}.lora_{word}.weight"] = pairs[name][side]
            deltas[f"{name}.weight"] = delta(*pairs[name])
        elif name.endswith(("norm_q", "norm_k", "norm2")) and name.startswith("blocks."):
            deltas[f"{name}.weight"] = tensors[f"{stem}.diff"] = torch.full(layer.weight.shape, 0.3)
        elif name != "patch_embedding":
            continue
        if bias is not None:
            deltas[f"{name}.bias"] = tensors[f"{stem}.diff_b"] = torch.full(bias.shape, 0.1)
    return tensors, deltas


def test_fastwan_merges_in_full() -> None:
    """Its file has 1,099 keys for the 30 blocks of Wan2.2-TI2V-5B: 36 a block and 19 others."""
    model: Any = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=32, num_layers=2,
    )  # fmt: skip
    before = weights(model)
    tensors, deltas = fastwan(model, make_pairs(model))
    assert len(tensors) == 2 * 36 + 19
    report = merge_lora(model, tensors)
    assert report.applied == report.total == len(tensors)
    assert_merged(model, before, deltas)
