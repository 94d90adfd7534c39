"""Names that trainers give, other kinds of files, and what goes to the base half of Stage II."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors.torch import save_file

from swifti2v.errors import LoadingError
from swifti2v.models.lora.export import convert_lora
from swifti2v.models.lora.merge import merge_lora
from swifti2v.models.transformer import SegmentTransformer3DModel
from tests.unit.models.lora.test_merge import (
    FAMILIES,
    RANK,
    State,
    assert_merged,
    delta,
    make_pairs,
    original,
    pair_file,
    tiny_transformer,
    weights,
)

LAYER = "blocks.0.attn1.to_q"
UP, DOWN = make_pairs(tiny_transformer())[LAYER]
WRAPPED: dict[str, tuple[str, Callable[[str], str]]] = {
    "sharded": ("original", lambda key: f"model._fsdp_wrapped_module.{key.removeprefix('diffusion_model.')}"),
    "every block sharded": ("original", lambda key: key.replace("blocks.0.", "blocks.0._fsdp_wrapped_module.")),
    "compiled": ("peft", lambda key: f"_orig_mod.{key}"),
    "recomputed": ("peft", lambda key: key.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module.")),
    "on several devices": ("diffsynth", lambda key: f"module.{key}"),
    "compiled, kohya": ("kohya", lambda key: key.replace("lora_unet_", "lora_unet__orig_mod_")),
    "peft around a wrapper": ("original ab", lambda key: key.replace("diffusion_model.", "base_model.model.model.")),
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED)
def test_names_within_wrappers_are_those_of_the_layers(case: str) -> None:
    family, wrap = WRAPPED[case]
    model = tiny_transformer()
    before = weights(model)
    tensors = {wrap(key): t for key, t in pair_file(family, {LAYER: (UP, DOWN)}, 6).items()}
    assert tensors.keys() != pair_file(family, {LAYER: (UP, DOWN)}, 6).keys()
    report = merge_lora(model, tensors)
    assert report.applied == report.total == 3
    assert_merged(model, before, {f"{LAYER}.weight": delta(UP, DOWN)}, 6 / RANK)


def fastvideo(alpha: float, rank: int = RANK) -> dict[str, State]:
    """Keys as its extraction and its training write them."""
    full = {
        f"{LAYER}.diff_b": torch.ones(24),
        "blocks.1.scale_shift_table.diff_param": torch.full((1, 6, 24), 2.0),
    }
    return {
        "extracted": full
        | {
            f"{LAYER}.lora_A.weight": DOWN,
            f"{LAYER}.lora_B.weight": UP,
            f"{LAYER}.lora_rank": torch.tensor([rank], dtype=torch.int32),
            f"{LAYER}.lora_alpha": torch.tensor([alpha]),
        },
        "trained": full
        | {
            f"{LAYER}.lora_A": DOWN,
            f"{LAYER}.lora_B": UP,
            f"{LAYER}.lora_alpha": torch.tensor(int(alpha), dtype=torch.int64),
        },
    }


@pytest.mark.parametrize("kind", ["extracted", "trained"])
def test_fastvideos_rank_alpha_and_parameters_are_read(tmp_path: Path, kind: str) -> None:
    tensors = fastvideo(6)[kind]
    deltas = {
        f"{LAYER}.weight": 2 * delta(UP, DOWN),
        f"{LAYER}.bias": torch.ones(24),
        "blocks.1.scale_shift_table": torch.full((1, 6, 24), 2.0),
    }
    torch.save({"generator": tensors, "step": 3}, tmp_path / "lora.pt")
    save_file(tensors, tmp_path / "lora.safetensors")
    convert_lora(tmp_path / "lora.safetensors", tmp_path / "converted.safetensors", "original")
    for name in ("lora.pt", "lora.safetensors", "converted.safetensors"):
        model = tiny_transformer()
        before = weights(model)
        report = merge_lora(model, tmp_path / name)
        assert report.applied == report.total
        assert_merged(model, before, deltas)


def test_a_rank_that_is_not_the_pairs_is_refused() -> None:
    wrong = fastvideo(6, rank=4)["extracted"]
    with pytest.raises(LoadingError, match=r"lora_rank .*: it says 4, the weights have rank 3"):
        merge_lora(tiny_transformer(), wrong)
    empty = pair_file("peft", {LAYER: (UP[:, :0], DOWN[:0])})
    with pytest.raises(LoadingError, match=f"does not fit {LAYER}"):
        merge_lora(tiny_transformer(), empty)


OTHERS = {
    "a DoRA": ["dora_scale"],
    "a DoRA ": ["lora_magnitude_vector"],
    "a LoHa": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
    "a LoKr": ["lokr_w1", "lokr_w2_a", "lokr_w2_b"],
    "an OFT adapter": ["oft_blocks"],
    "a GLoRA": ["a1.weight", "a2.weight", "b1.weight", "b2.weight"],
    "an (IA)^3 adapter": ["on_input"],
    "a LoCon of three factors": ["lora_mid.weight"],
    "a control LoRA, which enlarges layers": ["reshape_weight"],
    "a file that adds layers of its own": ["set_weight"],
}


@pytest.mark.parametrize("family", ["peft", "original", "kohya"])
@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_adapter_is_named_and_its_layers_are_never_merged_in_part(
    tmp_path: Path, kind: str, family: str
) -> None:
    stem = FAMILIES[family](LAYER, 0).rpartition(".lora_")[0]
    own = {f"{stem}.{leaf}": torch.ones(2, 2) for leaf in OTHERS[kind]}
    beside = pair_file(family, {LAYER: (UP, DOWN)}, 3)
    plain = pair_file(family, {"blocks.1.attn1.to_q": (UP, DOWN)}, 3)
    model = tiny_transformer()
    before = weights(model)
    message = re.escape(f"is {kind.strip()}, not a plain LoRA: {len(own)} of ")
    for tensors, allow_partial in ((own | plain, False), (own | beside, True)):
        with pytest.raises(LoadingError, match=message):
            merge_lora(model, tensors, allow_partial=allow_partial)
    save_file(own | plain, tmp_path / "a.safetensors")
    with pytest.raises(LoadingError, match=message):
        convert_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "peft")
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    report = merge_lora(model, own | beside | plain, allow_partial=True)
    assert (report.applied, report.total) == (3, 6 + len(own))
    assert_merged(model, before, {"blocks.1.attn1.to_q.weight": delta(UP, DOWN)})


WRITTEN_BY_PEFT: dict[str, Any] = {
    "LoHa": lambda targets: peft.LoHaConfig(r=2, target_modules=targets),
    "LoKr": lambda targets: peft.LoKrConfig(r=2, target_modules=targets),
    "IA3": lambda targets: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
    "DoRA": lambda targets: peft.LoraConfig(r=2, use_dora=True, target_modules=targets),
}


@pytest.mark.parametrize("kind", WRITTEN_BY_PEFT)
def test_what_peft_itself_writes_is_named_with_and_without_its_config(
    tmp_path: Path, kind: str
) -> None:
    model: Any = tiny_transformer()
    adapted = peft.get_peft_model(model, WRITTEN_BY_PEFT[kind](["to_q", "to_k"]))
    adapted.save_pretrained(str(tmp_path))
    named = re.compile(f"of the kind {kind}, not a plain LoRA", re.IGNORECASE)
    with pytest.raises(LoadingError, match=named):
        merge_lora(tiny_transformer(), tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(LoadingError, match=rf"(a|an) \(?{kind[:2]}.*, not a plain LoRA"):
        merge_lora(tiny_transformer(), tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("naming", [lambda key: key, lambda key: f"model.diffusion_model.{key}"])
def test_a_whole_checkpoint_is_told_from_a_lora(naming: Any) -> None:
    state = {naming(key): tensor for key, tensor in weights(tiny_transformer()).items()}
    with pytest.raises(LoadingError, match=r"a checkpoint of whole weights.*name it in a preset"):
        merge_lora(tiny_transformer(), state, allow_partial=True)


def test_keys_of_a_text_encoder_are_named() -> None:
    text = {f"lora_te_layers_0.{leaf}": torch.ones(2, 2) for leaf in ("lora_up.weight", "alpha")}
    tensors = pair_file("kohya", {LAYER: (UP, DOWN)}, 3) | text
    with pytest.raises(LoadingError, match=r"for a text encoder.*--lora PATH:partial"):
        merge_lora(tiny_transformer(), tensors)
    report = merge_lora(tiny_transformer(), tensors, allow_partial=True)
    assert report.describe().startswith(
        "LoRA mapping: 3 of 5 keys merged at strength 1; left out: "
    )


def stage2_base() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_attention_heads": 1, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4,
        "text_dim": 8, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 32,
    }  # fmt: skip
    return WanTransformer3DModel(**sizes).eval()


def embedding_files(num_channels: int) -> dict[str, State]:
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(24, 2, 1, 1, 1, generator=generator)
    down = torch.randn(2, num_channels, 1, 2, 2, generator=generator)
    stem = f"diffusion_model.{original('patch_embedding')}"
    pair = {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
    return {
        "convolutions": pair,
        "matrices": {key: tensor.flatten(1) for key, tensor in pair.items()},
        "difference": {f"{stem}.diff": delta(up, down), f"{stem}.diff_b": torch.ones(24)},
    }


@pytest.mark.parametrize("kind", ["convolutions", "matrices", "difference"])
def test_what_is_for_the_base_goes_to_the_first_half_of_a_widened_patch_embedding(
    kind: str,
) -> None:
    """So that Stage II with any reference does what the base with the LoRA does."""
    tensors = embedding_files(4)[kind]
    base = stage2_base()
    wide = SegmentTransformer3DModel.from_base(base)
    assert merge_lora(base, tensors, 0.5).applied == len(tensors)
    assert merge_lora(wide, tensors, 0.5).applied == len(tensors)
    expected = SegmentTransformer3DModel.from_base(base)
    torch.testing.assert_close(wide.state_dict(), expected.state_dict(), atol=0, rtol=0)
    assert not wide.patch_embedding.weight[:, 4:].any()
    trained = embedding_files(8)[kind]  # on the widened model itself
    merge_lora(wide, trained)
    assert wide.patch_embedding.weight[:, 4:].any()


def test_only_a_widened_model_takes_less_than_the_whole_patch_embedding() -> None:
    narrow = SegmentTransformer3DModel.from_base(stage2_base(), takes_reference=False)
    for model, num_channels in (
        (tiny_transformer(), 2),
        (narrow, 2),
        (SegmentTransformer3DModel.from_base(stage2_base()), 2),
        (SegmentTransformer3DModel.from_base(stage2_base()), 16),
    ):
        with pytest.raises(LoadingError, match=r"does not fit patch_embedding\.weight \(24, "):
            merge_lora(model, embedding_files(num_channels)["convolutions"])
