"""The public 2K models on a machine that has neither their weights nor a network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import Result

from tests.helpers.command_line import error_line, save_photo, succeed, swifti2v
from tests.helpers.hub import make_hub

REPOS = ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers")


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def run(*more: object) -> Result:
    photo = save_photo(Path("photo.png"), 80, 44)
    return swifti2v("generate", photo, "-p", "fog", "-o", "out.mp4", "--seed", 1, *more)


@pytest.mark.parametrize("model", ["paper", "public", "vibe"])
def test_a_dry_run_needs_no_weights(model):
    plan = json.loads(succeed(run("--model", model, "--dry-run", "--json")).stdout)
    assert plan["sizes"]["output"] == [2560, 1408]
    assert plan["segments"] == [[i, i + 3] for i in range(1, 19, 3)] + [[19, 21]]
    note = next(note for note in plan["notes"] if "not on this machine" in note)
    for repo in REPOS:
        assert f"hf download {repo} --include" in note


def test_a_dry_run_refuses_a_size_that_does_not_fit():
    assert "1400" in error_line(run("--model", "paper", "--dry-run", "--height", 1400))


@pytest.mark.parametrize("more", [(), ("--memory", 24)])
def test_missing_weights_are_said_before_any_work(more):
    message = error_line(run("--model", "paper", *more))
    assert "weights of 'paper' are not on this machine" in message
    for repo in REPOS:
        assert f"hf download {repo} --include" in message
    assert message.count('"transformer/*"') == 2


def test_a_preset_of_local_folders_needs_no_hub(tmp_path):
    make_hub(tmp_path / "files")
    text = {"source": "files/Wan2.1-I2V"}
    fine = {"source": "files/Wan2.2-TI2V"}
    components = {
        role: {**text, "subfolder": role}
        for role in ("text_encoder", "tokenizer", "image_encoder", "image_processor")
    } | {
        "stage1_vae": {**text, "subfolder": "vae"},
        "stage1_transformer": {**text, "subfolder": "transformer"},
        "stage2_vae": {**fine, "subfolder": "vae"},
        "stage2_transformer": {**fine, "subfolder": "transformer"},
    }
    preset = tmp_path / "own.yaml"
    settings = {"num_frames": 17, "height": 64, "width": 64, "stage1": {"downscale": 2}}
    preset.write_text(yaml.safe_dump({"components": components, "settings": settings}))
    plan = json.loads(succeed(run("--model", preset, "--dry-run", "--json")).stdout)
    assert not any("not on this machine" in note for note in plan["notes"])
    components["stage2_vae"]["source"] = "./elsewhere"
    preset.write_text(yaml.safe_dump({"components": components}))
    assert "elsewhere" in error_line(run("--model", preset))


def test_a_plan_for_a_named_card_loads_no_pytorch():
    code = (
        "import sys; from typer.testing import CliRunner; from swifti2v.cli import app;"
        "r = CliRunner().invoke(app, ['plan', '--device', 'rtx4090', '--json']);"
        "assert r.exit_code == 0, r.output;"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & sys.modules.keys();"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
