"""Models known without their weights: sizes of the public ones, and those of what is loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from swifti2v.errors import LoadingError
from swifti2v.models.loading import architectures
from swifti2v.models.loading.architectures import KINDS, find_architecture, find_scale
from swifti2v.models.loading.components import load_model
from swifti2v.models.loading.sources import ComponentSource, find_model
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.training.engine.memory import count_parameters
from tests.helpers.hub import make_hub, stage2_base, write_preset
from tests.helpers.tiny import TRANSFORMER


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hub(tmp_path_factory.mktemp("hub"))


def test_the_public_models_have_their_published_sizes() -> None:
    """Parameters in billions, as counted from their files on the Hub."""
    index, root = find_model("paper")
    wanted = {
        "stage1_transformer": 16.395,
        "stage2_transformer": 5.000,  # and a reference half of 0.6 million
        "stage1_vae": 0.127,
        "stage2_vae": 0.705,
        "text_encoder": 5.681,
        "image_encoder": 0.631,
    }
    for role, billions in wanted.items():
        model = find_architecture(role, index.components[role], root).make_empty(role)
        assert count_parameters(model).total / 1e9 == pytest.approx(billions, abs=6e-4), role
        assert {value.device.type for value in model.parameters()} == {"meta"}
        assert not model.training
        assert count_parameters(model).trainable == 0


def test_wans_own_repositories_are_known_by_what_their_folder_holds() -> None:
    nowhere = Path("nowhere")
    for name, kinds in (
        ("Wan-AI/Wan2.1-I2V-14B-480P", ("transformer", "vae", "text_encoder", "image_encoder")),
        ("Wan-AI/Wan2.2-TI2V-5B", ("transformer", "vae", "text_encoder")),
    ):
        for kind in kinds:
            role = kind if "encoder" in kind else f"stage1_{kind}"
            own = find_architecture(role, ComponentSource(source=name), nowhere)
            other = ComponentSource(source=f"{name}-Diffusers", subfolder=kind)
            assert own == find_architecture(role, other, nowhere)


def shapes(model: Any) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def values(model: Any) -> dict[str, Any]:
    """Configuration without the keys of its storage."""
    config = model.config if isinstance(model.config, dict) else model.config.to_dict()
    stored = ("_name_or_path", "_diffusers_version", "dtype", "torch_dtype")
    return {key: value for key, value in config.items() if key not in stored}


@pytest.mark.parametrize("role", [role for role in KINDS if role != "vae"])
def test_an_empty_model_is_the_one_that_is_loaded(role: str, hub: Path, tmp_path: Path) -> None:
    index, root = find_model(write_preset(hub, tmp_path))
    source = index.components[role]
    model = find_architecture(role, source, root).make_empty(role)
    loaded = load_model(role, root / source.source / source.subfolder, torch.float32)
    assert type(model) is type(loaded)
    assert shapes(model) == shapes(loaded)
    assert values(model) == values(loaded)


def test_an_original_file_and_a_widened_directory_are_known_too(tmp_path: Path) -> None:
    base = stage2_base()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    SegmentTransformer3DModel(in_channels=8, out_channels=4, **TRANSFORMER).save_pretrained(
        tmp_path / "wide"
    )
    for name, in_channels in (("base.safetensors", 2 * base.config["in_channels"]), ("wide", 8)):
        source = ComponentSource(source=name)
        model = find_architecture("stage2_transformer", source, tmp_path).make_empty(name)
        assert isinstance(model, SegmentTransformer3DModel)
        assert model.config["in_channels"] == in_channels


def test_only_the_configuration_of_a_remote_model_is_fetched(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo_id: str, pattern: str | None) -> Path:
        asked.append((repo_id, pattern))
        return hub / "Wan2.2-TI2V"

    monkeypatch.setattr(architectures, "download", download)
    source = ComponentSource(source="somebody/model", subfolder="transformer")
    model = find_architecture("stage2_transformer", source, Path("nowhere")).make_empty("x")
    assert asked == [("somebody/model", "transformer/config.json")]
    assert model.config["in_channels"] == 2 * stage2_base().config["in_channels"]


@pytest.mark.parametrize("source", ["./no", "/no/such", "no", "org/repo/file.safetensors"])
def test_missing_and_remote_files_are_refused(source: str) -> None:
    with pytest.raises(LoadingError, match="so the sizes of stage1_vae are not known"):
        find_architecture("stage1_vae", ComponentSource(source=source), Path("nowhere"))


def test_a_configuration_of_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"_class_name": "WanTransformer3DModel", "num_layers": "many"}'
    )
    found = find_architecture("stage1_transformer", ComponentSource(source="."), tmp_path)
    with pytest.raises(LoadingError, match="the configuration of here describes no model"):
        found.make_empty("here")


@pytest.mark.parametrize(
    ("name", "stage1", "stage2"),
    [
        ("paper", (4, 8, 2), (4, 16, 2)),
        ("vibe", (4, 8, 2), (4, 16, 2)),
        ("public", (4, 8, 2), (4, 16, 2)),
        ("small", (4, 16, 2), (4, 16, 2)),
        ("nano", (4, 4, 2), (4, 8, 2)),
    ],
)
def test_scales_are_known_without_weights(
    name: str, stage1: tuple[int, ...], stage2: tuple[int, ...]
) -> None:
    index, root = find_model(name)
    assert find_scale("stage1", index, root) == stage1
    assert find_scale("stage2", index, root) == stage2


def test_the_scale_of_an_original_file_is_that_of_wan(tmp_path: Path) -> None:
    (tmp_path / "wan.safetensors").write_bytes(b"not read")
    index, root = find_model("paper")
    source = ComponentSource(source=str(tmp_path / "wan.safetensors"))
    components = {**index.components, "stage1_transformer": source}
    assert find_scale("stage1", replace(index, components=components), root) == (4, 8, 2)
