import sys

import pytest

from swifti2v.config import parse_config
from swifti2v.errors import InputError
from swifti2v.training.costs.requirements import find_missing_data, require_packages
from swifti2v.training.stages.config import Stage2FineTuning


def settings(**run: object) -> Stage2FineTuning:
    phase = {
        "steps": 1,
        "optimizer": {"kind": "adamw_8bit"},
        "data": {"manifests": [{"path": "no-such-folder/clips.parquet"}]},
    }
    return parse_config(Stage2FineTuning, {"run": run, "phases": [phase, phase]}, "test")


def test_what_is_missing_is_named_once_with_its_remedy(monkeypatch):
    for name in ("wandb", "torchao", "tensorboard", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(InputError) as caught:
        require_packages(settings(trackers=["wandb"]))

    assert str(caught.value) == (
        "not installed: run.trackers needs wandb: pip install wandb, or --set run.trackers=[]; "
        "optimizer.kind adamw_8bit needs torchao: pip install 'swifti2v[quant]', or adamw; "
        "no-such-folder/clips.parquet needs pyarrow: pip install 'swifti2v[train]'"
    )


def test_trackers_that_are_not_used_need_no_packages(monkeypatch):
    for name in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    plain = parse_config(Stage2FineTuning, {"run": {"trackers": []}}, "test")

    require_packages(plain)

    assert find_missing_data(plain) == []
    assert find_missing_data(settings()) == ["no-such-folder/clips.parquet"]
