"""Models load from every kind of file that users have, at a tiny size."""

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    UMT5EncoderModel,
)

from swifti2v import errors
from swifti2v.models.loading.components import LOADERS
from swifti2v.models.loading.sources import LoraSource, find_model
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.pipelines.conditions import ConditionEncoder
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from tests.helpers.hub import (
    CLIP,
    STAGE1,
    TEXT,
    WAN21_VAE,
    WAN22_VAE,
    State,
    assert_equal,
    load,
    make,
    make_hub,
    photo,
    save,
    stage1,
    stage2_base,
    state_of,
    widened_file,
    write_preset,
)
from tests.helpers.tiny import SIZE, tiny_pipeline
from tests.unit.models.lora import test_merge as lora_files
from tests.unit.models.test_image_encoder import official_pixels
from tests.unit.models.weights import test_names as wan_files


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hub(tmp_path_factory.mktemp("hub"))


def lightx2v_file(model: Any, path: Path) -> State:
    """A few-step LoRA with pairs, norms, biases and modulations; returns what it adds."""
    pairs = lora_files.make_pairs(model)
    tensors = {
        f"diffusion_model.{lora_files.original(name)}.lora_{side}.weight": tensor
        for name, pair in pairs.items()
        for side, tensor in zip(("up", "down"), pair, strict=True)
    }
    added = {f"{name}.weight": lora_files.delta(*pair) for name, pair in pairs.items()}
    for name, parameter in model.named_parameters():
        if name not in added:
            module, _, leaf = name.rpartition(".")
            kind = {"weight": "diff", "bias": "diff_b", "scale_shift_table": "diff_m"}[leaf]
            place = lora_files.original(name if kind == "diff_m" else module)
            added[name] = torch.randn_like(parameter)
            tensors[f"diffusion_model.{place.removesuffix('.modulation')}.{kind}"] = added[name]
    save_file(tensors, path)
    return added


def peft_file(model: Any, path: Path) -> State:
    pairs = {k: v for k, v in lora_files.make_pairs(model, seed=5).items() if ".attn" in k}
    save_file(lora_files.pair_file("peft", pairs), path)
    return {f"{name}.weight": lora_files.delta(*pair) for name, pair in pairs.items()}


def test_a_saved_directory_loads_bit_equal(tmp_path):
    first = tiny_pipeline()
    first.save_pretrained(tmp_path)
    second = SwiftI2VPipeline.from_pretrained(str(tmp_path), device="cpu")
    assert second.config == first.config
    assert second.components.max_text_length == first.components.max_text_length
    for role in LOADERS:
        one, two = getattr(first.components, role), getattr(second.components, role)
        assert type(one) is type(two)
        if isinstance(one, torch.nn.Module):
            assert_equal(two, state_of(one))
            assert not two.training
            assert not any(parameter.requires_grad for parameter in two.parameters())
    again = tmp_path / "again"
    second.save_pretrained(again)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert json.loads((again / "model_index.json").read_text()) == index


@pytest.mark.slow
def test_a_preset_of_hub_folders_loras_and_weights_loads_and_generates(hub, tmp_path, capfd):
    few_step = lightx2v_file(stage1(), tmp_path / "few_step.safetensors")
    low_res = peft_file(stage1(), tmp_path / "low_res.safetensors")
    trained = widened_file(tmp_path / "stage2.safetensors")
    before = {file: file.read_bytes() for file in hub.rglob("*.safetensors")}
    name = write_preset(
        hub, tmp_path,
        stage1_transformer={"loras": [
            {"path": str(tmp_path / "few_step.safetensors")},
            {"path": str(tmp_path / "low_res.safetensors"), "strength": 0.5},
        ]},
        stage2_transformer={"weights": str(tmp_path / "stage2.safetensors")},
    )  # fmt: skip
    capfd.readouterr()
    pipe = SwiftI2VPipeline.from_pretrained(name, device="cpu", torch_dtype=torch.float32)
    assert capfd.readouterr() == ("", "")  # no chatter of diffusers or transformers
    expected = state_of(stage1())
    for key, delta in few_step.items():
        expected[key] += delta
    for key, delta in low_res.items():
        expected[key] += 0.5 * delta
    found = state_of(pipe.components.stage1_transformer)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-5)
    assert_equal(pipe.components.stage2_transformer, trained)
    assert_equal(pipe.components.text_encoder, state_of(make(UMT5EncoderModel, TEXT)))
    assert_equal(
        pipe.components.stage1_vae, state_of(make(diffusers.AutoencoderKLWan, **WAN21_VAE))
    )
    assert_equal(
        pipe.components.stage2_vae, state_of(make(diffusers.AutoencoderKLWan, **WAN22_VAE))
    )
    clip: Any = CLIPVisionModelWithProjection.from_pretrained(hub / "Wan2.1-I2V/image_encoder")
    own: Any = pipe.components.image_encoder
    pixels = torch.randn(1, 3, 8, 8)
    assert torch.equal(own(pixels).last_hidden_state, clip(pixels).last_hidden_state)
    frames = pipe(photo(), "pan left", generator=1).frames
    assert frames.shape == (17, SIZE, SIZE, 3)
    assert frames.std() > 1
    pipe.save_pretrained(tmp_path / "saved")
    saved = SwiftI2VPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert np.array_equal(saved(photo(), "pan left", generator=1).frames, frames)
    assert {file: file.read_bytes() for file in before} == before  # mapped files stay as they are


def test_clip_sees_the_whole_photo_whatever_the_repository_s_processor_says(hub, tmp_path):
    wide = photo().resize((200, 110))
    encoded = []
    for change in ({}, {"image_processor": None}):
        parts = load(write_preset(hub, tmp_path, **change))
        encoded.append(ConditionEncoder(parts)(wide, "a b").image_embeds)
    with torch.no_grad():
        states = parts.image_encoder(official_pixels(wide, 8).float(), output_hidden_states=True)
    for embeds in encoded:
        torch.testing.assert_close(embeds, states.hidden_states[-2], atol=1e-5, rtol=1e-5)


def test_loras_of_the_caller_come_on_top_of_the_models_own(hub, tmp_path, monkeypatch):
    own = peft_file(stage1(), tmp_path / "own.safetensors")
    more = lightx2v_file(stage1(), tmp_path / "more.safetensors")
    base = SegmentTransformer3DModel.from_base(stage2_base())
    second = peft_file(base, tmp_path / "second.safetensors")
    name = write_preset(
        hub, tmp_path, stage1_transformer={"loras": [{"path": str(tmp_path / "own.safetensors")}]}
    )
    monkeypatch.chdir(tmp_path)  # the caller's paths start here, not beside the preset
    loras = [
        LoraSource(path="more.safetensors", strength=2.0),
        LoraSource(path="second.safetensors", stage="stage2"),
    ]
    pipe = SwiftI2VPipeline.from_pretrained(name, device="cpu", loras=loras)
    found = state_of(pipe.components.stage1_transformer)
    for key, tensor in state_of(stage1()).items():
        expected = tensor + own.get(key, 0) + 2 * more.get(key, torch.zeros(()))
        torch.testing.assert_close(found[key], expected, atol=1e-4, rtol=1e-5)
    found = state_of(pipe.components.stage2_transformer)
    for key, tensor in state_of(base).items():
        torch.testing.assert_close(found[key], tensor + second.get(key, 0), atol=1e-5, rtol=1e-5)
    with pytest.raises(errors.ConfigError, match="stage3; they go to stage1 or stage2"):
        load(name, loras=[LoraSource(path="more.safetensors", stage="stage3")])  # type: ignore[arg-type]
    missing = [LoraSource(path="none.safetensors", stage="stage2")]
    with pytest.raises(errors.LoadingError, match=r"none\.safetensors does not exist"):
        load(name, loras=missing)


@pytest.mark.parametrize(
    ("file", "prefix", "wrapper"),
    [
        ("diffusion_pytorch_model.safetensors", "", None),  # Wan's own repository
        ("wan.pth", "", None),
        ("wan.pth", "", "state_dict"),
        ("comfyui.safetensors", "model.diffusion_model.", None),
        ("diffsynth.safetensors", "pipe.dit.", None),
        ("diffsynth.ckpt", "", "module"),
        ("self_forcing.pt", "model._fsdp_wrapped_module.", "generator_ema"),
        ("fastvideo.pt", "_orig_mod.", "generator"),
    ],
)
def test_original_transformer_files_load(hub, tmp_path, file, prefix, wrapper):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    paths = [
        save(
            {prefix + k: v for k, v in wan_files.original_transformer(state_of(model)).items()},
            tmp_path / folder / file,
            wrapper,
        )
        for folder, model in (("first", stage1()), ("second", stage2_base()))
    ]
    name = write_preset(
        hub, tmp_path,
        stage1_transformer={"source": str(paths[0]), "subfolder": ""},
        stage2_transformer={"source": str(paths[1]), "subfolder": ""},
    )  # fmt: skip
    parts = load(name)
    assert_equal(parts.stage1_transformer, state_of(stage1()))
    widened = SegmentTransformer3DModel.from_base(stage2_base())
    assert_equal(parts.stage2_transformer, state_of(widened))
    plain = diffusers.WanTransformer3DModel.load_config(hub / "Wan2.1-I2V/transformer")
    config = parts.stage1_transformer.config
    assert {k: config[k] for k in STAGE1} == {k: plain[k] for k in STAGE1}


def test_original_vae_and_encoder_files_load(hub, tmp_path):
    first, second = (make(diffusers.AutoencoderKLWan, **v) for v in (WAN21_VAE, WAN22_VAE))
    text, clip = make(UMT5EncoderModel, TEXT), make(CLIPVisionModel, CLIP)
    clip_state = state_of(clip)
    original_clip = wan_files.original_clip(clip_state)
    files = {
        "stage1_vae": ("Wan2.1_VAE.pth", wan_files.original_vae(state_of(first), False)),
        "stage2_vae": ("Wan2.2_VAE.pth", wan_files.original_vae(state_of(second), True)),
        "text_encoder": ("models_t5_umt5-xxl.pth", wan_files.original_umt5(state_of(text))),
        "image_encoder": ("models_clip.pth", original_clip),
    }
    changes = {
        role: {"source": str(save(state, tmp_path / file)), "subfolder": ""}
        for role, (file, state) in files.items()
    }
    parts = load(write_preset(hub, tmp_path, **changes))
    expected = {"stage1_vae": first, "stage2_vae": second, "text_encoder": text}
    for role, model in expected.items():
        assert_equal(getattr(parts, role), state_of(model))
    for role, model in (("stage1_vae", first), ("stage2_vae", second)):
        config = getattr(parts, role).config
        for key in ("base_dim", "decoder_base_dim", "z_dim", "is_residual", "patch_size",
                    "scale_factor_spatial", "in_channels", "dim_mult"):  # fmt: skip
            wanted = model.config[key]
            if key != "decoder_base_dim" or wanted is not None:
                assert config[key] == wanted
    assert len(set(parts.stage2_vae.config["latents_std"])) > 40  # Wan2.2's own
    ids = torch.tensor([[3, 4, 5, 1]])
    assert torch.equal(
        parts.text_encoder(input_ids=ids).last_hidden_state, text(input_ids=ids).last_hidden_state
    )
    states = {k: v for k, v in parts.image_encoder.state_dict().items() if "position_ids" not in k}
    assert states.keys() == clip_state.keys()
    assert all(torch.equal(states[key], clip_state[key]) for key in states)
    assert parts.image_encoder.config.num_attention_heads == 1


def test_a_plain_base_is_widened_and_a_warning_says_what_is_missing(hub, tmp_path, caplog):
    parts = load(write_preset(hub, tmp_path))
    assert_equal(
        parts.stage2_transformer, state_of(SegmentTransformer3DModel.from_base(stage2_base()))
    )
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert [r.name for r in warnings] == ["swifti2v.models.loading.components"]
    assert "reference half of Stage II is zero" in warnings[0].getMessage()


@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_trained_weights_are_taken_and_need_no_warning(hub, tmp_path, caplog, naming):
    trained = widened_file(tmp_path / "stage2.safetensors")
    if naming == "original":
        save(wan_files.original_transformer(trained), tmp_path / "stage2.safetensors")
    on_top = {"weights": str(tmp_path / "stage2.safetensors")}
    alone = {"source": str(tmp_path / "stage2.safetensors"), "subfolder": ""}
    for number, change in enumerate((on_top, alone)):
        folder = tmp_path / f"{tmp_path.name}{number}"
        parts = load(write_preset(hub, folder, stage2_transformer=change))
        assert type(parts.stage2_transformer) is SegmentTransformer3DModel
        assert_equal(parts.stage2_transformer, trained)
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_bfloat16_keeps_what_diffusers_and_transformers_keep(hub, tmp_path):
    parts = load(write_preset(hub, tmp_path), torch.bfloat16)
    wan: Any = diffusers.WanTransformer3DModel
    first = wan.from_pretrained(hub / "Wan2.1-I2V/transformer", torch_dtype=torch.bfloat16)
    text = UMT5EncoderModel.from_pretrained(hub / "Wan2.1-I2V/text_encoder", dtype=torch.bfloat16)
    for found, expected in ((parts.stage1_transformer, first), (parts.text_encoder, text)):
        wanted = {key: tensor.dtype for key, tensor in expected.state_dict().items()}
        assert {key: tensor.dtype for key, tensor in found.state_dict().items()} == wanted
        assert_equal(found, state_of(expected))
    second = parts.stage2_transformer.state_dict()
    kept = {key for key, tensor in second.items() if tensor.dtype == torch.float32}
    assert kept == {
        key for key in second
        if "scale_shift_table" in key or "time_embedder" in key or ".norm2." in key
    }  # fmt: skip
    assert parts.stage2_transformer.dtype == torch.bfloat16
    half = load(write_preset(hub, tmp_path), torch.float16).text_encoder.state_dict()
    assert {key.split(".")[-2] for key in half if half[key].dtype == torch.float32} == {"wo"}


def test_the_shipped_preset_names_known_components_only():
    index, _ = find_model("paper")
    assert index.components.keys() == LOADERS.keys() - {"image_processor"}
    assert index.settings["width"] == 2560
    assert [lora.path.count("/") > 2 for lora in index.components["stage1_transformer"].loras] == [
        True
    ]


def test_the_nano_model_ships_and_generates(capfd):
    pipe = SwiftI2VPipeline.from_pretrained("nano", device="cpu")
    assert capfd.readouterr() == ("", "")
    frames = pipe(photo(), "zoom in", num_frames=5, height=64, width=64, generator=1).frames
    assert frames.shape == (5, 64, 64, 3)
    assert frames.std() > 1
