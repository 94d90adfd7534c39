"""Models load from every kind of file that users have, at a tiny size."""

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.tiny import SIZE, tiny_pipeline
from tests.unit import test_conversion as wan_files
from tests.unit import test_lora as lora_files
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from swifti2v import errors
from swifti2v.models.loading import LOADERS, load_components
from swifti2v.models.sources import LoraSource, find_model
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.pipelines.two_stage import SwiftI2VPipeline

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


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wan2.1-I2V and Wan2.2-TI2V as they lie on the Hub."""
    root: Path = tmp_path_factory.mktemp("hub")
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


def widened_file(path: Path) -> State:
    """Trained Stage II weights."""
    torch.manual_seed(9)
    trained = wan_files.randomized(SegmentTransformer3DModel.from_base(stage2_base(3)))
    save_file(state_of(trained), path)
    return state_of(trained)


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
    pixels = torch.randn(1, 3, 8, 8)
    assert torch.equal(
        pipe.components.image_encoder(pixels).last_hidden_state, clip(pixels).last_hidden_state
    )
    frames = pipe(photo(), "pan left", generator=1).frames
    assert frames.shape == (17, SIZE, SIZE, 3)
    assert frames.std() > 1
    pipe.save_pretrained(tmp_path / "saved")
    saved = SwiftI2VPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert np.array_equal(saved(photo(), "pan left", generator=1).frames, frames)
    assert {file: file.read_bytes() for file in before} == before  # mapped files stay as they are


def test_loras_of_the_caller_come_on_top_of_the_models_own(hub, tmp_path, monkeypatch):
    own = peft_file(stage1(), tmp_path / "own.safetensors")
    more = lightx2v_file(stage1(), tmp_path / "more.safetensors")
    base = SegmentTransformer3DModel.from_base(stage2_base())
    second = peft_file(base, tmp_path / "second.safetensors")
    name = write_preset(
        hub, tmp_path, stage1_transformer={"loras": [{"path": str(tmp_path / "own.safetensors")}]}
    )
    monkeypatch.chdir(tmp_path)  # the caller's paths start here, not beside the preset
    loras = {
        "stage1": [LoraSource(path="more.safetensors", strength=2.0)],
        "stage2": [LoraSource(path="second.safetensors")],
    }
    pipe = SwiftI2VPipeline.from_pretrained(name, device="cpu", loras=loras)
    found = state_of(pipe.components.stage1_transformer)
    for key, tensor in state_of(stage1()).items():
        expected = tensor + own.get(key, 0) + 2 * more.get(key, torch.zeros(()))
        torch.testing.assert_close(found[key], expected, atol=1e-4, rtol=1e-5)
    found = state_of(pipe.components.stage2_transformer)
    for key, tensor in state_of(base).items():
        torch.testing.assert_close(found[key], tensor + second.get(key, 0), atol=1e-5, rtol=1e-5)
    with pytest.raises(errors.ConfigError, match="stage3; they go to stage1 or stage2"):
        load(name, loras={"stage3": []})
    missing = {"stage2": [LoraSource(path="none.safetensors")]}
    with pytest.raises(errors.LoadingError, match=r"none\.safetensors does not exist"):
        load(name, loras=missing)


def save(state: State, path: Path, wrapper: str | None = None) -> Path:
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    else:
        torch.save({wrapper: state} if wrapper else state, path)
    return path


@pytest.mark.parametrize(
    ("file", "prefix", "wrapper"),
    [
        ("diffusion_pytorch_model.safetensors", "", None),  # Wan's own repository
        ("wan.pth", "", None),
        ("wan.pth", "", "state_dict"),
        ("comfyui.safetensors", "model.diffusion_model.", None),
        ("diffsynth.safetensors", "pipe.dit.", None),
        ("diffsynth.ckpt", "", "module"),
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
    assert [r.name for r in warnings] == ["swifti2v.models.loading"]
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
    assert index.components.keys() == LOADERS.keys()
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


def test_what_is_no_model_is_refused(hub, tmp_path):
    with pytest.raises(
        errors.ConfigError, match=r"unknown model 'nono': .*paper.*model_index\.json"
    ):
        load("nono")
    with pytest.raises(errors.ConfigError, match=r"unknown model '.*config\.py'"):
        load("config.py")
    with pytest.raises(errors.ConfigError, match=r"WanImageToVideoPipeline.*YAML preset"):
        load(hub / "Wan2.1-I2V")
    for content in ("", "[]", "{"):
        (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(errors.ConfigError, match=r"model_index\.json cannot be read"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage2_vae": None}, "components stage2_vae are missing"),
        ({"stage3_vae": {"source": "x"}}, "components stage3_vae are unknown; known are text_enc"),
        (
            {"stage1_vae": {"subfolders": "vae"}},
            r"components\.stage1_vae\.subfolders: Unexpected keyword",
        ),
        ({"stage1_vae": {"weights": "x.pth"}}, "stage1_vae has weights or loras"),
        ({"stage1_transformer": {"loras": [{"file": "x"}]}}, r"loras\.0\.path: Field required"),
    ],
)
def test_a_preset_with_unknown_or_missing_keys_is_refused(hub, tmp_path, changes, message):
    name = write_preset(hub, tmp_path, **changes)
    with pytest.raises(errors.ConfigError, match=rf"{name.name}.*{message}"):
        load(name)


def test_settings_are_checked_before_anything_is_loaded(hub, tmp_path):
    values = preset(hub) | {"settings": {"stage2": {"segments": 3}}}
    for source in values["components"].values():
        source["source"] = "./nowhere"
    path = tmp_path / "preset.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(errors.ConfigError, match=r"preset\.yaml.*stage2\.segments"):
        load(path)


@pytest.mark.parametrize(
    ("role", "change", "message"),
    [
        ("text_encoder", {"subfolder": "none"}, r"Wan2\.1-I2V/none does not exist"),
        ("text_encoder", {"subfolder": "tokenizer"}, r"tokenizer/config\.json cannot be read"),
        ("text_encoder", {"subfolder": "image_encoder"}, "holds a clip_vision_model model, not a umt5"),
        ("tokenizer", {"subfolder": "vae"}, r"vae holds no tokenizer"),
        ("image_processor", {"subfolder": "vae"}, r"no preprocessor_config\.json"),
        ("stage1_vae", {"subfolder": "transformer"}, "WanTransformer3DModel, not a AutoencoderKLWan or"),
        ("stage1_transformer", {"subfolder": "vae"}, "AutoencoderKLWan, not a WanTransformer3DModel"),
        ("stage2_transformer", {"source": "Wan2.1-I2V"}, "takes 36 channels and gives 16.*TI2V-5B"),
        ("stage2_vae", {"source": "Wan2.1-I2V"}, "stage2_transformer in_channels is 96, .* need 32"),
        ("stage1_transformer", {"source": "Wan2.2-TI2V"}, "stage1_transformer in_channels is 48.*36"),
        ("image_encoder", None, "image_encoder and image_processor only work together"),
    ],
)  # fmt: skip
def test_components_that_are_missing_or_do_not_belong_are_refused(
    hub, tmp_path, role, change, message
):
    with pytest.raises(errors.LoadingError, match=message):
        load(write_preset(hub, tmp_path, **{role: change}))


def test_another_text_encoder_and_another_image_encoder_are_refused(hub, tmp_path):
    wide = UMT5Config(**TEXT.to_dict() | {"d_model": 24})
    make(UMT5EncoderModel, wide).save_pretrained(tmp_path / "text")
    change = {"source": str(tmp_path), "subfolder": "text"}
    with pytest.raises(
        errors.LoadingError, match="text_dim is 16, but the other components need 24"
    ):
        load(write_preset(hub, tmp_path, text_encoder=change))
    with pytest.raises(errors.LoadingError, match=r"image_dim .* is 80, .* need None"):
        load(write_preset(hub, tmp_path, image_encoder=None, image_processor=None))


def test_a_hub_id_that_cannot_be_reached_says_so(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    change = {"source": "Wan-AI/Wan9.9", "subfolder": "vae"}
    with pytest.raises(errors.LoadingError, match=r"cannot get 'Wan-AI/Wan9\.9' from the Hub"):
        load(write_preset(hub, tmp_path, stage2_vae=change))
    with pytest.raises(errors.LoadingError, match=r"cannot get 'Wan-AI/Wan9\.9' from the Hub"):
        load("Wan-AI/Wan9.9")


class Payload:
    """Unpickling it would run code."""

    def __reduce__(self) -> Any:
        return print, ("ran",)


def damage(kind: str, state: State, folder: Path) -> Path:
    folder.mkdir()
    if kind == "pickle":
        torch.save({"a": Payload()}, folder / "w.pth")
        return folder / "w.pth"
    if kind == "shape":
        state["proj_out.weight"] = torch.zeros(3, 3)
    elif kind == "missing":
        del state["proj_out.weight"]
    elif kind == "plain base":
        state["patch_embedding.weight"] = state["patch_embedding.weight"][:, :48].contiguous()
    save_file(state, folder / "w.safetensors")
    if kind == "truncated":
        content = (folder / "w.safetensors").read_bytes()
        (folder / "w.safetensors").write_bytes(content[: len(content) // 2])
    return folder / "w.safetensors"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", r"w\.safetensors is damaged or cut short"),
        ("shape", r"w\.safetensors does not fit .*proj_out\.weight \(checkpoint \(3, 3\).* model \(192, 128\)"),
        ("missing", r"1 missing: proj_out\.weight \(192, 128\)"),
        ("plain base", r"patch_embedding\.weight \(checkpoint \(128, 48, .* model \(128, 96,"),
        ("pickle", "asks for Python code, which is not run"),
    ],
)  # fmt: skip
def test_damaged_weights_are_refused(hub, tmp_path, capfd, kind, message):
    state = widened_file(tmp_path / "good.safetensors")
    file = damage(kind, state, tmp_path / "bad")
    with pytest.raises(errors.LoadingError, match=message):
        load(write_preset(hub, tmp_path, stage2_transformer={"weights": str(file)}))
    assert "ran" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("damaged", "message"),
    [("truncate", "damaged or cut short"), ("delete", "shards that are not there")],
)
def test_a_shard_that_is_cut_or_missing_is_refused(hub, tmp_path, damaged, message):
    folder = tmp_path / "transformer"
    stage1().save_pretrained(folder, max_shard_size="400KB")
    shard = sorted(folder.glob("*-of-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    if damaged == "truncate":
        shard.write_bytes(content[:-1000])
    change = {"source": str(tmp_path)}
    with pytest.raises(errors.LoadingError, match=message):
        load(write_preset(hub, tmp_path, stage1_transformer=change))


def test_an_original_file_of_another_model_is_refused(hub, tmp_path):
    text = save(
        wan_files.original_umt5(state_of(make(UMT5EncoderModel, TEXT))), tmp_path / "t5.pth"
    )
    clip = save({"visual.pos_embedding": torch.zeros(1, 5, 80)}, tmp_path / "clip.pth")
    part = save({"shared.weight": torch.zeros(3, 4)}, tmp_path / "part.pth")
    byt5 = tmp_path / "byt5"
    ByT5Tokenizer(extra_ids=0).save_pretrained(byt5)
    for role, file, message in (
        ("stage1_transformer", text, "not a Wan transformer checkpoint"),
        ("stage1_vae", text, "not a Wan VAE checkpoint"),
        ("image_encoder", text, "no image encoder"),
        ("image_encoder", clip, "lacks embeddings.patch_embedding.weight"),
        ("text_encoder", part, "lacks encoder.block.0.*part of one"),
        ("tokenizer", byt5 / "tokenizer_config.json", "holds no tokenizer"),
    ):
        with pytest.raises(errors.LoadingError, match=message):
            load(write_preset(hub, tmp_path, **{role: {"source": str(file), "subfolder": ""}}))
