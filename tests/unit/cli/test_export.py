import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner, Result

from swifti2v.cli.export import convert_lora, export, export_stage2
from swifti2v.models.loading.components import load_components, load_model
from swifti2v.models.loading.sources import INDEX_NAME, LoraSource
from swifti2v.models.lora.export import save_lora
from swifti2v.models.lora.merge import merge_lora
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.weights.files import read_tensors
from swifti2v.training.adapters import AdapterConfig, adapter_state_dict, add_adapter
from tests.helpers.command_line import error_line, succeed
from tests.helpers.hub import SIZES, make
from tests.helpers.tiny import tiny_components, tiny_pipeline

CPU = torch.device("cpu")
STAGES = ("stage1_transformer", "stage2_transformer")

app = typer.Typer()
for command in (export, export_stage2, convert_lora):
    app.command()(command)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA for each transformer of the tiny model."""
    folder = tmp_path_factory.mktemp("loras")
    parts = tiny_components()
    for role in STAGES:
        transformer = getattr(parts, role)
        add_adapter(transformer, AdapterConfig(rank=2))
        state = adapter_state_dict(transformer)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in state.values():
                tensor += torch.randn(tensor.shape, generator=generator)
        save_lora(state, folder / f"{role}.safetensors", "original", alpha=3)
    return {role: folder / f"{role}.safetensors" for role in STAGES}


def load(name: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return load_components(name, dtype, CPU, **options)[0]


def state_of(component: nn.Module) -> dict[str, torch.Tensor]:
    return dict(component.state_dict())


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    assert type(found) is type(expected)
    torch.testing.assert_close(state_of(found), state_of(expected), atol=0, rtol=0)


def test_the_exported_nano_model_is_the_one_that_ships(tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = succeed(run("export", "nano", "-o", output))
    assert result.stdout.strip() == str(output)
    (found, settings), (expected, defaults) = (
        load_components(name, torch.bfloat16, CPU) for name in (output, "nano")
    )
    assert settings == defaults
    assert found.max_text_length == expected.max_text_length
    for role in ("text_encoder", "stage1_vae", "stage2_vae", *STAGES):
        assert_same(getattr(found, role), getattr(expected, role))
    for role in ("stage1_vae", "stage2_vae", *STAGES):
        configs = [dict(getattr(parts, role).config) for parts in (found, expected)]
        plain, shipped = ({k: v for k, v in c.items() if k[0] != "_"} for c in configs)
        assert plain == shipped
    text = "zoom in, pan left"
    assert found.tokenizer(text).input_ids == expected.tokenizer(text).input_ids
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_loras_are_merged_into_the_stage_they_are_meant_for(
    model: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    first, second = (loras[role] for role in STAGES)
    output = tmp_path / "out"
    output.mkdir()  # an empty directory is filled
    more = ("--lora", f"{first}:0.5", "--lora", f"stage2={second}", "--dtype", "float32")
    succeed(run("export", model, "-o", output, *more))
    sources = [
        LoraSource(path=str(first), strength=0.5),
        LoraSource(path=str(second), stage="stage2"),
    ]
    found, expected, plain = load(output), load(model, loras=sources), load(model)
    for role in STAGES:
        assert_same(getattr(found, role), getattr(expected, role))
        key = "blocks.0.attn1.to_q.weight"
        assert not torch.equal(
            state_of(getattr(found, role))[key], state_of(getattr(plain, role))[key]
        )
    index = json.loads((output / INDEX_NAME).read_text())
    assert not any("loras" in source for source in index["components"].values())


def preset(model: Path, path: Path, **changes: Any) -> Path:
    values = json.loads((model / INDEX_NAME).read_text())
    for source in values["components"].values():
        source["source"] = str(model)
    values["components"]["stage2_transformer"] |= changes
    kept = ("components", "max_text_length", "settings")
    path.write_text(yaml.safe_dump({key: values[key] for key in kept}))
    return path


def test_a_stage2_file_read_on_top_of_a_base_gives_the_merged_model(
    model: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    trained = {
        key: tensor + 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
        for key, tensor in state_of(load(model).stage2_transformer).items()
    }
    save_file(trained, tmp_path / "trained.safetensors")
    lora: dict[str, Any] = {"path": str(loras["stage2_transformer"]), "strength": 0.5}
    whole = preset(model, tmp_path / "whole.yaml", weights="trained.safetensors", loras=[lora])
    output = tmp_path / "stage2.safetensors"
    more = ("--lora", f"{loras['stage2_transformer']}:0.25", "--dtype", "float32")
    result = succeed(run("export-stage2", whole, "-o", output, *more))
    assert result.stdout.strip() == str(output)
    again = preset(model, tmp_path / "again.yaml", weights="stage2.safetensors")
    added = [LoraSource(path=lora["path"], strength=0.25, stage="stage2")]
    assert_same(load(again).stage2_transformer, load(whole, loras=added).stage2_transformer)
    metadata = read_tensors(output)[1]
    assert metadata["swifti2v_model"] == str(whole)
    config = json.loads(metadata["config"])
    assert config["_class_name"] == "SegmentTransformer3DModel"
    kind: Any = SegmentTransformer3DModel
    rebuilt = kind.from_config(config)
    rebuilt.load_state_dict(load_file(output))


def test_a_stage2_file_with_wans_head_width_loads_without_a_base(
    model: Path, tmp_path: Path
) -> None:
    sizes = SIZES | {"in_channels": 96, "out_channels": 48}
    wide = make(SegmentTransformer3DModel, **sizes)
    wide.save_pretrained(tmp_path / "wide")
    source = {"source": str(tmp_path / "wide"), "subfolder": ""}
    name = preset(model, tmp_path / "wide.yaml", **source)
    output = tmp_path / "stage2.safetensors"
    succeed(run("export-stage2", name, "-o", output))  # the other parts are not even loaded
    found = load_model("stage2_transformer", output, torch.bfloat16)
    assert_same(found, load_model("stage2_transformer", tmp_path / "wide", torch.bfloat16))
    assert load_file(output)["proj_out.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("style", ["peft", "original", "diffsynth", "kohya"])
def test_a_converted_lora_has_the_same_effect(
    style: str, loras: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "lora.safetensors"
    result = succeed(
        run("convert-lora", loras["stage1_transformer"], "-o", output, "--style", style)
    )
    assert result.stdout.strip() == str(output)
    assert f"original to {style}: 10 layers, 0 full differences" in result.stderr
    one, other = tiny_components().stage1_transformer, tiny_components().stage1_transformer
    merge_lora(one, loras["stage1_transformer"])
    assert merge_lora(other, output).format == style
    torch.testing.assert_close(state_of(other), state_of(one), atol=2e-6, rtol=2e-6)


def refusals(model: Path, lora: Path, folder: Path) -> dict[str, tuple[tuple[object, ...], str]]:
    taken, full, new = folder / "taken.safetensors", folder / "full", folder / "new"
    file = folder / "new.safetensors"
    return {
        "directory is full": (("export", model, "-o", full), "full exists already"),
        "directory is a file": (("export", model, "-o", taken), "exists already"),
        "no folder": (
            ("export", model, "-o", folder / "no/new"),
            "does not exist or is not writable",
        ),
        "no model": (("export", "nono", "-o", new), "unknown model 'nono'"),
        "no lora": (("export", model, "-o", new, "--lora", "no.st"), "LoRA no.st does not exist"),
        "lora of another stage": (
            ("export-stage2", model, "-o", file, "--lora", folder / "alien.safetensors"),
            "does not fit SegmentTransformer3DModel",
        ),
        "bad strength": (
            ("export", model, "-o", new, "--lora", "a:x"),
            "is not PATH[:STRENGTH][:partial]",
        ),
        "file is taken": (("export-stage2", model, "-o", taken), "exists already"),
        "wrong ending": (("export-stage2", model, "-o", new), "must end in .safetensors"),
        "no file folder": (
            ("export-stage2", model, "-o", folder / "no/x.safetensors"),
            "does not exist or is not writable",
        ),
        "lora is taken": (("convert-lora", lora, "-o", taken, "--style", "peft"), "already"),
        "lora is itself": (("convert-lora", lora, "-o", lora, "--style", "peft"), "already"),
        "lora ending": (("convert-lora", lora, "-o", new, "--style", "peft"), "must end in"),
        "no source": (
            ("convert-lora", folder / "no.st", "-o", file, "--style", "peft"),
            "no weights at",
        ),
        "style cannot carry it": (
            ("convert-lora", folder / "full.safetensors", "-o", file, "--style", "kohya"),
            "no place for the full differences of blocks.0.norm2 (diff); use 'original'",
        ),
    }


@pytest.mark.parametrize("case", refusals(Path(), Path(), Path()))
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    case: str, model: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "taken.safetensors").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    pair = {"blocks.7.attn1.to_q.lora_A.weight": torch.ones(1, 24)}
    save_file(pair, tmp_path / "alien.safetensors")
    difference = {"diffusion_model.blocks.0.norm3.diff": torch.ones(24)}
    save_file(difference, tmp_path / "full.safetensors")
    before = sorted(tmp_path.rglob("*"))
    arguments, message = refusals(model, loras["stage1_transformer"], tmp_path)[case]
    assert message in error_line(run(*arguments))
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "taken.safetensors").read_text() == "mine"


def test_what_a_killed_run_left_is_replaced(model: Path, tmp_path: Path) -> None:
    leftover = tmp_path / "out.writing/stage1/transformer"
    leftover.mkdir(parents=True)
    (leftover / "half.safetensors").write_text("cut short")
    succeed(run("export", model, "-o", tmp_path / "out", "--dtype", "float32"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").rglob("half.safetensors"))
    assert_same(load(tmp_path / "out").stage2_transformer, load(model).stage2_transformer)


def test_an_unknown_style_or_dtype_is_a_usage_error(model: Path, tmp_path: Path) -> None:
    for arguments in (
        ("convert-lora", "a.safetensors", "-o", tmp_path / "b.safetensors", "--style", "lycoris"),
        ("export", model, "-o", tmp_path / "out", "--dtype", "int4"),
    ):
        assert run(*arguments).exit_code == 2
    assert not list(tmp_path.iterdir())
