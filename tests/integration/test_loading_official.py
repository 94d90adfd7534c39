"""Wan's own repositories load as folders and from the Hub, each component with its files alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from swifti2v import errors
from swifti2v.models.loading.architectures import find_architecture
from swifti2v.models.loading.components import load_component, load_model
from swifti2v.models.loading.official import locate
from swifti2v.models.loading.sources import ComponentSource, LoraSource, find_model, resolve
from swifti2v.models.transformer import SegmentTransformer3DModel
from tests.helpers.hub import CPU, SETTINGS, assert_equal, edit, load, state_of
from tests.helpers.official import (
    FIRST,
    NUM_SHARDS,
    SECOND,
    SIZES,
    FakeHub,
    config_of,
    image_encoder,
    make_official,
    save_shards,
    serve,
    text_encoder,
    transformer,
    vae,
)
from tests.unit.models.lora.test_merge import RANK, delta, make_pairs, pair_file
from tests.unit.models.weights import test_names as wan_files

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = [
    f"diffusion_pytorch_model-{number:05d}-of-{NUM_SHARDS:05d}.safetensors"
    for number in range(1, NUM_SHARDS + 1)
]


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_official(tmp_path_factory.mktemp("official"))


@pytest.fixture
def hub(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return serve(official, tmp_path / "cache", monkeypatch)


def preset(path: Path, prefix: str) -> Path:
    first = ("text_encoder", "tokenizer", "image_encoder", "stage1_vae", "stage1_transformer")
    sources = dict.fromkeys(first, FIRST) | dict.fromkeys(
        ("stage2_vae", "stage2_transformer"), SECOND
    )
    components: dict[str, Any] = {role: {"source": prefix + name} for role, name in sources.items()}
    values = {
        "components": components,
        "max_text_length": 24,
        "settings": SETTINGS,
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_a_preset_of_official_folders_loads_what_they_hold(official: Path, tmp_path: Path) -> None:
    check_components(load(preset(tmp_path / "p.yaml", f"{official}/")))


def test_a_preset_of_official_hub_ids_loads_what_they_hold(hub: FakeHub, tmp_path: Path) -> None:
    check_components(load(preset(tmp_path / "p.yaml", "")))
    second = {file.removeprefix(f"{SECOND}/") for file in hub.fetched if SECOND in file}
    assert second == {"config.json", INDEX, *SHARDS, "Wan2.2_VAE.pth"}


def check_components(parts: Any) -> None:
    assert_equal(parts.stage1_transformer, state_of(transformer(FIRST)))
    for key, value in SIZES[FIRST].items():
        assert parts.stage1_transformer.config[key] == value, key
    widened = SegmentTransformer3DModel.from_base(transformer(SECOND))
    assert_equal(parts.stage2_transformer, state_of(widened))
    assert_equal(parts.stage1_vae, state_of(vae(FIRST)))
    assert_equal(parts.stage2_vae, state_of(vae(SECOND)))
    assert_equal(parts.text_encoder, state_of(text_encoder()))
    assert parts.image_encoder.config.hidden_size == image_encoder().config.hidden_size
    assert parts.image_processor is not None  # Wan's own code has it
    assert parts.tokenizer("abc").input_ids[-1] == parts.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("role", "files"),
    [
        ("stage1_vae", ["Wan2.1_VAE.pth"]),
        ("text_encoder", ["models_t5_umt5-xxl-enc-bf16.pth"]),
        ("image_encoder", ["models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"]),
        ("tokenizer", ["google/umt5-xxl/tokenizer.json", "google/umt5-xxl/tokenizer_config.json"]),
        ("stage1_transformer", [*SHARDS, INDEX]),
    ],
)
def test_a_component_fetches_its_own_files_alone(hub: FakeHub, role: str, files: list[str]) -> None:
    place = locate(role, ComponentSource(source=FIRST), Path("nowhere"))
    assert set(hub.fetched) == {f"{FIRST}/{file}" for file in ("config.json", *files)}
    assert place.exists()


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_an_index_named_by_itself_brings_its_shards(
    official: Path, hub: FakeHub, where: str
) -> None:
    prefix = f"{official}/" if where == "folder" else ""
    source = ComponentSource(source=f"{prefix}{SECOND}/{INDEX}")
    found = load_component("stage2_transformer", source, Path("nowhere"), torch.float32, CPU)
    assert_equal(found, state_of(SegmentTransformer3DModel.from_base(transformer(SECOND))))
    names = {file.removeprefix(f"{SECOND}/") for file in hub.fetched}
    assert names == (set() if where == "folder" else {INDEX, *SHARDS})


def test_a_folder_of_the_hub_comes_whole(hub: FakeHub) -> None:
    place = resolve(f"{FIRST}/google/umt5-xxl", "", Path("nowhere"))
    assert {file.name for file in place.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_the_config_of_peft_comes_with_a_lora_of_the_hub(
    hub: FakeHub, official: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "repos/somebody/loras/style"
    folder.mkdir(parents=True)
    name = "blocks.0.attn1.to_q"
    pair = make_pairs(transformer(SECOND))[name]
    save_file(pair_file("peft", {name: pair}), folder / "a.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 2 * RANK}))
    hub.root = tmp_path / "repos"
    lora = LoraSource(path="somebody/loras/style/a.safetensors")
    source = ComponentSource(source=str(official / SECOND), loras=(lora,))
    found = load_component("stage2_transformer", source, Path("nowhere"), torch.float32, CPU)
    added = found.get_parameter(f"{name}.weight") - transformer(SECOND).get_parameter(
        f"{name}.weight"
    )
    torch.testing.assert_close(added, 2 * delta(*pair), atol=1e-4, rtol=1e-4)
    assert len(hub.fetched) == 2


def test_an_image_to_video_model_of_wan22_attends_to_no_image_encoder(tmp_path: Path) -> None:
    """Its ``config.json`` does not tell it from that of Wan2.1; the names of its weights do."""
    sizes = {k: v for k, v in SIZES[FIRST].items() if k not in ("image_dim", "added_kv_proj_dim")}
    model = wan_files.randomized(type(transformer(FIRST))(**sizes))
    folder = tmp_path / "high_noise_model"
    save_shards(wan_files.original_transformer(state_of(model)), folder)
    (folder / "config.json").write_text(json.dumps(config_of(FIRST)))
    found = load_model("stage1_transformer", folder, torch.float32)
    assert found.config["image_dim"] is None
    assert_equal(found, state_of(model))


def test_sizes_are_known_from_config_and_index_alone(hub: FakeHub, tmp_path: Path) -> None:
    shutil.copytree(hub.root / FIRST, tmp_path / "repos/somebody/finetuned")
    hub.root = tmp_path / "repos"
    source = ComponentSource(source="somebody/finetuned")
    model = find_architecture("stage1_transformer", source, Path("nowhere")).make_empty("x")
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in transformer(FIRST).state_dict().items()
    }
    assert hub.fetched == [f"somebody/finetuned/{file}" for file in ("config.json", INDEX)]
    with pytest.raises(errors.LoadingError, match="so the sizes of stage1_vae are not known"):
        find_architecture("stage1_vae", source, Path("nowhere"))


@pytest.mark.parametrize(
    "role", ["stage1_transformer", "stage1_vae", "text_encoder", "image_encoder"]
)
def test_sizes_of_a_local_folder_are_those_of_what_is_loaded(official: Path, role: str) -> None:
    source = ComponentSource(source=FIRST)
    model = find_architecture(role, source, official).make_empty(role)
    loaded = load_component(role, source, official, torch.float32, CPU)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in loaded.state_dict().items()
    }


def copied(official: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(official / FIRST, folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vace"}, "a Wan model of type 'vace'; those of type t2v, i2v"),
        ({"num_heads": 3}, "width 128 with 3 heads"),
        ({"dim": "wide"}, "describes no model"),
        ({"window_size": [4, 4]}, r"windows of \[4, 4\]"),
        ({"num_layers": 3}, r"missing: blocks\.2.*config belong together"),
        ({"ffn_dim": 48}, r"ffn\.net.*config belong together"),
    ],
)
def test_a_configuration_of_other_weights_is_refused(
    official: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = copied(official, tmp_path)
    edit(folder / "config.json", **change)
    with pytest.raises(errors.LoadingError, match=message):
        load_model("stage1_transformer", folder, torch.float32)


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_shard_that_the_index_names_and_is_not_there_is_named(
    official: Path, hub: FakeHub, tmp_path: Path, where: str
) -> None:
    folder = copied(official, tmp_path / "repos/somebody")
    (folder / SHARDS[1]).unlink()
    hub.root = tmp_path / "repos"
    source = "somebody/copy" if where == "hub" else str(folder)
    for name in (source, f"{source}/{INDEX}"):
        with pytest.raises(
            errors.LoadingError, match=rf"{INDEX} lists missing shards: {SHARDS[1]}"
        ):
            load_component(
                "stage1_transformer",
                ComponentSource(source=name),
                Path("nowhere"),
                torch.float32,
                CPU,
            )
    (folder / INDEX).unlink()
    with pytest.raises(errors.LoadingError, match="lacks shard 2 of 3"):
        load_model("stage1_transformer", folder, torch.float32)


def test_prompts_are_padded_to_what_the_transformer_was_trained_on(
    official: Path, tmp_path: Path
) -> None:
    name = preset(tmp_path / "p.yaml", f"{official}/")
    values = yaml.safe_load(name.read_text())
    name.write_text(yaml.safe_dump(values | {"max_text_length": 16}))
    with pytest.raises(errors.LoadingError, match=r"prompts of 24 tokens, .*is 16; write max_text"):
        load(name)


def test_a_component_that_an_official_folder_lacks_or_holds_twice_is_refused(
    official: Path, tmp_path: Path
) -> None:
    folder = copied(official, tmp_path)
    shutil.copy(folder / "Wan2.1_VAE.pth", folder / "Wan2.2_VAE.pth")
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    for role, message in (
        ("stage1_vae", r"Wan2\.1_VAE\.pth and Wan2\.2_VAE\.pth; name one of them"),
        (
            "text_encoder",
            r"copy is one of Wan's own folders and lacks models_t5_umt5-xxl-enc-\*\.pth",
        ),
    ):
        with pytest.raises(errors.LoadingError, match=message):
            load_component(role, ComponentSource(source="copy"), tmp_path, torch.float32, CPU)
    with pytest.raises(errors.ConfigError, match=r"holds one model.*name it as a source"):
        find_model(folder)
