"""A run's directory: settings that decide its result may not change on the way."""

from dataclasses import replace
from pathlib import Path

import pytest

from swifti2v.config import to_dict
from swifti2v.errors import InputError
from swifti2v.training.engine.run_directory import (
    FREE_SETTINGS,
    begin_run_directory,
    require_run_directory,
)
from swifti2v.training.nano.config import NanoConfig, TextEncoderConfig

CONFIG = TextEncoderConfig()


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    begin_run_directory(tmp_path, to_dict(CONFIG))
    return tmp_path


def test_the_same_settings_go_on(begun: Path) -> None:
    require_run_directory(begun, to_dict(CONFIG), resume=True)
    with pytest.raises(InputError, match="continue it with --resume"):
        require_run_directory(begun, to_dict(CONFIG), resume=False)


def test_a_run_goes_on_with_other_machines_and_reports(begun: Path) -> None:
    changes = {
        "num_micro_batches": 4,
        "num_replicas": 2,
        "num_workers": 3,
        "checkpoint_steps": 7,
        "checkpoint_minutes": None,
        "num_checkpoints": 5,
        "validation_steps": 10,
        "trackers": (),
    }
    assert set(changes) == FREE_SETTINGS
    other = replace(CONFIG, run=replace(CONFIG.run, **changes))  # type: ignore[arg-type]
    require_run_directory(begun, to_dict(other), resume=True)


def test_what_decides_the_result_may_not_change(begun: Path) -> None:
    for run in (
        replace(CONFIG.run, seed=9),
        replace(CONFIG.run, batch_size=16),
        replace(CONFIG.run, precision="bfloat16"),
        replace(CONFIG.run, ema_decay=0.5),
    ):
        with pytest.raises(InputError, match=r"other settings: run\.\w+ is"):
            require_run_directory(begun, to_dict(replace(CONFIG, run=run)), resume=True)


def test_runs_of_parts_are_looked_into(tmp_path: Path) -> None:
    config = NanoConfig()
    begin_run_directory(tmp_path, to_dict(config))
    text = replace(config.text, run=replace(config.text.run, num_workers=2))
    require_run_directory(tmp_path, to_dict(replace(config, text=text)), resume=True)
    text = replace(config.text, run=replace(config.text.run, seed=5))
    with pytest.raises(
        InputError, match=r"other settings: text\.run\.seed is 0 there and 5 now; use"
    ):
        require_run_directory(tmp_path, to_dict(replace(config, text=text)), resume=True)


def test_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds no training of this kind"):
        require_run_directory(tmp_path, to_dict(CONFIG), resume=True)
