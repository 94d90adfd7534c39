"""Clips from the files that people have: the same frames as from whole weights of the same values."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import UMT5EncoderModel

from swifti2v.errors import ConfigError, LoadingError
from swifti2v.models.loading.sources import LoraSource
from swifti2v.models.runtime.placement import is_streamed
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.weights.names import umt5_state_dict
from swifti2v.models.weights.packed import is_packed
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.training.stages.loading import load_for_training
from tests.helpers import hub
from tests.helpers import packed_files as layouts
from tests.helpers.command_line import error_line, swifti2v
from tests.helpers.packed_files import SAFETENSORS, State
from tests.unit.models.weights import test_names as wan_files

TRANSFORMERS = ("stage1_transformer", "stage2_transformer")
GGUF = ("Q8_0", "Q4_0", "Q5_0", "Q5_1", "BF16")


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.make_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    """Weights under the names of Wan's own files; the encoder's under those of transformers."""
    encoder = hub.state_of(hub.make(UMT5EncoderModel, hub.TEXT))
    torch.manual_seed(9)
    widened = SegmentTransformer3DModel.from_base(hub.stage2_base())
    trained = hub.state_of(wan_files.randomized(widened))  # follows Stage I
    return {
        "stage1_transformer": wan_files.original_transformer(hub.state_of(hub.stage1())),
        "stage2_transformer": wan_files.original_transformer(trained),
        "text_encoder": {k: t for k, t in encoder.items() if k != "encoder.embed_tokens.weight"},
    }


def preset(public: Path, folder: Path, files: dict[str, Path]) -> Path:
    changes = {role: {"source": str(file), "subfolder": ""} for role, file in files.items()}
    return hub.write_preset(public, folder, **changes)


def frames(name: Path, **options: Any) -> np.ndarray:
    pipe = SwiftI2VPipeline.from_pretrained(
        name, torch_dtype=torch.float32, device="cpu", **options
    )
    if not options.get("staged"):  # else nothing is loaded yet
        assert all(is_streamed(getattr(pipe.components, role)) for role in TRANSFORMERS) == (
            options.get("placement") == "streamed"
        )
    return np.asarray(pipe(hub.photo(), "a cat", generator=3, num_frames=5).frames)


def write_whole(meanings: dict[str, State], folder: Path) -> dict[str, Path]:
    """Files of the same values in float32."""
    folder.mkdir()
    for role, meaning in meanings.items():
        ready = {key: tensor.float().contiguous().clone() for key, tensor in meaning.items()}
        save_file(ready, folder / f"{role}.safetensors")
    return {role: folder / f"{role}.safetensors" for role in meanings}


def write_layout(name: str, states: dict[str, State], folder: Path) -> tuple[Any, Any]:
    """Files of all three models in a layout, and the weights that they mean."""
    files, meanings = {}, {}
    for role, state in states.items():
        files[role] = folder / f"{role}.safetensors"
        meanings[role] = layouts.write(SAFETENSORS[name](state), files[role]).meaning
    return files, meanings


def write_gguf(kind: str, states: dict[str, State], folder: Path) -> tuple[Any, Any]:
    files, meanings = {}, {}
    for role, state in states.items():
        files[role] = folder / f"{role}.gguf"
        is_text = role == "text_encoder"
        native = layouts.gguf_umt5(state) if is_text else state
        architecture = "t5encoder" if is_text else "wan"
        meaning = layouts.write_gguf(native, files[role], kind, architecture)
        named = umt5_state_dict(meaning) if is_text else meaning
        meanings[role] = {k: t for k, t in named.items() if isinstance(t, torch.Tensor)}
    return files, meanings


WRITERS: dict[str, Callable[[dict[str, State], Path], tuple[Any, Any]]] = {
    **{name: partial(write_layout, name) for name in SAFETENSORS},
    **{f"GGUF {kind}": partial(write_gguf, kind) for kind in GGUF},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_clip_of_each_layout(
    name: str, public: Path, states: dict[str, State], tmp_path: Path
) -> None:
    files, meanings = WRITERS[name](states, tmp_path)
    found = frames(preset(public, tmp_path, files))
    whole = tmp_path / "whole"
    assert np.array_equal(found, frames(preset(public, whole, write_whole(meanings, whole))))
    assert found.std() > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ComfyUI old", "GGUF Q8_0"])
def test_placement_and_loras_change_nothing_in_packed_models(
    name: str, public: Path, states: dict[str, State], tmp_path: Path
) -> None:
    files, _ = WRITERS[name](states, tmp_path)
    pair = {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.ones(1, 128),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.ones(128, 1),
    }
    save_file(pair, tmp_path / "lora.safetensors")
    loras = [LoraSource(path=str(tmp_path / "lora.safetensors"))]
    path = preset(public, tmp_path, files)
    resident = frames(path, loras=loras)
    assert np.array_equal(resident, frames(path, loras=loras, placement="streamed"))
    assert np.array_equal(resident, frames(path, loras=loras, staged=True))
    assert not np.array_equal(resident, frames(path))


def test_a_packed_model_is_not_saved_as_another(
    public: Path, states: dict[str, State], tmp_path: Path
) -> None:
    files, _ = WRITERS["BFL"](states, tmp_path)
    pipe = SwiftI2VPipeline.from_pretrained(preset(public, tmp_path, files), device="cpu")
    assert is_packed(pipe.components.text_encoder)
    with pytest.raises(ConfigError, match="text_encoder keeps the fp8 or GGUF weights"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_packed_model_is_not_trained(
    public: Path, states: dict[str, State], tmp_path: Path
) -> None:
    files, _ = WRITERS["BFL"](states, tmp_path)
    path = str(preset(public, tmp_path, files))
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"stage2_transformer.*cannot be trained"):
        load_for_training(path, {}, "stage2", ("stage2_transformer",), cpu)
    load_for_training(path, {}, "stage2", ("stage2_vae", "text_encoder"), cpu)  # for a cache


def test_a_folder_without_the_weights_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    photo = tmp_path / "photo.png"
    hub.photo().save(photo)
    words = ("generate", photo, "-p", "fog", "-o", tmp_path / "a.mp4", "--model", "paper:fp8")
    message = error_line(swifti2v(*words, "--models-dir", tmp_path))
    assert "hf download Kijai/WanVideo_comfy_fp8_scaled TI2V/" in message
    assert f"swifti2v models scan {tmp_path} shows" in message
    assert "SWIFTI2V_MODELS_DIR" not in os.environ
    message = error_line(swifti2v(*words, "--models-dir", tmp_path / "no"))
    assert "is not a folder" in message


def test_a_checkpoint_is_not_laid_over_a_packed_base(
    public: Path, states: dict[str, State], tmp_path: Path
) -> None:
    files, _ = WRITERS["BFL"](states, tmp_path)
    hub.widened_file(tmp_path / "trained.safetensors")
    changes = {
        "source": str(files["stage2_transformer"]),
        "subfolder": "",
        "weights": str(tmp_path / "trained.safetensors"),
    }
    path = hub.write_preset(public, tmp_path, stage2_transformer=changes)
    with pytest.raises(LoadingError, match=r"trained.safetensors cannot go into.*as the source"):
        hub.load(path)
