"""Shipped presets as they are, from tiny files under the names and in the layouts of the public ones."""

import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import CLIPVisionModel, UMT5EncoderModel

from swifti2v.config import GenerationConfig, parse_config
from swifti2v.evaluation.verify.files import Outlines, check_lora
from swifti2v.evaluation.verify.findings import Finding
from swifti2v.evaluation.verify.known_sampling import check_sampling
from swifti2v.evaluation.verify.report import verify
from swifti2v.media import read_clip
from swifti2v.models.loading.sources import find_model
from swifti2v.models.weights.names import wan_names
from swifti2v.shipped import PACKAGE
from tests.helpers import hub
from tests.helpers import packed_files as layouts
from tests.helpers.command_line import error_line, save_photo, succeed, swifti2v
from tests.helpers.hub_server import HubServer
from tests.helpers.timesteps import told
from tests.integration.test_models_download import run as run_download
from tests.unit.models.weights import test_names as wan_files

COMMIT = "d" * 40
WAN21, WAN22 = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
FASTWAN = "Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16.safetensors"
LIGHTX2V = "Wan21_I2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors"
LAYERS = [
    f"blocks.{block}.{layer}"
    for block in (0, 1)
    for layer in (
        *(f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"), "ffn.0", "ffn.2"
    )
]  # fmt: skip
OUTER = (
    "head.head",
    *(f"text_embedding.{n}" for n in (0, 2)),
    *(f"time_embedding.{n}" for n in (0, 2)),
    "time_projection.1",
)
NUM_KEYS = 36 * 2 + 19
"""In a file for two blocks."""
SIZE = ("--height", 128, "--width", 128, "--num-frames", 9)


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, and nobody who answers."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("SWIFTI2V_MODELS_DIR", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("the network was asked"))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both repositories; that of Wan2.2 has the text encoder and the tokenizer as well."""
    root = hub.make_hub(tmp_path_factory.mktemp("source"))
    for name in ("tokenizer", "text_encoder"):
        shutil.copytree(root / "Wan2.1-I2V" / name, root / "Wan2.2-TI2V" / name)
    return root


def snapshot(cache: Path, repo: str, folder: Path, *subfolders: str) -> None:
    """A repository in the cache of the Hub, or some folders of it."""
    place = cache / f"models--{repo.replace('/', '--')}"
    for name in subfolders:
        shutil.copytree(folder / name, place / "snapshots" / COMMIT / name)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs/main").write_text(COMMIT)


def lora(widths: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """FastWan's layout, which has 1,099 keys with 30 blocks: pairs and biases of the linear layers,
    differences of the norms, and the patch embedding's bias alone.
    """
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for layer in (*LAYERS, *OUTER):
        out, inside = widths[layer]
        stem = f"diffusion_model.{layer}"
        tensors |= {
            f"{stem}.lora_down.weight": torch.randn(2, inside, generator=generator),
            f"{stem}.lora_up.weight": torch.randn(out, 2, generator=generator),
            f"{stem}.diff_b": torch.randn(out, generator=generator),
        }
    for block in (0, 1):
        for norm in (
            "self_attn.norm_q",
            "self_attn.norm_k",
            "cross_attn.norm_q",
            "cross_attn.norm_k",
        ):
            tensors[f"diffusion_model.blocks.{block}.{norm}.diff"] = torch.ones(128)
        for kind in ("diff", "diff_b"):
            tensors[f"diffusion_model.blocks.{block}.norm3.{kind}"] = torch.ones(128)
    tensors["diffusion_model.patch_embedding.diff_b"] = torch.ones(128)
    assert len(tensors) == NUM_KEYS
    return {key: 0.05 * tensor for key, tensor in tensors.items()}


def widths_of(model: Any) -> dict[str, torch.Size]:
    names = {new: old for old, new in wan_names(2).items()}
    return {
        names[name]: layer.weight.shape
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name in names
    }


@pytest.fixture(scope="module")
def comfyui(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ComfyUI/models`` with both small variants of all presets, and the LoRAs."""
    folder = tmp_path_factory.mktemp("comfyui") / "models"
    for name in ("diffusion_models", "text_encoders", "vae", "clip_vision", "loras"):
        (folder / name).mkdir(parents=True)
    encoder = hub.state_of(hub.make(UMT5EncoderModel, hub.TEXT))
    del encoder["encoder.embed_tokens.weight"]
    first, second = (
        wan_files.original_transformer(hub.state_of(model))
        for model in (hub.stage1(), hub.stage2_base())
    )
    scaled = layouts.SAFETENSORS["ComfyUI old"]
    for state, name in (
        (encoder, "text_encoders/umt5_xxl_fp8_e4m3fn_scaled"),
        (first, "diffusion_models/wan2.1_i2v_480p_14B_fp8_scaled"),
        (second, "diffusion_models/Wan2_2-TI2V-5B_fp8_e4m3fn_scaled_KJ"),
    ):
        layouts.write(scaled(state), folder / f"{name}.safetensors")
    for state, name, architecture in (
        (layouts.gguf_umt5(encoder), "text_encoders/umt5-xxl-encoder-Q4_K_M", "t5encoder"),
        (first, "diffusion_models/wan2.1-i2v-14b-480p-Q4_K_M", "wan"),
        (second, "diffusion_models/Wan2.2-TI2V-5B-Q4_K_M", "wan"),
    ):
        layouts.write_gguf(state, folder / f"{name}.gguf", "Q8_0", architecture)
    for config, name, is_residual in (
        (hub.WAN21_VAE, "wan_2.1_vae", False), (hub.WAN22_VAE, "wan2.2_vae", True)
    ):  # fmt: skip
        vae = hub.state_of(hub.make(diffusers.AutoencoderKLWan, **config))
        hub.save(wan_files.original_vae(vae, is_residual), folder / f"vae/{name}.safetensors")
    clip = hub.state_of(hub.make(CLIPVisionModel, hub.CLIP))
    hub.save(wan_files.original_clip(clip), folder / "clip_vision/clip_vision_h.safetensors")
    save_file(lora(widths_of(hub.stage2_base())), folder / "loras" / FASTWAN)
    save_file(lora(widths_of(hub.stage1())), folder / "loras" / LIGHTX2V)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return save_photo(tmp_path / "photo.png", 128, 128)


PRESETS = {
    "public": (WAN21, [1000.0, 937.5, 833.333, 625.0, 757.0, 522.0], 2),
    "small": (WAN22, [1000.0, 757.0, 522.0, 757.0, 522.0], 2),
}
"""Repository of text encoder and tokenizer, timesteps of a clip of one segment, LoRAs."""
by_preset = pytest.mark.parametrize("name", PRESETS)


@by_preset
@pytest.mark.parametrize("variant", ["fp8", "gguf-q4"])
def test_a_preset_runs_from_the_small_files_that_people_have(
    name: str, variant: str, no_network: Path, source: Path, comfyui: Path, photo: Path
) -> None:
    repo, levels, num_loras = PRESETS[name]
    snapshot(no_network, repo, source / "Wan2.1-I2V", "tokenizer")
    video = photo.with_name("a.mkv")
    words = ("generate", photo, "-p", "a cat", "-o", video, "--seed", 1, *SIZE)
    with told() as seen:
        result = succeed(swifti2v(*words, "--model", f"{name}:{variant}", "--models-dir", comfyui))
    assert seen == pytest.approx(levels, abs=1e-3)
    merged = f"{NUM_KEYS} of {NUM_KEYS} keys merged at strength 1"
    assert result.stdout.count(merged) == num_loras
    frames = read_clip(video).frames
    assert frames.shape == (9, 128, 128, 3)
    assert frames.std() > 1


def test_a_batch_runs_from_the_files_of_a_folder(
    no_network: Path, source: Path, comfyui: Path, photo: Path, tmp_path: Path
) -> None:
    snapshot(no_network, WAN22, source / "Wan2.1-I2V", "tokenizer")
    (tmp_path / "clips.csv").write_text(f"image,prompt,seed\n{photo},fog,1\n")
    settings = ("model=small:fp8", "height=128", "width=128", "num_frames=9")
    words = [word for setting in settings for word in ("--set", setting)]
    out = tmp_path / "out"
    result = succeed(
        swifti2v("batch", tmp_path / "clips.csv", "-o", out, *words, "--models-dir", comfyui)
    )
    assert "1 of 1 clips finished, 0 failed" in result.stdout
    assert "SWIFTI2V_MODELS_DIR" not in os.environ


@by_preset
def test_a_preset_runs_from_whole_folders_in_the_hubs_cache(
    name: str, no_network: Path, source: Path, comfyui: Path, photo: Path
) -> None:
    parts = ("tokenizer", "text_encoder", "transformer", "vae")
    snapshot(no_network, WAN21, source / "Wan2.1-I2V", *parts, "image_encoder")
    snapshot(no_network, WAN22, source / "Wan2.2-TI2V", *parts)
    for role in find_model(name)[0].components.values():
        for each in role.loras:
            organization, repository, *inside = each.path.split("/")
            place = no_network / f"models--{organization}--{repository}"
            file = place / "snapshots" / COMMIT / "/".join(inside)
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(comfyui / "loras" / inside[-1], file)
            (place / "refs").mkdir(exist_ok=True)
            (place / "refs/main").write_text(COMMIT)
    words = ("generate", photo, "-p", "a cat", "-o", photo.with_name("a.mkv"), "--seed", 1, *SIZE)
    with told() as seen:
        succeed(swifti2v(*words, "--model", name))
    assert seen == pytest.approx(PRESETS[name][1], abs=1e-3)


@by_preset
def test_a_preset_without_its_lora_says_how_to_get_it(
    name: str, no_network: Path, source: Path, comfyui: Path, photo: Path, tmp_path: Path
) -> None:
    snapshot(no_network, PRESETS[name][0], source / "Wan2.1-I2V", "tokenizer")
    folder = shutil.copytree(comfyui, tmp_path / "models")
    (folder / "loras" / FASTWAN).unlink()
    words = ("generate", photo, "-p", "a cat", "-o", photo.with_name("a.mp4"), *SIZE)
    message = error_line(swifti2v(*words, "--model", f"{name}:fp8", "--models-dir", folder))
    assert f"hf download Kijai/WanVideo_comfy FastWan/{FASTWAN}" in message


@by_preset
def test_a_folder_of_comfyui_is_searched_for_all_files_of_a_preset(
    name: str, no_network: Path, comfyui: Path
) -> None:
    """By their names; the tiny ones are told from the public ones."""
    [found] = json.loads(
        succeed(swifti2v("models", "scan", comfyui, "--model", name, "--json")).stdout
    )
    status = {(item["component"], item["variant"]): item["status"] for item in found["items"]}
    for component in find_model(name)[0].components:
        for variant in find_model(name)[0].components[component].variants:
            assert status[component, variant] == "another model"
    assert status["LoRA of stage2_transformer", "bf16"] == "found"
    assert status["tokenizer", "bf16"] == "missing"
    [lacking] = [item for item in found["items"] if item["component"] == "tokenizer"]
    assert lacking["command"] == f'hf download {PRESETS[name][0]} --include "tokenizer/*"'


@pytest.fixture
def repositories(source: Path, comfyui: Path, tmp_path: Path) -> Path:
    """The Hub with tiny files at the places that the presets name."""
    root = tmp_path / "repositories"
    shutil.copytree(source / "Wan2.1-I2V", root / WAN21)
    shutil.copytree(source / "Wan2.2-TI2V", root / WAN22)
    files = {file.name: file for file in comfyui.rglob("*") if file.is_file()}
    for name in PRESETS:
        for role in find_model(name)[0].components.values():
            for path in (
                *(v.source for v in role.variants.values()),
                *(x.path for x in role.loras),
            ):
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(files[Path(path).name], root / path)
    return root


@by_preset
def test_a_preset_is_downloaded_and_runs_without_the_hub(
    name: str, no_network: Path, repositories: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer(repositories).run() as server:
        code, out, err = run_download(server, no_network, name, "--variant", "fp8")
        assert (code, out) == (0, f"complete: --model {name}:fp8\n"), err
        fetched = [path for method, path, _ in server.requests if method == "GET"]
    weights = [path for path in fetched if path.endswith((".safetensors", ".gguf"))]
    assert len(weights) == len({*weights})  # shared files once
    index = find_model(f"{name}:fp8")[0]
    wanted = {Path(s.source).name for s in index.components.values() if s.form}
    wanted |= {Path(lora.path).name for s in index.components.values() for lora in s.loras}
    assert wanted <= {Path(path).name for path in weights}
    assert not any("/transformer/" in path or path.endswith(".gguf") for path in fetched)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(no_network / "hub"))
    words = ("generate", photo, "-p", "a cat", "-o", photo.with_name("a.mkv"), "--seed", 1, *SIZE)
    succeed(swifti2v(*words, "--model", f"{name}:fp8"))


@by_preset
@pytest.mark.parametrize("variant", ["bf16", "fp8", "gguf-q4"])
def test_verify_knows_how_the_weights_of_a_preset_are_sampled(
    name: str, variant: str, no_network: Path, source: Path, comfyui: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("SWIFTI2V_MODELS_DIR", str(comfyui))
    if variant == "bf16":
        snapshot(no_network, WAN22, source / "Wan2.2-TI2V", "transformer")
    index, root = find_model(f"{name}:{variant}")
    config = parse_config(GenerationConfig, index.settings, name)
    outlines = Outlines(index, root, torch.float32)
    outlines.make("stage2_transformer")
    (lora,) = index.components["stage2_transformer"].loras
    fits = check_lora(outlines, "stage2_transformer", lora)
    assert (fits.status, fits.values["matched"]) == ("ok", NUM_KEYS)

    def check(**changes: Any) -> Finding:
        sampling = replace(config.stage2.sampling, **changes)
        return check_sampling(outlines, "stage2", sampling, ())

    assert check().status == check(shift=1.0, strength=0.522).status == "ok"
    assert "stage2.sampling.rule is euler" in check(rule="euler").cause
    cause = check(sigmas=(0.9, 0.757, 0.5)).cause
    assert "stage2.sampling.sigmas is (0.9, 0.757, 0.5)" in cause


@pytest.mark.slow  # all checks
def test_verify_tries_one_model_in_both_stages(
    no_network: Path, source: Path, comfyui: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    snapshot(no_network, WAN22, source / "Wan2.2-TI2V", "tokenizer")
    monkeypatch.setenv("SWIFTI2V_MODELS_DIR", str(comfyui))
    values = yaml.safe_load((PACKAGE / "presets/small.yaml").read_text())
    values["settings"] |= {"height": 128, "width": 128}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(values))
    report = verify(f"{file}:fp8", device=torch.device("cpu"), dtype=torch.float32)
    found = {finding.check: finding.status for finding in report.findings}
    off = {check for check, status in found.items() if status != "ok"}
    random = {"denoising of stage1", "denoising of stage2", "VAE of stage1", "VAE of stage2"}
    assert off == random | {"a short clip"}  # its first frame
    for stage, levels in (("stage1", 3), ("stage2", 2)):
        (denoising,) = [f for f in report.findings if f.check == f"denoising of {stage}"]
        assert len([name for name in denoising.values if name.startswith("error at")]) == levels
