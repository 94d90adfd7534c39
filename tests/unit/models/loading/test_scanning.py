"""A folder of files, as ComfyUI keeps them, searched for what a preset needs."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import CLIPVisionModel, UMT5EncoderModel

from swifti2v.errors import ConfigError, LoadingError
from swifti2v.models.loading.availability import find_missing_weights
from swifti2v.models.loading.models_dir import find_in, is_complete, models_dir
from swifti2v.models.loading.scanning import Item, Scan, Scanner
from swifti2v.models.loading.sources import find_model, split_variant
from swifti2v.storage import hash_file
from tests.helpers import hub
from tests.helpers import packed_files as layouts
from tests.helpers.command_line import error_line, save_photo, succeed, swifti2v
from tests.unit.models.weights import test_names as wan_files

COMMIT = "d" * 40
FP8 = "repackagers/fp8/split_files/diffusion_models/i2v_fp8_scaled.safetensors"
GGUF = "repackagers/gguf/i2v-Q8_0.gguf"
LORA = "repackagers/loras/steps.safetensors"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub with the configurations of the public models and no weights."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.delenv("SWIFTI2V_MODELS_DIR", raising=False)
    source = hub.make_hub(tmp_path / "source")
    for name in ("Wan2.1-I2V", "Wan2.2-TI2V"):
        snapshot = folder / f"models--people--{name}/snapshots/{COMMIT}"
        shutil.copytree(source / name, snapshot)
        (folder / f"models--people--{name}/refs").mkdir()
        (folder / f"models--people--{name}/refs/main").write_text(COMMIT)
        for file in [*snapshot.rglob("*.safetensors"), *snapshot.rglob("*.index.json")]:
            file.unlink()
    return folder


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    values = hub.preset(tmp_path)
    components = values["components"]
    for source in components.values():
        source["source"] = f"people/{source['source']}"
    components["stage1_transformer"] |= {
        "also": ["i2v_fp16.safetensors"],
        "loras": [{"path": LORA}],
        "variants": {"fp8": {"source": FP8, "num_bytes": 123}, "gguf-q8": {"source": GGUF}},
    }
    components["stage2_transformer"]["also"] = ["ti2v_fp16.safetensors"]
    components["text_encoder"]["also"] = ["umt5_fp16.safetensors"]
    components["stage1_vae"]["also"] = ["wan_2.1_vae.safetensors"]
    components["stage2_vae"]["also"] = ["wan2.2_vae.safetensors"]
    components["image_encoder"]["also"] = ["clip_vision_h.safetensors"]
    path = tmp_path / "preset.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """``ComfyUI/models`` with the first stage in fp8, and what both stages share."""
    folder = tmp_path / "models"
    for name in ("diffusion_models", "text_encoders", "vae", "clip_vision", "loras"):
        (folder / name).mkdir(parents=True)
    native = wan_files.original_transformer(hub.state_of(hub.stage1()))
    layouts.write(
        layouts.SAFETENSORS["ComfyUI old"](native),
        folder / "diffusion_models/I2V_fp8_Scaled.safetensors",
    )
    second = wan_files.original_transformer(hub.state_of(hub.stage2_base()))
    hub.save(second, folder / "diffusion_models/ti2v_fp16.safetensors")
    encoder = hub.state_of(hub.make(UMT5EncoderModel, hub.TEXT))
    del encoder["encoder.embed_tokens.weight"]
    hub.save(encoder, folder / "text_encoders/umt5_fp16.safetensors")
    vae = wan_files.original_vae(
        hub.state_of(hub.make(diffusers.AutoencoderKLWan, **hub.WAN21_VAE)), False
    )
    hub.save(vae, folder / "vae/wan_2.1_vae.safetensors")
    vae = wan_files.original_vae(
        hub.state_of(hub.make(diffusers.AutoencoderKLWan, **hub.WAN22_VAE)), True
    )
    hub.save(vae, folder / "vae/wan2.2_vae.safetensors")
    clip = hub.state_of(hub.make(CLIPVisionModel, hub.CLIP))
    hub.save(wan_files.original_clip(clip), folder / "clip_vision/clip_vision_h.safetensors")
    save_file({"a": torch.ones(1)}, folder / "loras/steps.safetensors")
    return folder


def item(found: Scan, component: str, variant: str = "bf16") -> Item:
    return next(i for i in found.items if (i.component, i.variant) == (component, variant))


def test_a_comfyui_folder_has_what_it_has(cache: Path, preset: Path, comfyui: Path) -> None:
    found = Scanner(comfyui).scan(str(preset))
    statuses = {(i.component, i.variant): i.status for i in found.items}
    missing = {("stage1_transformer", "bf16"), ("stage1_transformer", "gguf-q8")}
    assert {key for key, status in statuses.items() if status == "missing"} == missing
    assert {status for key, status in statuses.items() if key not in missing} == {"found"}
    assert found.lacking == {
        "bf16": ("stage1_transformer",),
        "fp8": (),
        "gguf-q8": ("stage1_transformer",),
    }
    fp8 = item(found, "stage1_transformer", "fp8")
    assert fp8.path == str(comfyui / "diffusion_models/I2V_fp8_Scaled.safetensors")
    assert fp8.form == "float8_e4m3fn, scaled"
    assert item(found, "text_encoder").form == "float32"
    assert Scanner(comfyui).scan(f"{preset}:fp8") == found
    whole = item(found, "stage1_transformer")
    assert whole.command == 'hf download people/Wan2.1-I2V --include "transformer/*"'
    assert whole.note == "another variant is here: fp8"
    gguf = item(found, "stage1_transformer", "gguf-q8")
    assert gguf.command == "hf download repackagers/gguf i2v-Q8_0.gguf"
    file = comfyui / "diffusion_models/I2V_fp8_Scaled.safetensors"
    file.rename(file.with_name("mine.safetensors"))
    whole = item(Scanner(comfyui).scan(str(preset)), "stage1_transformer")
    assert "perhaps another model: diffusion_models/mine.safetensors (float8_e4m3fn, scaled)" in (
        whole.note
    )


def test_the_folder_is_enough_for_a_run_of_the_variant(
    cache: Path, preset: Path, comfyui: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (comfyui / "loras/steps.safetensors").unlink()
    values = yaml.safe_load(preset.read_text())
    del values["components"]["stage1_transformer"]["loras"]
    preset.write_text(yaml.safe_dump(values))
    monkeypatch.setenv("SWIFTI2V_MODELS_DIR", str(comfyui))
    assert find_missing_weights(f"{preset}:fp8", with_stage1=True) == []
    found = hub.load(f"{preset}:fp8")
    assert type(found.stage1_transformer.blocks[0].attn1.to_q).__name__ == "PackedLinear"
    assert found.stage2_vae.config["z_dim"] == 48
    missing = find_missing_weights(str(preset), with_stage1=True)
    assert [files.pattern for files in missing] == ["transformer"]


def test_a_half_downloaded_file_is_named(cache: Path, preset: Path, comfyui: Path) -> None:
    file = comfyui / "diffusion_models/I2V_fp8_Scaled.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    found = item(Scanner(comfyui).scan(str(preset)), "stage1_transformer", "fp8")
    assert found.status == "damaged"
    assert "its download did not finish" in found.note


def test_what_a_downloader_left_is_named(cache: Path, preset: Path, comfyui: Path) -> None:
    file = comfyui / "diffusion_models/I2V_fp8_Scaled.safetensors"
    control = file.with_name(f"{file.name}.aria2")
    control.touch()  # the file has its full size already
    found = item(Scanner(comfyui).scan(str(preset)), "stage1_transformer", "fp8")
    assert (found.status, "not finished" in found.note) == ("damaged", True)
    control.unlink()
    part = file.rename(file.with_name(f"{file.name}.crdownload"))
    found = item(Scanner(comfyui).scan(str(preset)), "stage1_transformer", "fp8")
    assert (found.status, found.path) == ("damaged", str(part))
    assert "download repackagers/fp8 split_files" in str(found.command)


def test_of_two_names_the_first_is_taken(cache: Path, preset: Path, comfyui: Path) -> None:
    values = yaml.safe_load(preset.read_text())
    values["components"]["stage2_transformer"]["also"] += ["ti2v_bf16.safetensors"]
    preset.write_text(yaml.safe_dump(values))
    folder = comfyui / "diffusion_models"
    native = wan_files.original_transformer(hub.state_of(hub.stage2_base()))
    layouts.write(layouts.SAFETENSORS["bf16"](native), folder / "ti2v_bf16.safetensors")
    found = item(Scanner(comfyui).scan(str(preset)), "stage2_transformer")
    assert (found.status, found.path) == ("found", str(folder / "ti2v_fp16.safetensors"))


def test_a_run_refuses_a_half_downloaded_file_before_any_work(
    cache: Path, preset: Path, comfyui: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in comfyui.rglob("*.safetensors"):
        if "fp8" in file.name.lower():
            file.write_bytes(file.read_bytes()[:-100])
    monkeypatch.setenv("SWIFTI2V_MODELS_DIR", str(comfyui))
    with pytest.raises(LoadingError, match=r"I2V_fp8_Scaled.*did not finish; fetch it again"):
        find_missing_weights(f"{preset}:fp8", with_stage1=True)


def test_a_file_of_another_model_under_the_name_is_told(
    cache: Path, preset: Path, comfyui: Path
) -> None:
    wide = hub.make(diffusers.WanTransformer3DModel, **hub.STAGE1 | {"ffn_dim": 48})
    hub.save(
        wan_files.original_transformer(hub.state_of(wide)),
        comfyui / "diffusion_models/I2V_fp8_Scaled.safetensors",
    )
    shutil.copy(comfyui / "vae/wan_2.1_vae.safetensors", comfyui / "vae/wan2.2_vae.safetensors")
    scan = Scanner(comfyui).scan(str(preset))
    found = item(scan, "stage1_transformer", "fp8")
    assert (found.status, found.note) == (
        "another model",
        "a model of other sizes: ffn_dim 48 for 32",
    )
    assert item(scan, "stage2_vae").status == "another model"
    assert set(scan.lacking["fp8"]) == {"stage1_transformer", "stage2_vae"}


def test_two_different_files_of_one_name_are_not_chosen_from(
    cache: Path, preset: Path, comfyui: Path
) -> None:
    (comfyui / "old").mkdir()
    save_file({"a": torch.ones(1)}, comfyui / "old/ti2v_fp16.safetensors")
    found = item(Scanner(comfyui).scan(str(preset)), "stage2_transformer")
    assert found.status == "unclear"
    assert "several files of the name" in found.note


def test_a_renamed_file_is_found_by_its_hash(cache: Path, preset: Path, comfyui: Path) -> None:
    file = comfyui / "diffusion_models/I2V_fp8_Scaled.safetensors"
    values = yaml.safe_load(preset.read_text())
    row = values["components"]["stage1_transformer"]["variants"]["fp8"]
    row["sha256"] = hash_file(file)
    preset.write_text(yaml.safe_dump(values))
    renamed = file.rename(file.with_name("my favourite.safetensors"))
    assert item(Scanner(comfyui).scan(str(preset)), "stage1_transformer", "fp8").status == "missing"
    found = item(Scanner(comfyui, hashes=True).scan(str(preset)), "stage1_transformer", "fp8")
    assert (found.status, found.path, found.sha256) == ("found", str(renamed), row["sha256"])
    row["sha256"] = "0" * 64
    preset.write_text(yaml.safe_dump(values))
    renamed.rename(file)
    found = item(Scanner(comfyui, hashes=True).scan(str(preset)), "stage1_transformer", "fp8")
    assert found.status == "another model"
    assert "SHA-256 is not 000000000000" in found.note


def test_a_cache_of_the_hub_is_a_folder_like_any_other(
    cache: Path, preset: Path, tmp_path: Path
) -> None:
    other = tmp_path / "elsewhere"
    snapshot = other / f"hub/models--people--Wan2.1-I2V/snapshots/{COMMIT}"
    shutil.copytree(tmp_path / "source/Wan2.1-I2V", snapshot)
    found = Scanner(other).scan(str(preset))
    assert item(found, "stage1_transformer").path == str(snapshot / "transformer")
    next((snapshot / "transformer").glob("*-00001-of-*")).unlink()
    assert item(Scanner(other).scan(str(preset)), "stage1_transformer").status == "missing"
    assert not is_complete(snapshot / "transformer")
    next((snapshot / "transformer").glob("*.index.json")).unlink()
    assert not is_complete(snapshot / "transformer")


def test_the_command_prints_a_table_and_json(cache: Path, preset: Path, comfyui: Path) -> None:
    lines = succeed(swifti2v("models", "scan", comfyui, "--model", preset)).stdout.splitlines()
    assert any(
        line.split()[:4]
        == ["stage1_transformer", "fp8", "found", "diffusion_models/I2V_fp8_Scaled.safetensors"]
        for line in lines
    )
    assert f"  complete: --model {preset}:fp8 --models-dir {comfyui}" in lines
    assert (
        f"  {preset} lacks stage1_transformer: swifti2v models download {preset} --variant bf16 "
        f"--models-dir {comfyui}" in lines
    )
    result = succeed(swifti2v("models", "scan", comfyui, "--model", preset, "--json"))
    [told] = json.loads(result.stdout)
    assert told["lacking"] == {
        "bf16": ["stage1_transformer"], "fp8": [], "gguf-q8": ["stage1_transformer"]
    }  # fmt: skip


def test_all_presets_that_ship_are_looked_for(cache: Path, comfyui: Path) -> None:
    name = "wan2.1_i2v_480p_14B_fp8_scaled.safetensors"
    shutil.copy(comfyui / "diffusion_models/I2V_fp8_Scaled.safetensors", comfyui / name)
    told = json.loads(succeed(swifti2v("models", "scan", comfyui, "--json")).stdout)
    names = {found["model"] for found in told}
    assert {"paper", "public", "small", "vibe"} <= names
    paper = next(found for found in told if found["model"] == "paper")
    [fp8] = [
        i for i in paper["items"] if (i["component"], i["variant"]) == ("stage1_transformer", "fp8")
    ]
    assert fp8["status"] == "another model"  # a tiny one
    assert "num_layers 2 for 40" in fp8["note"]
    assert "stage2_transformer" in paper["lacking"]["gguf-q4"]


def test_a_folder_that_is_none_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    assert "is not a folder" in error_line(swifti2v("models", "scan", tmp_path / "no"))
    monkeypatch.setenv("SWIFTI2V_MODELS_DIR", str(tmp_path / "no"))
    with pytest.raises(ConfigError, match="SWIFTI2V_MODELS_DIR"):
        models_dir()


def test_a_name_with_a_variant_takes_its_files(preset: Path) -> None:
    index, _ = find_model(f"{preset}:fp8")
    source = index.components["stage1_transformer"]
    assert (source.source, source.subfolder, source.num_bytes) == (FP8, "", 123)
    assert source.architecture == "people/Wan2.1-I2V/transformer"
    assert source.loras[0].path == LORA
    assert index.components["stage2_vae"] == find_model(preset)[0].components["stage2_vae"]
    assert find_model(f"{preset}:bf16") == find_model(preset)
    with pytest.raises(ConfigError, match="'fp4' is unknown; there are bf16, fp8, gguf-q8"):
        find_model(f"{preset}:fp4")


def test_paths_with_colons_are_paths(tmp_path: Path) -> None:
    odd = tmp_path / "a:b.yaml"
    odd.write_text("")
    assert split_variant(odd) == (str(odd), "bf16")
    assert split_variant("C:\\models\\a.yaml") == ("C:\\models\\a.yaml", "bf16")
    assert split_variant("paper:fp8") == ("paper", "fp8")
    assert split_variant("/a/b:c/d.yaml") == ("/a/b:c/d.yaml", "bf16")


def test_a_folder_under_the_name_of_its_repository_is_found(tmp_path: Path) -> None:
    source = hub.make_hub(tmp_path)
    assert find_in(source, "people/Wan2.1-I2V", "vae") == source / "Wan2.1-I2V/vae"
    assert find_in(source, "people/Wan2.1-I2V", "nothing") is None


@pytest.mark.slow
def test_a_clip_is_made_from_a_comfyui_folder_without_the_hub(
    cache: Path, preset: Path, comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA and tokenizer included; the folder's variant is stored with the video."""
    pair = {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.ones(1, 128),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.ones(128, 1),
    }
    save_file(pair, comfyui / "loras/steps.safetensors")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("the network was asked"))
    photo, video = save_photo(tmp_path / "photo.png", 64, 64), tmp_path / "a.mkv"
    words = (photo, "-p", "a cat", "-o", video, "--seed", 1, "--num-frames", 5)
    model = ("--model", f"{preset}:fp8", "--models-dir", comfyui)
    succeed(swifti2v("generate", *words, *model, "--codec", "ffv1"))
    assert json.loads(succeed(swifti2v("info", video, "--json")).stdout)["model"] == model[1]
    message = error_line(swifti2v("generate", *words[:-2], "--model", f"{preset}:fp4"))
    assert "variant 'fp4' is unknown; there are bf16, fp8, gguf-q8" in message
