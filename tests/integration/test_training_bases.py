"""Start of a training on a model with its own LoRAs: Stage II has them, a LoRA does not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swifti2v.models.loading.components import load_components
from swifti2v.models.lora.provenance import hash_base
from swifti2v.training.adapters import AdapterConfig
from swifti2v.training.data.buckets import BucketRules
from swifti2v.training.data.clips import DataConfig
from swifti2v.training.data.phases import ClipsPhase
from swifti2v.training.stages.config import Stage1FineTuning, Stage2FineTuning
from swifti2v.training.stages.fine_tuning import FineTuning
from swifti2v.training.stages.validation import ValidationConfig
from tests.helpers.command_line import copy_model, save_lora
from tests.helpers.regression import alone_in

CPU = torch.device("cpu")
DATA = DataConfig(rules=BucketRules(buckets=((5, 32, 32),)))
COMMON: Any = {"phases": (ClipsPhase(steps=1, data=DATA),), "num_procedural_clips": 1}


@pytest.fixture(scope="module")
def distilled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose stages both have a LoRA of their own, as few-step models do."""
    folder = tmp_path_factory.mktemp("distilled")
    path = copy_model(model, folder / "model")
    lora = save_lora(folder / "lora.safetensors")
    index = json.loads((path / "model_index.json").read_text())
    for stage in ("stage1", "stage2"):
        index["components"][f"{stage}_transformer"]["loras"] = [{"path": str(lora)}]
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def weights(model: Path, stage: str) -> dict[str, Tensor]:
    parts = load_components(model, torch.float32, CPU)[0]
    return dict(getattr(parts, f"{stage}_transformer").state_dict())


@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=2)])
def test_stage1_is_trained_on_the_base_without_its_own_loras(model, distilled, tmp_path, adapter):
    config = Stage1FineTuning(model=str(distilled), adapter=adapter, **COMMON)
    tuning = FineTuning(config, alone_in(tmp_path))
    base, with_lora = weights(model, "stage1"), weights(distilled, "stage1")
    assert any(not torch.equal(base[name], with_lora[name]) for name in base)
    own = {
        name.replace(".base_layer", ""): value
        for name, value in tuning.transformer.state_dict().items()
        if "lora_" not in name
    }
    assert own.keys() == base.keys()
    assert all(torch.equal(own[name], base[name]) for name in base)
    if adapter is not None:
        plain = load_components(model, torch.float32, CPU)[0].stage1_transformer
        assert tuning.base_hash == hash_base(plain)


def test_stage2_is_trained_with_its_own_loras(model, distilled, tmp_path):
    tuning = FineTuning(Stage2FineTuning(model=str(distilled), **COMMON), alone_in(tmp_path))
    own = tuning.transformer.state_dict()
    assert all(torch.equal(own[n], v) for n, v in weights(distilled, "stage2").items())
    assert any(not torch.equal(own[n], v) for n, v in weights(model, "stage2").items())


def test_settings_of_generation_reach_the_samples(model, tmp_path):
    changes = {"stage1": {"downscale": 2}, "stage2": {"reference_start": "motion"}}
    config = Stage2FineTuning(model=str(model), generation=changes, **COMMON)
    task: Any = FineTuning(config, alone_in(tmp_path)).task
    (source,) = task.sources
    clips = source.clips
    assert (clips.downscale, clips.stage2.reference_start) == (2, "motion")
    assert task.stage2.reference_start == "motion"


def test_validation_takes_its_own_seed_and_clips(model, tmp_path):
    measured = []
    for name, (seed, num_clips) in {"a": (0, 1), "b": (0, 1), "c": (1, 1), "d": (0, 2)}.items():
        own = ValidationConfig(seed=seed, num_clips=num_clips)
        settings = {**COMMON, "num_procedural_clips": 2, "validation": own}
        tuning = FineTuning(Stage2FineTuning(model=str(model), **settings), alone_in(tmp_path))
        (tmp_path / name).mkdir()
        measured.append(tuning.task.validate(tmp_path / name)["psnr"])
        assert len(list((tmp_path / name).glob("clip-*.mp4"))) == num_clips
    assert measured[0] == measured[1]
    assert measured[0] not in measured[2:]
