"""Models that cannot be loaded are refused with one clear error."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import (
    ByT5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from swifti2v import errors
from tests.helpers.hub import (
    TEXT,
    State,
    load,
    make,
    make_hub,
    preset,
    save,
    stage1,
    state_of,
    widened_file,
    write_preset,
)
from tests.unit.models.weights import test_names as wan_files


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hub(tmp_path_factory.mktemp("hub"))


def test_a_name_that_is_not_a_model_is_refused(hub, tmp_path):
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
            r"components\.stage1_vae\.subfolders: there is no such setting",
        ),
        ({"stage1_vae": {"weights": "x.pth"}}, "stage1_vae has weights or loras"),
        ({"stage1_transformer": {"loras": [{"file": "x"}]}}, r"loras\.0\.path: it is missing"),
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
    [("truncate", "damaged or cut short"), ("delete", "lists missing shards")],
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
