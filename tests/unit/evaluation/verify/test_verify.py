"""Faults that are planted into a copy of nano must be named, and none may hide another."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from swifti2v.evaluation.verify.findings import Finding, without_paths
from swifti2v.evaluation.verify.moving_clip import draw_clip, draw_photo
from swifti2v.evaluation.verify.report import Report, verify
from swifti2v.shipped import PACKAGE
from tests.helpers.command_line import copy_model, swifti2v
from tests.helpers.hub import make_hub, write_preset

SMALL = {"height": 128, "width": 192}
CPU = torch.device("cpu")


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    """A copy at a small size."""
    for file in (PACKAGE / "nano").rglob("*"):
        if file.is_file():
            target = tmp_path / "own" / file.relative_to(PACKAGE / "nano")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    change(tmp_path / "own", lambda index: index["settings"].update(SMALL))
    return tmp_path / "own"


def change(model: Path, edit: Any) -> None:
    file = model / "model_index.json"
    index = json.loads(file.read_text())
    edit(index)
    file.write_text(json.dumps(index))


def check(model: Path) -> dict[str, Finding]:
    report = verify(str(model), device=CPU, dtype=torch.float32)
    assert_nothing_of_the_users(report, model)
    return {finding.check: finding for finding in report.findings}


def assert_nothing_of_the_users(report: Report, model: Path) -> None:
    text = json.dumps(report.to_dict())
    assert report.model == "own"
    for secret in (str(model), str(model.parent), str(PACKAGE), str(Path.home()), "/tmp/"):
        assert secret not in text


def off(findings: dict[str, Finding]) -> dict[str, str]:
    return {name: found.cause for name, found in findings.items() if found.status == "off"}


@pytest.mark.slow
def test_nano_is_good(nano: Path) -> None:
    """In a process of its own, as it measures the memory of all of it."""
    command = (
        sys.executable,
        "-m",
        "swifti2v",
        "verify",
        "--model",
        nano,
        "--device",
        "cpu",
        "--json",
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert {name: found for name, found in findings.items() if found["status"] != "ok"} == {}
    assert done.returncode == 0
    assert [name for name in findings if name.startswith("denoising")] == [
        "denoising of stage1",
        "denoising of stage2",
    ]
    assert findings["a short clip"]["values"]["frames"] == 5


@pytest.mark.slow
def test_a_wrong_lora_and_a_wrong_shift_are_named_and_hide_nothing(nano: Path) -> None:
    key = "diffusion_model.blocks.0.cross_attn.k_img"  # of Wan2.1-I2V
    pair = {
        f"{key}.lora_down.weight": torch.ones(4, 5120),
        f"{key}.lora_up.weight": torch.ones(5120, 4),
    }
    save_file(pair, nano / "wrong.safetensors")
    rank = {f"transformer.blocks.0.attn1.to_q.lora_{x}.weight" for x in "AB"}
    width = 256
    fits = {name: torch.zeros((4, width) if "_A" in name else (width, 4)) for name in rank}
    save_file({**fits, **pair}, nano / "half.safetensors")

    def edit(index: dict[str, Any]) -> None:
        index["components"]["stage2_transformer"]["loras"] = [{"path": "wrong.safetensors"}]
        index["components"]["stage1_transformer"]["loras"] = [{"path": "half.safetensors"}]
        index["settings"]["stage2"]["sampling"]["shift"] = 1.0

    change(nano, edit)
    # The weights are nano's; its own LoRAs are none, so that the settings are known without them.
    found = check(nano)
    named = off(found)
    assert (
        "wrong LoRA: none of its keys fits" in named["LoRA wrong.safetensors on stage2_transformer"]
    )
    assert "2 of its 4 keys have no place" in named["LoRA half.safetensors on stage1_transformer"]
    assert found["LoRA half.safetensors on stage1_transformer"].values["matched"] == 2
    assert "wrong shift: stage2.sampling.shift is 1.0" in named["sampling of stage2"]
    assert found["denoising of stage2"].status == found["denoising of stage1"].status == "ok"
    assert found["a short clip"].status == "skipped"


@pytest.mark.slow
def test_swapped_vaes_are_named(nano: Path) -> None:
    change(nano, lambda index: index["components"]["stage2_vae"].update(subfolder="stage1/vae"))
    found = check(nano)
    cause = off(found)["parts belong together"]
    assert cause.startswith(
        "swapped VAEs: stage2_vae is Stage I's, whose latents have 192 channels"
    )
    assert found["denoising of stage2"].status == "skipped"
    assert found["VAE of stage2"].status == "ok"
    change(nano, lambda index: index["components"]["stage1_vae"].update(subfolder="stage2/vae"))
    assert off(check(nano))["parts belong together"] == "swapped VAEs: each stage has the other's"


def test_a_truncated_and_a_missing_file_are_named(nano: Path) -> None:
    file = nano / "stage1/transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (nano / "text_encoder/model.safetensors").unlink()
    found = check(nano)
    named = off(found)
    assert "cut short" in named["files of stage1_transformer"]
    assert "holds no weight files" in named["files of text_encoder"]
    assert set(named) == {"files of stage1_transformer", "files of text_encoder"}
    skipped = {name for name, finding in found.items() if finding.status == "skipped"}
    assert skipped == {
        "parts belong together", "sampling of stage1", "text encoder", "denoising of stage1",
        "denoising of stage2", "a short clip",
    }  # fmt: skip
    assert found["VAE of stage2"].status == "ok"


@pytest.mark.slow
def test_a_wrong_prediction_type_and_wrong_statistics_are_named(nano: Path) -> None:
    def edit(index: dict[str, Any]) -> None:
        index["settings"]["stage2"]["sampling"]["parameterization"] = "velocity"

    change(nano, edit)
    config = nano / "stage1/vae/config.json"
    values = json.loads(config.read_text())
    values["latents_std"] = [0.01 * value for value in values["latents_std"]]
    config.write_text(json.dumps(values))
    named = off(check(nano))
    assert named["VAE of stage1"].startswith("wrong latent statistics")
    assert named["denoising of stage2"] == (
        "wrong prediction type: the settings say velocity, the weights predict reference_residual"
    )
    assert "wrong prediction type" in named["sampling of stage2"]


@pytest.mark.slow
def test_weights_that_are_not_trained_do_not_denoise(nano: Path) -> None:
    file = nano / "stage2/transformer/diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(value.shape, generator=generator).to(value) * value.float().std().to(value)
        if value.numel() > 1
        else value
        for key, value in load_file(file).items()
    }
    save_file(state, file, {"format": "pt"})
    cause = off(check(nano))["denoising of stage2"]
    assert cause.startswith("stage2_transformer does not denoise latents of stage2_vae")


@pytest.mark.slow
def test_the_report_of_the_command_line(nano: Path) -> None:
    (nano / "tokenizer/tokenizer_config.json").unlink()
    result = swifti2v("verify", "--model", nano, "--device", "cpu", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["is_good"] is False
    assert report["environment"]["device"] == "cpu"
    (broken,) = (f for f in report["findings"] if f["check"] == "files of tokenizer")
    assert broken["status"] == "off"
    assert "tokenizer_config.json is missing" in broken["cause"]
    result = swifti2v("verify", "--model", nano, "--device", "cpu")
    assert result.exit_code == 1
    assert "1 checks are off" in result.stdout


def test_paths_of_the_user_leave_the_text() -> None:
    text = "'/home/me/models/a b/wan.safetensors' is damaged; see ~/x/y.json, https://hf.co/a/b and 1/2"
    assert without_paths(text).count("/home") == 0
    assert "wan.safetensors" in without_paths(text)
    assert "y.json" in without_paths(text)
    assert "1/2" in without_paths(text)


def test_the_clip_begins_with_the_photo_and_moves() -> None:
    photo = draw_photo(64, 96)
    assert photo.size == (96, 64)
    assert isinstance(photo, Image.Image)
    clip = draw_clip(photo, 5)
    assert clip.shape == (1, 3, 5, 64, 96)
    assert (clip[:, :, 4] - clip[:, :, 0]).abs().mean() > 0.01


@pytest.mark.slow
def test_the_vae_of_the_other_stage_is_known_by_its_weights(tmp_path: Path) -> None:
    hub = make_hub(tmp_path / "hub")
    copy_model(hub / "Wan2.1-I2V" / "vae", hub / "Copied" / "vae")
    preset = write_preset(hub, tmp_path, stage2_vae={"source": "Copied"})
    report = verify(str(preset), device=CPU, dtype=torch.float32)
    named = off({finding.check: finding for finding in report.findings})
    assert named["VAE of stage2"].startswith("swapped VAEs: stage2_vae holds the weights")
    assert named["parts belong together"].startswith("swapped VAEs: stage2_vae is Stage I's")
    assert "denoising of stage1" in named  # random weights
    assert "image encoder" not in named
