"""A stage alone is loaded without a byte of the other one's weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swifti2v.errors import ConfigError, LoadingError
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from tests.helpers.command_line import copy_model, save_clip, succeed, swifti2v
from tests.helpers.hub import assert_equal, load, make_hub, photo, state_of, write_preset
from tests.helpers.tiny import SIZE, tiny_pipeline


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hub(tmp_path_factory.mktemp("hub"))


def remove_weights(folder: Path) -> None:
    files = [*folder.rglob("*.safetensors"), *folder.rglob("*.index.json")]
    assert files
    for file in files:
        file.unlink()


def is_empty(model: Any) -> bool:
    return all(value.is_meta for value in model.parameters())


@pytest.mark.parametrize(("stage", "other"), [("stage1", "stage2"), ("stage2", "stage1")])
def test_the_other_stage_has_no_weights(
    model: Path, tmp_path: Path, stage: Any, other: str
) -> None:
    whole = load(model)
    own = copy_model(model, tmp_path / "model")
    remove_weights(own / other / "transformer")
    with pytest.raises(LoadingError, match="no weight"):
        load(own)
    parts = load(own, stages=(stage,))
    assert_equal(
        getattr(parts, f"{stage}_transformer"), state_of(getattr(whole, f"{stage}_transformer"))
    )
    assert_equal(parts.text_encoder, state_of(whole.text_encoder))
    assert is_empty(getattr(parts, f"{other}_transformer"))
    assert getattr(parts, f"{other}_transformer").config["num_layers"] == 1


def test_stage2_of_a_preset_needs_neither_stage1_nor_its_lora_nor_clip(
    hub: Path, tmp_path: Path
) -> None:
    lora = {"path": str(tmp_path / "not_there.safetensors")}
    name = write_preset(hub, tmp_path, stage1_transformer={"loras": [lora]})
    with pytest.raises(LoadingError, match="not_there"):
        load(name)
    parts = load(name, stages=("stage2",))
    assert parts.image_encoder is None
    assert parts.image_processor is None
    assert is_empty(parts.stage1_transformer)
    assert is_empty(parts.stage1_vae)
    with pytest.raises(LoadingError, match="not_there"):
        load(name, stages=("stage1",))


def test_stage2_alone_refines_as_with_both(model: Path) -> None:
    motion = np.random.default_rng(0).integers(0, 256, (17, SIZE // 4, SIZE // 4, 3), np.uint8)
    config = tiny_pipeline().config
    clips = []
    for stages in (("stage1", "stage2"), ("stage2",)):
        pipe = SwiftI2VPipeline(load(model, stages=stages), config)
        pieces = pipe.refine(motion, photo(), "zoom")
        clips.append(np.concatenate([piece.frames for piece in pieces]))
    np.testing.assert_array_equal(clips[0], clips[1])


def test_stage1_of_a_pipeline_without_it_is_refused(model: Path) -> None:
    pipe = SwiftI2VPipeline.from_pretrained(model, device="cpu", stages=("stage2",))
    with pytest.raises(ConfigError, match="load the pipeline again with both stages"):
        next(pipe.stream(photo(), "zoom"))


def test_training_stage2_never_reads_stage1(model: Path, tmp_path: Path) -> None:
    own = copy_model(model, tmp_path / "model")
    remove_weights(own / "stage1")
    save_clip(tmp_path / "clip.mkv", 17, SIZE, SIZE)
    (tmp_path / "clips.jsonl").write_text('{"video": "clip.mkv", "prompt": "one"}\n')
    phases = (
        f"phases=[{{steps: 1, data: {{manifests: [{{path: {tmp_path}/clips.jsonl}}], "
        f"rules: {{buckets: [[17, {SIZE}, {SIZE}]], fps: 8}}}}}}]"
    )
    result = swifti2v(
        "train", "stage2", "--output-dir", tmp_path / "out", "--device", "cpu",
        "--set", f"model={own}", "--set", phases, "--set", "run.batch_size=1",
        "--set", "run.precision=float32", "--set", "run.validation_steps=1",
    )  # fmt: skip
    succeed(result)
    weights = (tmp_path / "out/transformer").glob("*.safetensors")
    assert len(list(weights)) == 1
