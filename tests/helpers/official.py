"""Tiny models in the layout of Wan's own repositories, and a Hub that holds them."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.helpers.hub import (
    CLIP,
    STAGE1,
    STAGE2,
    TEXT,
    WAN21_VAE,
    WAN22_VAE,
    State,
    make,
    state_of,
)
from tests.unit.models.weights import test_names as wan_files

FIRST, SECOND = "Wan-AI/Wan2.1-I2V-14B-480P", "Wan-AI/Wan2.2-TI2V-5B"
NUM_SHARDS = 3
# What the configurations leave out is as in the real models: the width of text and of CLIP.
WIDE_TEXT = UMT5Config(**TEXT.to_dict() | {"d_model": 4096})
WIDE_CLIP = CLIPVisionConfig(**CLIP.to_dict() | {"hidden_size": 1280, "num_attention_heads": 16})
SIZES: dict[str, dict[str, Any]] = {
    FIRST: STAGE1 | {"text_dim": 4096, "image_dim": 1280},
    SECOND: STAGE2 | {"text_dim": 4096},
}
VAES = {FIRST: ("Wan2.1_VAE.pth", WAN21_VAE), SECOND: ("Wan2.2_VAE.pth", WAN22_VAE)}


def transformer(name: str) -> Any:
    return make(diffusers.WanTransformer3DModel, **SIZES[name])


def vae(name: str) -> Any:
    return make(diffusers.AutoencoderKLWan, **VAES[name][1])


def text_encoder() -> Any:
    return make(UMT5EncoderModel, WIDE_TEXT)


def image_encoder() -> Any:
    return make(CLIPVisionModel, WIDE_CLIP)


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """``config.json`` with the keys that the real ones have."""
    sizes = SIZES[name]
    heads = sizes["num_attention_heads"]
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": heads * sizes["attention_head_dim"],
        "eps": 1e-06,
        "ffn_dim": sizes["ffn_dim"],
        "freq_dim": sizes["freq_dim"],
        "in_dim": sizes["in_channels"],
        "model_type": "i2v" if name == FIRST else "ti2v",
        "num_heads": heads,
        "num_layers": sizes["num_layers"],
        "out_dim": sizes["out_channels"],
        "text_len": 24,
    } | changes


def save_shards(state: State, folder: Path) -> None:
    """Shards and their index."""
    files = [
        f"diffusion_pytorch_model-{number:05d}-of-{NUM_SHARDS:05d}.safetensors"
        for number in range(1, NUM_SHARDS + 1)
    ]
    places = {key: files[number % NUM_SHARDS] for number, key in enumerate(state)}
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        own = {key: state[key].contiguous() for key in state if places[key] == file}
        save_file(own, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def make_official(root: Path) -> Path:
    """Both repositories below ``root``, under their names on the Hub."""
    for name, (vae_file, sizes) in VAES.items():
        folder = root / name
        save_shards(wan_files.original_transformer(state_of(transformer(name))), folder)
        (folder / "config.json").write_text(json.dumps(config_of(name)))
        state = wan_files.original_vae(state_of(vae(name)), sizes.get("is_residual", False))
        torch.save(state, folder / vae_file)
    folder = root / FIRST
    torch.save(
        wan_files.original_umt5(state_of(text_encoder())),
        folder / "models_t5_umt5-xxl-enc-bf16.pth",
    )
    torch.save(
        wan_files.original_clip(state_of(image_encoder())),
        folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    )
    vocabulary = [(text, -1.0) for text in ("<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnop")]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder / "google/umt5-xxl")
    return root


class FakeHub:
    """Serves the repositories below a folder, as ``huggingface_hub.snapshot_download`` does.

    Args:
        root: Holds ``org/repo`` folders.
        cache: Where snapshots are put.
    """

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache = root, cache
        self.fetched: list[str] = []
        """Files in the order they came, as ``org/repo/path``."""

    def snapshot_download(self, repo_id: str, *, allow_patterns: Any = None) -> str:
        source, target = self.root / repo_id, self.cache / repo_id
        files = sorted(str(f.relative_to(source)) for f in source.rglob("*") if f.is_file())
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            if not (target / file).exists():
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / file, target / file)
                self.fetched.append(f"{repo_id}/{file}")
        return str(target)


def serve(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """Put a Hub in the place of the real one."""
    hub = FakeHub(root, cache)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub
