"""LoRAs of which a part fits, from the command line and from presets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from swifti2v.models.loading.components import load_components
from swifti2v.models.loading.sources import INDEX_NAME
from tests.helpers.command_line import (
    LOSSLESS,
    error_line,
    frames_of,
    generate,
    save_clip,
    save_lora,
    succeed,
    swifti2v,
)
from tests.helpers.tiny import NUM_FRAMES, SIZE

MERGED = "stage1_transformer: LoRA {}: 2 of 4 keys merged at strength 2; left out: "


@pytest.fixture
def loras(tmp_path: Path) -> dict[str, Path]:
    """One that fits, and the same with a layer that the model has not."""
    whole = save_lora(tmp_path / "whole.safetensors")
    stranger = {
        f"transformer.blocks.9.attn1.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"
    }
    save_file(load_file(whole) | stranger, tmp_path / "mixed.safetensors")
    return {"whole": whole, "mixed": tmp_path / "mixed.safetensors"}


@pytest.mark.slow
def test_a_lora_is_merged_in_part_only_where_that_is_asked_for(
    model: Path, photo: Path, tmp_path: Path, loras: dict[str, Path]
) -> None:
    refused = generate(model, photo, tmp_path / "a.mkv", "--lora", f"{loras['mixed']}:2")
    assert "2 of 4 keys match" in error_line(refused)
    assert "to merge the rest, write --lora PATH:partial" in error_line(refused)
    asked = generate(
        model, photo, tmp_path / "a.mkv", *LOSSLESS, "--lora", f"{loras['mixed']}:2:partial"
    )
    line = MERGED.format(loras["mixed"])
    assert line in succeed(asked).stdout
    assert f"WARNING: {line.partition(': ')[2]}" in asked.stderr
    assert "blocks.9.attn1.to_q.lora_B.weight (2, 2): no such layer in the model" in asked.stdout
    whole = generate(model, photo, tmp_path / "b.mkv", *LOSSLESS, "--lora", f"{loras['whole']}:2")
    assert "2 of 2 keys merged at strength 2\n" in succeed(whole).stdout
    assert "WARNING" not in whole.stderr
    np.testing.assert_array_equal(frames_of(tmp_path / "a.mkv"), frames_of(tmp_path / "b.mkv"))


@pytest.mark.slow
def test_a_repeated_run_keeps_the_choice(
    model: Path, photo: Path, tmp_path: Path, loras: dict[str, Path]
) -> None:
    first, second = tmp_path / "a.mkv", tmp_path / "b.mkv"
    succeed(generate(model, photo, first, *LOSSLESS, "--lora", f"{loras['mixed']}:2:partial"))
    again = succeed(swifti2v("generate", "--like", first, "-o", second, *LOSSLESS, "--json"))
    assert f"note: {MERGED.format(loras['mixed'])}" in again.stderr
    assert json.loads(again.stdout)["seed"] == 7
    np.testing.assert_array_equal(frames_of(first), frames_of(second))


def preset(model: Path, path: Path, lora: dict[str, Any]) -> Path:
    values = json.loads((model / INDEX_NAME).read_text())
    for source in values["components"].values():
        source["source"] = str(model)
    values["components"]["stage1_transformer"]["loras"] = [lora]
    kept = ("components", "max_text_length", "settings")
    path.write_text(yaml.safe_dump({key: values[key] for key in kept}))
    return path


def test_a_preset_allows_it_for_each_lora(
    model: Path, photo: Path, tmp_path: Path, loras: dict[str, Path]
) -> None:
    lora: dict[str, Any] = {"path": str(loras["mixed"]), "strength": 2.0}
    name = preset(model, tmp_path / "strict.yaml", lora)
    refused = generate(name, photo, tmp_path / "a.mkv")
    assert "allow_partial: true in a preset" in error_line(refused)
    name = preset(model, tmp_path / "partial.yaml", lora | {"allow_partial": True})
    plan = succeed(generate(name, photo, tmp_path / "a.mkv", "--dry-run", "--json"))
    notes = json.loads(plan.stdout)["notes"]
    assert any(note.startswith(MERGED.format(loras["mixed"])) for note in notes)


def test_exports_and_transitions_say_what_was_merged(
    model: Path, tmp_path: Path, loras: dict[str, Path]
) -> None:
    choice = f"{loras['mixed']}:2:partial"
    line = f"note: {MERGED.format(loras['mixed'])}"
    export = swifti2v("models", "export", model, "-o", tmp_path / "out", "--lora", choice)
    assert line in succeed(export).stderr
    whole = swifti2v(
        "models", "export", model, "-o", tmp_path / "whole", "--lora", f"{loras['whole']}:2"
    )
    succeed(whole)
    found, expected = (
        load_components(tmp_path / name, torch.bfloat16, torch.device("cpu"))[0]
        for name in ("out", "whole")
    )
    torch.testing.assert_close(
        found.stage1_transformer.state_dict(), expected.stage1_transformer.state_dict()
    )
    save_clip(tmp_path / "clip.mkv", NUM_FRAMES, SIZE, SIZE)
    row = {"video": "clip.mkv", "prompt": "a clip"}
    (tmp_path / "list.jsonl").write_text(json.dumps(row) + "\n")
    transition = swifti2v(
        "data", "transition", tmp_path / "list.jsonl", "--output-dir", tmp_path / "made",
        "--model", model, "--device", "cpu", "--dry-run", "--lora", choice,
    )  # fmt: skip
    assert line in succeed(transition).stderr


def test_another_kind_of_adapter_and_one_in_stage2_that_does_not_fit_are_named(
    model: Path, photo: Path, tmp_path: Path
) -> None:
    file = tmp_path / "lokr.safetensors"
    save_file({"lora_unet_blocks_0_self_attn_q.lokr_w1": torch.ones(2, 2)}, file)
    for choice in (file, f"{file}:partial", f"stage2={file}"):
        line = error_line(generate(model, photo, tmp_path / "a.mkv", "--lora", choice))
        assert "lokr.safetensors is a LoKr, not a plain LoRA" in line
