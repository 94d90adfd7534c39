"""Shipped presets as they are, from tiny files under the names and in the layouts of the public ones."""

import shutil
import socket
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionModel, UMT5EncoderModel

from swifti2v.media import read_clip
from swifti2v.models.loading.sources import find_model
from swifti2v.models.weights.names import wan_names
from tests.helpers import hub
from tests.helpers import packed_files as layouts
from tests.helpers.command_line import error_line, save_photo, succeed, swifti2v
from tests.helpers.timesteps import told
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
    """FastWan's layout: pairs and biases of the blocks, and the patch embedding's bias alone."""
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for layer in LAYERS:
        out, inside = widths[layer]
        stem = f"diffusion_model.{layer}"
        tensors |= {
            f"{stem}.lora_down.weight": torch.randn(2, inside, generator=generator),
            f"{stem}.lora_up.weight": torch.randn(out, 2, generator=generator),
            f"{stem}.diff_b": torch.randn(out, generator=generator),
        }
    tensors["diffusion_model.patch_embedding.diff_b"] = torch.ones(128)
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
    num_keys = 3 * len(LAYERS) + 1
    merged = f"{num_keys} of {num_keys} keys merged at strength 1"
    assert result.stdout.count(merged) == num_loras
    frames = read_clip(video).frames
    assert frames.shape == (9, 128, 128, 3)
    assert frames.std() > 1


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
