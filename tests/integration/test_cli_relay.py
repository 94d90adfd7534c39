"""``swifti2v train relay``: two LoRAs from images, of which the second is used."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from swifti2v.models.loading.components import load_components
from swifti2v.models.loading.sources import LoraSource
from swifti2v.models.lora.merge import merge_lora
from swifti2v.models.lora.provenance import BASE_HASH, RECIPE, RELAY1, RELAY2, hash_base
from swifti2v.models.weights.files import read_metadata
from tests.helpers import hub as wan
from tests.helpers.command_line import (
    copy_model,
    error_line,
    frames_of,
    save_clip,
    save_lora,
    succeed,
    swifti2v,
)
from tests.helpers.tiny import tiny_pipeline
from tests.helpers.training_clips import save_picture

CONFIGS = Path(__file__).parents[2] / "src/swifti2v/configs"
CPU = torch.device("cpu")


def relay(side: int, steps: int, **more: Any) -> dict[str, Any]:
    rules = {"buckets": [[1, side, side], [1, side, 2 * side]]}
    optimizer = {"learning_rate": 1e-2, "warmup_steps": 1}
    phase = {"steps": steps, "optimizer": optimizer, "data": {"rules": rules}}
    return {"adapter": {"rank": 2}, "phases": [phase], **more}


def settings(model: Path, **changes: Any) -> dict[str, Any]:
    gclf = {"kind": "gclf", "window": [2, 2]}
    return {
        "model": str(model),
        "num_procedural_images": 2,
        "first": relay(32, 4),
        "second": relay(64, 6, objective={"loss": "hfato"}, attention=gclf),
        "run": {"batch_size": 2, "precision": "float32", "ema_decay": 0.9},
        **changes,
    }


def train(output: Path, config: dict[str, Any], *more: object) -> Any:
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    return swifti2v("train", "relay", "--config", file, "--output-dir", output, "--device", "cpu",
                    *more)  # fmt: skip


def read_losses(output: Path) -> list[float]:
    names = [output / recipe / "metrics.jsonl" for recipe in (RELAY1, RELAY2)]
    lines = [line for name in names if name.exists() for line in name.read_text().splitlines()]
    return [json.loads(line)["loss"] for line in lines]


def assert_same_lora(one: Path, other: Path) -> None:
    states = load_file(one), load_file(other)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A relay that was not interrupted."""
    output = tmp_path_factory.mktemp("relay") / "whole"
    result = succeed(train(output, settings(model)))
    assert result.stdout.strip() == str(output / "relay2.safetensors")
    return output


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(5,), (2, 4), (10,)])
def test_an_interrupted_relay_ends_as_if_it_had_not_stopped(model, whole, tmp_path, stops):
    output, config = tmp_path / "out", settings(model)
    for number, stop in enumerate(stops):
        flags = ("--resume",) if number else ()
        result = succeed(train(output, config, "--max-steps", stop, *flags))
        # At the end of the first one nothing of the second is there.
        name = output / "relay2.safetensors" if stop > 4 else output
        written = output / "relay1.safetensors" if stop == 4 else name
        assert result.stdout.strip() == str(written)
        assert len(read_losses(output)) == stop
    succeed(train(output, config, "--resume"))
    assert read_losses(output) == read_losses(whole)
    for name in ("relay1.safetensors", "relay2.safetensors"):
        assert_same_lora(output / name, whole / name)


def test_the_second_lora_goes_on_the_base_and_not_on_the_first(model, whole):
    loras = [whole / f"{recipe}.safetensors" for recipe in (RELAY1, RELAY2)]
    base = load_components(model, torch.float32, CPU, stages=("stage2",))[0].stage2_transformer
    for path, recipe in zip(loras, (RELAY1, RELAY2), strict=True):
        metadata = read_metadata(path)
        assert metadata[RECIPE] == recipe
        assert metadata[BASE_HASH] == hash_base(base)
        assert json.loads(metadata["swifti2v_config"])["model"] == str(model)
    merge_lora(base, loras[1])
    source = LoraSource(path=str(loras[1]), stage="stage2")
    parts, _ = load_components(model, torch.float32, CPU, [source], stages=("stage2",))
    plain = load_components(model, torch.float32, CPU, stages=("stage2",))[0].stage2_transformer
    merge_lora(plain, whole / "relay2_comfyui.safetensors")
    for name, weight in base.state_dict().items():
        assert torch.equal(weight, parts.stage2_transformer.state_dict()[name])
        assert torch.equal(weight, plain.state_dict()[name])
    assert not (whole / "relay1_comfyui.safetensors").exists()  # it is not for sampling


def test_the_second_lora_is_trained_with_the_attention_that_it_is_given(model, tmp_path):
    losses = []
    for kind in ("gclf", "full"):
        attention = {"kind": kind, "window": [2, 2]}
        config = settings(model, first=None, second=relay(128, 1, attention=attention))
        succeed(train(tmp_path / kind, config))
        losses += read_losses(tmp_path / kind)
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "of_relay"),
    [
        ({"generation": {"stage2": {"sampling": {"parameterization": "reference_residual"}}}}, {}),
        ({}, {"crop": 32}),
    ],
)
def test_settings_of_a_relay_reach_its_loss(model, tmp_path, changes, of_relay):
    succeed(train(tmp_path / "plain", settings(model, first=relay(64, 1), second=None)))
    config = settings(model, first=relay(64, 1, **of_relay), second=None, **changes)
    succeed(train(tmp_path / "changed", config))
    assert read_losses(tmp_path / "plain") != read_losses(tmp_path / "changed")


def test_a_relay_is_trained_without_the_models_own_loras(model, tmp_path):
    own = copy_model(model, tmp_path / "model")
    index = json.loads((own / "model_index.json").read_text())
    lora = str(save_lora(tmp_path / "lora.safetensors"))
    index["components"]["stage2_transformer"]["loras"] = [{"path": lora}]
    (own / "model_index.json").write_text(json.dumps(index))
    succeed(train(tmp_path / "out", settings(own, second=None), "--max-steps", 4))
    base = load_components(model, torch.float32, CPU, stages=("stage2",))[0].stage2_transformer
    metadata = read_metadata(tmp_path / "out" / "relay1.safetensors")
    assert metadata[BASE_HASH] == hash_base(base)


def test_a_relay_on_other_images_is_not_continued(model, tmp_path):
    images = tmp_path / "images"
    for name in "ab":
        save_picture(images / f"{name}.png", 64, 64)
        (images / f"{name}.txt").write_text(f"picture {name}")
    config = settings(model, first=None)
    config["second"]["phases"][0]["data"]["manifests"] = [{"path": str(images)}]
    output = tmp_path / "out"
    succeed(train(output, config, "--max-steps", 1))
    (images / "b.txt").write_text("another")
    refused = error_line(train(output, config, "--resume"))
    assert "relay2 has changed since its start: 1 sample with another caption (b" in refused
    result = succeed(train(output, config, "--resume", "--allow-changed-data"))
    assert "continuing on changed data: 1 sample with another caption (b" in result.stderr


@pytest.mark.slow
def test_each_relay_runs_by_itself(model, whole, tmp_path):
    lora1 = whole / "relay1.safetensors"
    alone = succeed(train(tmp_path / "first", settings(model, second=None)))
    assert alone.stdout.strip() == str(tmp_path / "first" / "relay1.safetensors")
    assert_same_lora(tmp_path / "first" / "relay1.safetensors", lora1)
    config = settings(model, first=None, first_lora=str(lora1))
    succeed(train(tmp_path / "second", config))
    assert_same_lora(tmp_path / "second" / "relay2.safetensors", whole / "relay2.safetensors")
    succeed(train(tmp_path / "naive", settings(model, first=None), "--max-steps", 1))
    fused, bare = read_losses(tmp_path / "second"), read_losses(tmp_path / "naive")
    assert fused[0] != bare[0]


@pytest.mark.slow
def test_the_result_is_used_and_the_first_lora_is_not(model, whole, tmp_path):
    clip, photo = save_clip(tmp_path / "clip.mkv", 5), save_picture(tmp_path / "p.png", 64, 64)
    outputs = [tmp_path / name for name in ("plain.mkv", "large.mkv", "made.mkv")]
    more = ("--model", model, "--seed", 1, "--codec", "ffv1")
    succeed(swifti2v("upscale", clip, "-o", outputs[0], *more))
    lora = whole / "relay2.safetensors"
    succeed(swifti2v("upscale", clip, "-o", outputs[1], "--lora", lora, *more))
    assert (frames_of(outputs[0]) != frames_of(outputs[1])).any()
    succeed(
        swifti2v("generate", photo, "-p", "zoom", "-o", outputs[2], "--lora", f"stage2={lora}",
                 "--config", CONFIGS / "nano_vibe.yaml", "--num-frames", 5, *more)
    )  # fmt: skip
    assert len(frames_of(outputs[2])) == 5
    first = swifti2v("upscale", clip, "-o", tmp_path / "a.mkv", "--lora",
                     whole / "relay1.safetensors", *more)  # fmt: skip
    assert "the first LoRA of a relay" in error_line(first)


@pytest.mark.slow
def test_plain_wan_weights_and_a_causal_vae_are_trained_as_well(tmp_path):
    """Model as in the preset `vibe`: no reference channels, original files."""
    hub = wan.make_hub(tmp_path)
    plain = {**wan.preset(hub)["components"]["stage2_transformer"], "reference": "none"}
    model = wan.write_preset(hub, tmp_path, stage2_transformer=plain)
    output = tmp_path / "out"
    succeed(train(output, settings(model, first=relay(64, 1), second=relay(64, 1))))
    assert len(load_file(output / "relay2.safetensors")) > 0


def test_images_with_captions_come_from_a_folder_by_their_aspect(model, tmp_path):
    images = tmp_path / "images"
    for name, width in (("a", 64), ("b", 128), ("c", 70)):
        save_picture(images / f"{name}.png", 64, width)
        (images / f"{name}.txt").write_text(f"picture {name}")
    save_picture(images / "small.png", 40, 40)
    (images / "small.txt").write_text("too small")
    config = settings(model, first=None)
    config["second"]["phases"][0]["data"]["manifests"] = [{"path": str(images)}]
    result = succeed(train(tmp_path / "out", config, "--max-steps", 2))
    assert not (tmp_path / "out" / "relay2" / "procedural").exists()
    assert "left out: 1 x too small" in result.stderr
    for name in "abc":
        (images / f"{name}.png").unlink()
        (images / f"{name}.txt").unlink()
    refused = error_line(train(tmp_path / "other", config))
    assert "0 of 1 samples can be trained on: 1 x too small (small" in refused
    assert "it is 40x40 px" in refused


def test_a_dora_is_trained_and_says_where_it_loads(model, tmp_path):
    config = settings(model, first=None)
    config["second"]["adapter"]["use_dora"] = True
    succeed(train(tmp_path / "out", config, "--max-steps", 1))
    lora = tmp_path / "out" / "relay2.safetensors"
    assert any("lora_magnitude_vector" in name for name in load_file(lora))
    transformer: Any = tiny_pipeline().components.stage2_transformer
    transformer.load_lora_adapter(str(lora))
    clip = save_clip(tmp_path / "clip.mkv", 5)
    result = swifti2v("upscale", clip, "-o", tmp_path / "a.mkv", "--model", model, "--lora", lora)
    assert "DoRA" in error_line(result)


def test_blocks_are_computed_twice_with_the_same_result(model, tmp_path):
    config = settings(model, first=None)
    config["second"]["phases"][0]["steps"] = 2
    succeed(train(tmp_path / "kept", config))
    config["run"]["gradient_checkpointing"] = True
    succeed(train(tmp_path / "twice", config))
    assert read_losses(tmp_path / "kept") == read_losses(tmp_path / "twice")


def test_what_cannot_be_fused_is_refused(model, whole, tmp_path):
    second = whole / "relay2.safetensors"
    result = train(tmp_path / "a", settings(model, first=None, first_lora=str(second)))
    assert "is the second LoRA of a relay" in error_line(result)
    missing = settings(model, first=None, first_lora=str(tmp_path / "none.safetensors"))
    assert "none.safetensors; check the path" in error_line(train(tmp_path / "b", missing))
    other = copy_model(model, tmp_path / "model")
    (file,) = (other / "stage2" / "transformer").glob("*.safetensors")
    state = load_file(file)
    save_file({**state, "proj_out.bias": state["proj_out.bias"] + 1}, file)
    lora1 = str(whole / "relay1.safetensors")
    wrong = train(tmp_path / "c", settings(other, first=None, first_lora=lora1))
    assert "load the model it was trained on" in error_line(wrong)
    narrow = {"blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 48),
              "blocks.0.attn1.to_q.lora_B.weight": torch.zeros(48, 2)}  # fmt: skip
    save_file(narrow, tmp_path / "shape.safetensors")
    shape = settings(model, first=None, first_lora=str(tmp_path / "shape.safetensors"))
    assert "does not fit" in error_line(train(tmp_path / "d", shape))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"first": None, "second": None}, "a relay trains at least one LoRA"),
        ({"first": relay(32, 1), "first_lora": "a.safetensors"}, "leave one of them out"),
        ({"run": {"validation_steps": 5}}, "run.validation_steps is 5"),
        ({"first": {**relay(32, 1), "adapter": {"use_dora": True}}}, "only the second can be"),
        ({"first": relay(32, 1, crop=48)}, "crop 48 is larger than the bucket 32x32"),
        ({"second": relay(40, 1)}, "height 40 does not fit"),
        ({"second": relay(48, 1, attention={"kind": "gclf"})}, "3x3 tokens do not divide into 2x2"),
        (
            {"second": relay(16, 1, objective={"loss": "hfato", "degradation": {"factor": 3}})},
            "cannot be made 3 times smaller",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_a_step(model, tmp_path, changes, named):
    config = settings(model, **{"first": None, **changes})
    assert named in error_line(train(tmp_path / "out", config))
    assert not read_losses(tmp_path / "out")


def test_clips_are_no_images(model, tmp_path):
    config = settings(model, first=None)
    config["second"]["phases"][0]["data"]["rules"]["buckets"] = [[5, 64, 64]]
    named = "bucket 5x64x64 is one of clips; a relay takes images"
    assert named in error_line(train(tmp_path / "out", config))


def test_the_shipped_relay_is_planned_and_nothing_is_made(tmp_path):
    output = tmp_path / "out"
    command = ("--config", CONFIGS / "nano_relay.yaml", "--output-dir", output, "--dry-run")
    result = succeed(swifti2v("train", "relay", *command))
    plan = [line.partition(":")[0] for line in result.stdout.splitlines() if "parameters" in line]
    assert plan == ["# relay1", "# relay2"]
    assert not output.exists()


def test_the_plan_of_the_papers_relay(tmp_path):
    command = ("--config", CONFIGS / "relay_vibe.yaml", "--output-dir", tmp_path / "out")
    result = succeed(swifti2v("train", "relay", *command, "--dry-run"))
    lines = result.stdout.splitlines()
    # In 30 blocks rank 32: two attentions of four 3072 x 3072, and 3072 x 14336 twice.
    count = 30 * 32 * (8 * 2 * 3072 + 2 * (3072 + 14336))
    assert sum(f"{count:,} trained" in line for line in lines) == 2
    # 32 pixels a token: 2048 x 2048 has fewer than 48 x 86.
    largest = (
        "phase 1536x2752, at most 1 latent frames of 1x1536x2752: 1 samples a step, 4,128 tokens"
    )
    assert any(largest in line for line in lines)
