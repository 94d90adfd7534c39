"""``swifti2v train stage1|stage2|vae|text``: the shipped configurations, a few steps of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from swifti2v.config import GenerationConfig, parse_config, read_yaml
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.training.nano.config import NanoConfig, TextEncoderConfig
from swifti2v.training.relay.training import RelayTraining
from swifti2v.training.stages.config import Stage1FineTuning, Stage2FineTuning
from swifti2v.training.vae.training import VaeTrainingConfig
from tests.helpers.command_line import (
    error_line,
    generate,
    save_clip,
    save_photo,
    succeed,
    swifti2v,
)
from tests.helpers.regression import run_in_subprocess

CONFIGS = Path(__file__).parents[2] / "src/swifti2v/configs"
KINDS: dict[str, Any] = {
    "nano": NanoConfig,
    "nano_stage1": Stage1FineTuning,
    "nano_stage2": Stage2FineTuning,
    "nano_relay": RelayTraining,
    "nano_text": TextEncoderConfig,
    "nano_vae": VaeTrainingConfig,
    "nano_vibe": GenerationConfig,
    "relay_vibe": RelayTraining,
    "stage1_lora": Stage1FineTuning,
    "stage2_2k": Stage2FineTuning,
}
SMALL = (
    "--set", "phases=[{name: clips, steps: 4, data: {rules: {buckets: [[17, 64, 64]]}}}]",
    "--set", "crop=32",
    "--set", "run.batch_size=2",
    "--set", "run.validation_steps=null",
    "--set", "num_procedural_clips=2",
    "--device", "cpu",
)  # fmt: skip

TINY_VAE = (
    "vae={base_dim: 8, z_dim: 4, dim_mult: [1, 1, 1], num_res_blocks: 1, patch_size: 2, "
    "in_channels: 12, out_channels: 12, temperal_downsample: [true, true], "
    "scale_factor_spatial: 8}"
)
OF_PART = {
    "stage1": (),
    "stage2": ("--set", "crop=32"),
    "vae": ("--set", "crop=32", "--set", TINY_VAE),
}


def train(part: str, output: Path, *more: object) -> Any:
    config = CONFIGS / f"nano_{part}.yaml"
    return swifti2v("train", part, "--config", config, "--output-dir", output, *more)


def read_metrics(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path):
    parse_config(KINDS[path.stem], read_yaml(path), str(path))


COMMANDS = {
    path.stem: line.partition("swifti2v ")[2].split()
    for path in sorted(CONFIGS.glob("*.yaml"))
    for line in path.read_text().splitlines()
    if line.startswith("# Command: ") and "swifti2v train " in line
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_in_a_configuration_plans_that_configuration(name):
    result = succeed(swifti2v(*COMMANDS[name], "--dry-run"))
    printed = parse_config(KINDS[name], yaml.safe_load(result.stdout), "what was printed")
    path = CONFIGS / f"{name}.yaml"
    assert printed == parse_config(KINDS[name], read_yaml(path), str(path))


@pytest.mark.slow
def test_stage2_continues_as_if_it_had_not_stopped(tmp_path):
    whole = succeed(train("stage2", tmp_path / "whole", *SMALL))
    assert whole.stdout.strip() == str(tmp_path / "whole" / "transformer")
    parts = tmp_path / "parts"
    succeed(train("stage2", parts, *SMALL, "--max-steps", 2))
    succeed(train("stage2", parts, *SMALL, "--resume"))
    losses = [[m["loss"] for m in read_metrics(path)] for path in (tmp_path / "whole", parts)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert len(list((parts / "tensorboard").iterdir())) == 2  # one for each start
    assert {"step", "loss", "lr", "grad_norm", "seconds", "samples_per_second"} <= set(
        read_metrics(parts)[0]
    )
    for metrics in read_metrics(parts):
        # A crop of 32 pixels has 2x2 tokens, the windows of a clip have four or three frames.
        tokens = metrics["tokens_per_second"] / metrics["samples_per_second"]
        assert min(abs(tokens - 16), abs(tokens - 12)) < 0.1
        assert metrics["flops"] > 0
    levels = [(path / "noise_levels.json").read_text() for path in (tmp_path / "whole", parts)]
    assert levels[0] == levels[1]
    assert sum(json.loads(levels[0])["counts"].values()) == 4 * 2
    states = [
        load_file(path / "transformer" / "diffusion_pytorch_model.safetensors")
        for path in (tmp_path / "whole", parts)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert "not empty" in error_line(train("stage2", parts, *SMALL))
    other = train("stage2", parts, *SMALL, "--resume", "--set", "run.seed=3")
    assert "other settings: run.seed is 0 there and 3 now" in error_line(other)


@pytest.mark.slow
def test_stage2_trains_on_a_manifest_with_a_reference(tmp_path):
    for name, side in (("a", 64), ("b", 64), ("low", 16)):
        save_clip(tmp_path / f"{name}.mkv", 17, side, side)
    rows = [
        {"video": "a.mkv", "prompt": "one"},
        {"video": "b.mkv", "prompt": "two", "reference": "low.mkv"},
    ]
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    phases = (
        f"phases=[{{steps: 1, data: {{manifests: [{{path: {manifest}}}], "
        "rules: {buckets: [[17, 64, 64]], fps: 8}}}]"
    )
    output = tmp_path / "out"
    succeed(train("stage2", output, *SMALL, "--set", phases, "--set", "run.validation_steps=1"))
    assert (output / "validation" / "step-00000000" / "grid.png").exists()
    lines = (output / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    missing = phases.replace("clips.jsonl", "none.jsonl")
    refused = train("stage2", tmp_path / "other", *SMALL, "--set", missing)
    assert "none.jsonl does not exist" in error_line(refused)


def write_clips(folder: Path, *prompts: str) -> Path:
    """A manifest of clips of 17 frames of 64x64."""
    folder.mkdir(exist_ok=True)
    manifest, rows = folder / "clips.jsonl", []
    for number, prompt in enumerate(prompts):
        if not (folder / f"{number}.mkv").exists():
            save_clip(folder / f"{number}.mkv", 17, 64, 64)
        rows.append(json.dumps({"video": f"{number}.mkv", "prompt": prompt}) + "\n")
    manifest.write_text("".join(rows))
    return manifest


def phases_of(manifest: Path, steps: int = 2) -> str:
    return (
        f"phases=[{{steps: {steps}, data: {{manifests: [{{path: {manifest}}}], "
        "rules: {buckets: [[17, 64, 64]], fps: 8}}}]"
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", ["stage1", "stage2", "vae"])
def test_a_training_on_other_clips_is_not_continued(tmp_path, part):
    manifest = write_clips(tmp_path / "data", "one", "two", "three")
    run = ("--set", phases_of(manifest), *OF_PART[part], "--device", "cpu")
    run += ("--set", "run.batch_size=1", "--set", "run.validation_steps=null")
    succeed(train(part, tmp_path / "out", *run, "--max-steps", 1))
    write_clips(tmp_path / "data", "one", "other")
    refused = error_line(train(part, tmp_path / "out", *run, "--resume"))
    changes = "1 sample gone (2.mkv); 1 sample with another caption (1.mkv)"
    assert f"out has changed since its start: {changes}; restore it" in refused
    assert len(read_metrics(tmp_path / "out")) == 1
    allowed = succeed(train(part, tmp_path / "out", *run, "--resume", "--allow-changed-data"))
    assert f"continuing on changed data: {changes}" in allowed.stderr
    assert len(read_metrics(tmp_path / "out")) == 2


@pytest.mark.slow
def test_a_training_from_a_cache_is_not_continued_on_other_clips(tmp_path):
    manifest = write_clips(tmp_path / "data", "one", "two")
    run = ("--set", phases_of(manifest), *SMALL[2:])
    cache = ("--config", CONFIGS / "nano_stage2.yaml", "--output-dir", tmp_path / "cache", *run)
    succeed(swifti2v("data", "cache", *cache))
    own = (*run, "--set", f"cache.directory={tmp_path / 'cache'}")
    succeed(train("stage2", tmp_path / "out", *own, "--max-steps", 1))
    write_clips(tmp_path / "data", "one", "other")
    succeed(swifti2v("data", "cache", *cache))  # which adds the new caption
    refused = error_line(train("stage2", tmp_path / "out", *own, "--resume"))
    assert "1 sample with another caption (1.mkv)" in refused


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, monkeypatch):
    settings = (*SMALL, "--max-steps", 2, "--set", "run.validation_steps=1")
    succeed(train("stage2", tmp_path / "one", *settings))
    monkeypatch.setenv("PYTHONWARNINGS", "error:FSDP2-wrapped")  # users should not see them
    run_in_subprocess(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
        "-m", "swifti2v", "train", "stage2", "--config", CONFIGS / "nano_stage2.yaml",
        "--output-dir", tmp_path / "two", *settings,
    )  # fmt: skip
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 2
    assert [m["loss"] for m in one] == pytest.approx([m["loss"] for m in two], rel=1e-5)
    texts = [(tmp_path / name / "validation.jsonl").read_text() for name in ("one", "two")]
    measured = [[json.loads(line) for line in text.splitlines()] for text in texts]
    for alone, together in zip(*measured, strict=True):
        assert alone["psnr"] == pytest.approx(together["psnr"], abs=0.01)
    kind: Any = SegmentTransformer3DModel
    models = [kind.from_pretrained(tmp_path / name / "transformer") for name in ("one", "two")]
    for name, weight in models[0].state_dict().items():
        torch.testing.assert_close(weight, models[1].state_dict()[name], atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_a_lora_of_stage1_is_written_and_used(tmp_path):
    rules = "phases=[{name: clips, steps: 1, data: {rules: {buckets: [[9, 32, 32]]}}}]"
    more = ("--set", rules, "--set", "run.validation_steps=1", "--set", "num_procedural_clips=2")
    result = succeed(train("stage1", tmp_path / "out", *more, "--device", "cpu"))
    lora = tmp_path / "out" / "lora.safetensors"
    assert result.stdout.strip() == str(lora)
    assert lora.with_name("lora_comfyui.safetensors").exists()
    photo = save_photo(tmp_path / "photo.png", 128, 128)
    size = ("--width", 128, "--height", 128, "--num-frames", 9)
    succeed(
        generate(Path("nano"), photo, tmp_path / "video.mp4", "--lora", f"stage1={lora}", *size)
    )


@pytest.mark.slow
def test_a_vae_and_a_text_encoder_are_trained(tmp_path):
    phases = "phases=[{steps: 2, data: {rules: {buckets: [[5, 64, 64]]}}}]"
    succeed(
        train("vae", tmp_path / "vae", "--set", TINY_VAE, "--set", phases, "--set", "crop=32",
              "--set", "run.precision=float32", "--set", "run.validation_steps=2")
    )  # fmt: skip
    assert (tmp_path / "vae" / "vae" / "config.json").exists()
    assert len(read_metrics(tmp_path / "vae")) == 2
    succeed(train("text", tmp_path / "text", "--set", "width=32", "--max-steps", 1))
    assert (tmp_path / "text" / "text_encoder" / "model.safetensors").exists()
    learned = json.loads((tmp_path / "text" / "text_encoder" / "config.json").read_text())
    assert "pan left" in learned["camera_motions"]["pan left"]


def test_settings_are_printed_and_nothing_is_made(tmp_path):
    result = succeed(train("stage2", tmp_path / "out", "--dry-run", "--set", "run.seed=5"))
    assert yaml.safe_load(result.stdout)["run"]["seed"] == 5
    assert not (tmp_path / "out").exists()
    refused = train("stage2", tmp_path / "out", "--set", "colour=1")
    assert "colour" in error_line(refused)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "parameters"), [("stage1_lora", "16,548,233,024"), ("stage2_2k", "5,000,377,536")]
)
def test_the_shipped_2k_configurations_are_planned_without_weights(tmp_path, name, parameters):
    part, output = name.partition("_")[0], tmp_path / "out"
    command = ("train", part, "--config", CONFIGS / f"{name}.yaml", "--output-dir", output)
    result = succeed(swifti2v(*command, "--dry-run"))
    plan = [line for line in result.stdout.splitlines() if line.startswith("# ")]
    assert plan[0].startswith(f"# {part}: {parameters} parameters")
    assert sum("ranks: " in line and "activations" in line for line in plan) >= 3
    parse_config(KINDS[name], yaml.safe_load(result.stdout), "what was printed")
    assert not output.exists()


def test_a_plan_says_what_it_does_not_know(tmp_path):
    values = yaml.safe_load(Path(CONFIGS / "../presets/paper.yaml").read_text())
    values["components"]["stage2_transformer"] = {"source": str(tmp_path / "not_there")}
    preset = tmp_path / "own.yaml"
    preset.write_text(yaml.safe_dump(values))
    result = succeed(train("stage2", tmp_path / "out", "--dry-run", "--set", f"model={preset}"))
    assert "the model's config.json is needed: " in result.stdout
    assert "not_there" in result.stdout
    assert yaml.safe_load(result.stdout)["model"] == str(preset)
