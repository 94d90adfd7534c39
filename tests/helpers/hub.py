"""Tiny models of the real classes, in the layouts and files that users have."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from swifti2v.models.loading.components import load_components
from swifti2v.models.transformer import SegmentTransformer3DModel
from tests.helpers.tiny import SIZE
from tests.unit.models.weights import test_names as wan_files

CPU = torch.device("cpu")
State = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {
    "num_attention_heads": 1, "attention_head_dim": 128, "text_dim": 16, "freq_dim": 16,
    "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 1024,
}  # fmt: skip
WAN21_VAE: dict[str, Any] = {"base_dim": 4}
WAN22_VAE: dict[str, Any] = {
    "base_dim": 4, "decoder_base_dim": 4, "z_dim": 48, "is_residual": True, "patch_size": 2,
    "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16,
    "latents_mean": [0.1] * 48, "latents_std": [1.5] * 48,
}  # fmt: skip
TEXT = UMT5Config(
    vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2,
    feed_forward_proj="gated-gelu",
)  # fmt: skip
CLIP = CLIPVisionConfig(
    hidden_size=80, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1,
    image_size=8, patch_size=4, projection_dim=8,
)  # fmt: skip
STAGE1 = SIZES | {"in_channels": 36, "out_channels": 16, "image_dim": 80, "added_kv_proj_dim": 128}
STAGE2 = SIZES | {"in_channels": 48, "out_channels": 48}
SETTINGS: dict[str, Any] = {
    "num_frames": 17, "height": 64, "width": 64,
    "stage1": {"downscale": 2, "sampling": {"num_inference_steps": 1}},
    "stage2": {"segment_size": 2, "sampling": {"num_inference_steps": 1}},
}  # fmt: skip


def make(kind: Any, *args: Any, seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
    return wan_files.randomized(kind(*args, **config)).train(False).requires_grad_(False)


def stage1(seed: int = 0) -> Any:
    return make(diffusers.WanTransformer3DModel, seed=seed, **STAGE1)


def stage2_base(seed: int = 0) -> Any:
    return make(diffusers.WanTransformer3DModel, seed=seed, **STAGE2)


def state_of(model: Any) -> State:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_equal(found: Any, expected: State) -> None:
    state = found.state_dict()
    assert state.keys() == expected.keys()
    assert [key for key in state if not torch.equal(state[key], expected[key])] == []


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def make_hub(root: Path) -> Path:
    """Wan2.1-I2V and Wan2.2-TI2V as they lie on the Hub, in two folders below ``root``."""
    first, second = root / "Wan2.1-I2V", root / "Wan2.2-TI2V"
    vocabulary = [
        (text, -1.0) for text in ("<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz")
    ]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(first / "tokenizer")
    make(UMT5EncoderModel, TEXT).save_pretrained(first / "text_encoder")
    edit(first / "text_encoder/config.json", torch_dtype="bfloat16")
    make(CLIPVisionModelWithProjection, CLIP).save_pretrained(first / "image_encoder")
    old = {  # as the version of transformers wrote it that made the files on the Hub
        f"vision_model.{key.removeprefix('vision_model.')}" if "visual" not in key else key: tensor
        for key, tensor in load_file(first / "image_encoder/model.safetensors").items()
    }
    old["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(old, first / "image_encoder/model.safetensors", {"format": "pt"})
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8).save_pretrained(
        first / "image_processor"
    )
    stage1().save_pretrained(first / "transformer", max_shard_size="400KB")
    assert len(list((first / "transformer").glob("*-of-*.safetensors"))) > 2
    make(diffusers.AutoencoderKLWan, **WAN21_VAE).save_pretrained(first / "vae")
    stage2_base().save_pretrained(second / "transformer")
    make(diffusers.AutoencoderKLWan, **WAN22_VAE).save_pretrained(second / "vae")
    edit(second / "vae/config.json", clip_output=False)  # a key this version does not know
    for folder in (first, second):
        (folder / "model_index.json").write_text('{"_class_name": "WanImageToVideoPipeline"}')
    return root


def preset(hub: Path) -> dict[str, Any]:
    first = ("text_encoder", "tokenizer", "image_encoder", "image_processor")
    components: dict[str, Any] = {
        name: {"source": "Wan2.1-I2V", "subfolder": name} for name in first
    }
    for stage, source in (("stage1", "Wan2.1-I2V"), ("stage2", "Wan2.2-TI2V")):
        for part in ("transformer", "vae"):
            components[f"{stage}_{part}"] = {"source": source, "subfolder": part}
    return {"components": components, "max_text_length": 24, "settings": SETTINGS}


def write_preset(hub: Path, tmp_path: Path, **changes: Any) -> Path:
    """A preset beside the Hub folders; ``changes`` go into its components."""
    values = preset(hub)
    for role, change in changes.items():
        if change is None:
            del values["components"][role]
        else:
            values["components"].setdefault(role, {})
            values["components"][role] |= change
    path = hub / f"{tmp_path.name}.yaml"  # relative paths start from the preset
    path.write_text(yaml.safe_dump(values))
    return path


def load(name: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return load_components(name, dtype, CPU, **options)[0]


def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(state: State, path: Path, wrapper: str | None = None) -> Path:
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    else:
        torch.save({wrapper: state} if wrapper else state, path)
    return path


def widened_file(path: Path) -> State:
    """Trained Stage II weights."""
    torch.manual_seed(9)
    trained = wan_files.randomized(SegmentTransformer3DModel.from_base(stage2_base(3)))
    save_file(state_of(trained), path)
    return state_of(trained)
