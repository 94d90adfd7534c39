"""Base weights of a LoRA: differences that the hash sees, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from swifti2v.errors import LoadingError
from swifti2v.models.lora.export import save_lora
from swifti2v.models.lora.provenance import (
    BASE,
    BASE_HASH,
    RECIPE,
    RELAY1,
    RELAY2,
    hash_base,
    require_base,
)
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.training.adapters import AdapterConfig, adapter_state_dict, add_adapter

SIZES: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 16, "freq_dim": 16,
    "ffn_dim": 128, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip


def base(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    kind: Any = WanTransformer3DModel
    return kind(in_channels=4, out_channels=4, **SIZES).eval()


def lora_file(path: Path, metadata: dict[str, str]) -> Path:
    model = base()
    add_adapter(model, AdapterConfig(rank=2))
    save_lora(adapter_state_dict(model), path, "peft", alpha=2, metadata=metadata)
    return path


def test_dtype_room_for_the_reference_and_an_adapter_do_not_change_the_hash():
    own = hash_base(base())
    assert hash_base(base().bfloat16()) == own
    assert hash_base(base().bfloat16().float()) == own
    assert hash_base(SegmentTransformer3DModel.from_base(base())) == own
    assert hash_base(SegmentTransformer3DModel.from_base(base(), takes_reference=False)) == own
    adapted = base()
    add_adapter(adapted, AdapterConfig(rank=2))
    assert hash_base(adapted) == own


def test_other_weights_and_other_sizes_have_other_hashes():
    changed = base()
    with torch.no_grad():
        changed.blocks[1].ffn.net[2].weight[-1, -1] += 1  # the last of more values than are sampled
    fewer = dict(SIZES, num_layers=1)
    kind: Any = WanTransformer3DModel
    others = [base(1), changed, kind(in_channels=4, out_channels=4, **fewer)]
    assert len({hash_base(model) for model in [base(), *others]}) == 4


def test_a_lora_of_these_weights_and_one_of_others_without_metadata_pass(tmp_path):
    own = lora_file(tmp_path / "own.safetensors", {BASE_HASH: hash_base(base()), RECIPE: RELAY2})
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    pickled = tmp_path / "foreign.pt"
    torch.save({"x": torch.zeros(1)}, pickled)
    for model in (base(), base().bfloat16(), SegmentTransformer3DModel.from_base(base())):
        require_base(model, [own, foreign, pickled, tmp_path / "own.safetensors"])


def test_a_lora_of_other_weights_is_refused(tmp_path):
    metadata = {BASE: "org/other", BASE_HASH: hash_base(base(1))}
    path = lora_file(tmp_path / "lora.safetensors", metadata)
    with pytest.raises(LoadingError, match=r"lora.safetensors was trained on org/other .*load the"):
        require_base(base(), [path])


def test_in_float16_it_is_said_that_nothing_is_checked(tmp_path, caplog):
    path = lora_file(tmp_path / "lora.safetensors", {BASE_HASH: hash_base(base(1))})
    require_base(base().half(), [path])
    assert "not checked in float16" in caplog.text


def test_the_first_lora_of_a_relay_is_refused_on_its_own_base(tmp_path):
    metadata = {BASE_HASH: hash_base(base()), RECIPE: RELAY1}
    path = lora_file(tmp_path / "lora1.safetensors", metadata)
    with pytest.raises(
        LoadingError, match=r"lora1.safetensors is the first LoRA of a relay.*second"
    ):
        require_base(base(), [path])


def test_a_damaged_file_is_named(tmp_path):
    path = lora_file(tmp_path / "lora.safetensors", {})
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(LoadingError, match=r"lora.safetensors is damaged or cut short"):
        require_base(base(), [path])
