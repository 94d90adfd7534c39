"""The factor of a LoRA, wherever its file keeps alpha, in every family of keys."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from swifti2v.errors import LoadingError
from swifti2v.models.lora.export import LORA_STYLES, LoraStyle, convert_lora
from swifti2v.models.lora.merge import merge_lora
from swifti2v.models.weights.files import read_tensors
from tests.unit.models.lora.test_merge import (
    FAMILIES,
    RANK,
    State,
    delta,
    make_pairs,
    original,
    pair_file,
    tiny_transformer,
)

LAYERS = ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2")
HEADERS: dict[str, dict[str, str]] = {
    "SimpleTuner": {"transformer.lora_alpha": "12", "transformer.r": "3"},
    "plain": {"lora_alpha": "12", "r": "3"},
    "alpha and rank": {"alpha": "12.0", "rank": "3"},
    "alpha alone": {"alpha": "12"},
    "network": {"network_alpha": "12", "network_dim": "3"},
    "kohya's names": {"ss_network_alpha": "12", "ss_network_dim": "3"},
    "diffusers": {
        "lora_adapter_metadata": json.dumps({"transformer.r": 3, "transformer.lora_alpha": 12})
    },
    "beside that of a text encoder": {
        "transformer.lora_alpha": "12",
        "text_encoder.lora_alpha": "8",
    },
    "told twice": {"lora_alpha": "12", "ss_network_alpha": "12.0"},
}


PAIRS = {name: pair for name, pair in make_pairs(tiny_transformer()).items() if name in LAYERS}


def pairs_of(family: str) -> State:
    return pair_file(family, PAIRS)


def factors(source: Any) -> list[float]:
    """Factor of each layer's product of up and down."""
    model = tiny_transformer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = merge_lora(model, source)
    assert report.applied == report.total
    found = []
    for name in LAYERS:
        change = delta(*PAIRS[name])
        added = model.state_dict()[f"{name}.weight"] - before[f"{name}.weight"]
        found.append(float((added * change).sum() / (change * change).sum()))
        torch.testing.assert_close(added, found[-1] * change, atol=2e-5, rtol=1e-4)
    return found


def save(tensors: State, path: Path, header: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, header)
    return path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("header", HEADERS)
def test_alpha_in_the_header_counts_in_every_spelling_and_family(
    tmp_path: Path, family: str, header: str
) -> None:
    file = save(pairs_of(family), tmp_path / "lora.safetensors", HEADERS[header])
    assert factors(file) == pytest.approx([12 / RANK] * 2, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_of_peft_beside_the_file_counts_unless_the_header_tells_alpha(
    tmp_path: Path, family: str
) -> None:
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "use_dora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    file = save(pairs_of(family), tmp_path / "lora.safetensors")
    assert factors(file) == pytest.approx([2, 2], rel=1e-4)
    assert factors(tmp_path) == pytest.approx([2, 2], rel=1e-4)
    save(pairs_of(family), file, {"lora_alpha": "12"})
    assert factors(file) == pytest.approx([4, 4], rel=1e-4)


@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        ("peft", LAYERS[0]),
        ("peft", "to_q"),
        ("original ab", original(LAYERS[0])),
        ("original ab", "q"),
        ("diffsynth", LAYERS[0]),
        ("kohya", LAYERS[0]),
    ],
)
def test_patterns_name_layers_as_the_file_or_as_diffusers_does(
    tmp_path: Path, family: str, pattern: str
) -> None:
    config = {"lora_alpha": 12, "alpha_pattern": {pattern: 6}, "use_rslora": True}
    header = {"lora_adapter_metadata": json.dumps(config)}
    file = save(pairs_of(family), tmp_path / "lora.safetensors", header)
    assert factors(file) == pytest.approx([6 / math.sqrt(RANK), 12 / math.sqrt(RANK)], rel=1e-4)


def test_a_tensor_beside_the_pair_wins_over_the_header(tmp_path: Path) -> None:
    tensors = pairs_of("kohya")
    stem = next(iter(tensors)).rpartition(".lora_")[0]
    file = tmp_path / "lora.safetensors"
    save(tensors | {f"{stem}.alpha": torch.tensor(6.0)}, file, HEADERS["kohya's names"])
    assert factors(file) == pytest.approx([2, 4], rel=1e-4)
    every = {f"{key.rpartition('.lora_')[0]}.alpha": torch.tensor(6.0) for key in tensors}
    resized = {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}
    assert factors(save(tensors | every, file, resized)) == pytest.approx([2, 2], rel=1e-4)
    with pytest.raises(LoadingError, match="ss_network_alpha 'Dynamic', which must be a number"):
        merge_lora(tiny_transformer(), save(tensors, file, resized))


def test_where_a_converter_multiplied_alpha_in_the_header_it_copied_does_not_count(
    tmp_path: Path,
) -> None:
    """musubi-tuner's convert_lora.py: ComfyUI's keys, no alpha, the header of the trained file."""
    header = HEADERS["kohya's names"] | {"ss_network_module": "networks.lora_wan"}
    file = save(pairs_of("original ab"), tmp_path / "lora.safetensors", header)
    assert factors(file) == pytest.approx([1, 1], rel=1e-4)
    assert factors(save(pairs_of("kohya"), file, header)) == pytest.approx([4, 4], rel=1e-4)


@pytest.mark.parametrize("style", LORA_STYLES)
def test_conversion_leaves_nothing_in_the_header_that_counts_again(
    tmp_path: Path, style: LoraStyle
) -> None:
    for header in HEADERS.values():
        file = save(pairs_of("kohya"), tmp_path / "a.safetensors", header | {"title": "mine"})
        convert_lora(file, tmp_path / "b.safetensors", style)
        assert factors(tmp_path / "b.safetensors") == pytest.approx([4, 4], rel=1e-4)
        found = read_tensors(tmp_path / "b.safetensors")[1]
        assert found["title"] == "mine"
        assert not {"alpha", "rank", "lora_alpha", "ss_network_alpha"} & found.keys()


def test_files_of_older_versions_keep_their_scale(tmp_path: Path) -> None:
    """They kept the header of the file they were converted from; a stranger's config may be near."""
    header = HEADERS["kohya's names"] | {"swifti2v_version": "0.1.0", "swifti2v_alpha": "12"}
    (tmp_path / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 6}')
    for family in ("diffsynth", "original"):
        file = save(pairs_of(family), tmp_path / "lora.safetensors", header)
        assert factors(file) == pytest.approx([1, 1], rel=1e-4)
    peft = header | {"lora_adapter_metadata": '{"transformer.r": 3, "transformer.lora_alpha": 3}'}
    file = save(pairs_of("peft"), tmp_path / "lora.safetensors", peft)
    assert factors(file) == pytest.approx([1, 1], rel=1e-4)


@pytest.mark.parametrize("alpha", [0.0, -4.0])
@pytest.mark.parametrize("key", ["alpha", "lora_alpha"])
def test_an_alpha_that_is_not_above_zero_is_refused(tmp_path: Path, key: str, alpha: float) -> None:
    model = tiny_transformer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = pairs_of("original")
    stem = next(iter(tensors)).rpartition(".lora_")[0]
    wrong = tensors | {f"{stem}.{key}": torch.tensor(alpha)}
    with pytest.raises(LoadingError, match=f"{key}.*: alpha is {alpha:g}; it must be above 0"):
        merge_lora(model, wrong)
    with pytest.raises(LoadingError, match="alpha is"):
        convert_lora(save(wrong, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "peft")
    with pytest.raises(LoadingError, match="NaN or infinity"):
        merge_lora(model, tensors | {f"{stem}.{key}": torch.tensor(math.nan)})
    for text in (f"{alpha}", "nan", "inf", "much"):
        file = save(tensors, tmp_path / "lora.safetensors", {key: text})
        with pytest.raises(LoadingError, match=f"lora.safetensors says {key} '{text}', which must"):
            merge_lora(model, file, allow_partial=True)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"lora_alpha": "12", "alpha": "6"}, "contradicts itself: alpha 6 and lora_alpha 12"),
        ({"lora_alpha": "12", "r": "8"}, "rank 8 for blocks.0.attn1.to_q, the weights have rank 3"),
        (
            {"lora_adapter_metadata": '{"use_dora": true}'},
            "describes an adapter of the kind DoRA, not a plain LoRA",
        ),
        (
            {"lora_adapter_metadata": '{"peft_type": "LOHA"}'},
            "describes an adapter of the kind LOHA",
        ),
        ({"lora_adapter_metadata": "[1"}, "cannot be read"),
        ({"alpha_pattern": "{", "lora_alpha": "1"}, "alpha_pattern cannot be read"),
        ({"alpha_pattern": '{"*q": 1}'}, "'*q' is not a regular expression"),
    ],
)
def test_a_header_that_cannot_be_believed_is_refused(
    tmp_path: Path, header: dict[str, str], message: str
) -> None:
    file = save(pairs_of("peft"), tmp_path / "lora.safetensors", header)
    with pytest.raises(LoadingError, match=re.escape(message)):
        merge_lora(tiny_transformer(), file)
    with pytest.raises(LoadingError, match=re.escape(message)):
        convert_lora(file, tmp_path / "b.safetensors", "peft")


def test_a_config_beside_the_file_that_is_damaged_or_of_another_adapter_is_refused(
    tmp_path: Path,
) -> None:
    file = save(pairs_of("original"), tmp_path / "lora.safetensors")
    for content, message in (
        (b"\xff{", r"adapter_config\.json cannot be read"),
        (b'{"peft_type": "IA3"}', "an adapter of the kind IA3"),
        (b'{"lora_alpha": 0}', r"adapter_config\.json says lora_alpha 0, which must be"),
    ):
        (tmp_path / "adapter_config.json").write_bytes(content)
        with pytest.raises(LoadingError, match=message):
            merge_lora(tiny_transformer(), file)
