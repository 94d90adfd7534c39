"""The directory of a training run: begun once, with settings that do not change."""

from pathlib import Path
from typing import Any

import yaml

from swifti2v.errors import InputError
from swifti2v.storage import require_same_settings

CONFIG_NAME = "config.yaml"
FREE_SETTINGS = frozenset(
    {
        "num_micro_batches",
        "num_replicas",
        "num_workers",
        "checkpoint_steps",
        "checkpoint_minutes",
        "num_checkpoints",
        "validation_steps",
        "trackers",
    }
)
"""Fields of ``RunConfig`` that only change the order of sums and the rounding of parts of a
gradient, so a run may continue with other values, on other machines."""


def require_run_directory(directory: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Refuse a directory that holds something else than this run.

    Raises:
        InputError: It holds something and ``resume`` is not set, no run of training, or a run of
            other settings, apart from ``FREE_SETTINGS``.
    """
    if directory.is_file():
        raise InputError(f"output directory {directory} is a file; choose another name")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not resume:
        raise InputError(
            f"output directory {directory} is not empty; choose another one, or continue it with "
            "--resume"
        )
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise InputError(f"{directory} holds no training of this kind; choose another directory")
    before = _without_free(yaml.safe_load(path.read_text(encoding="utf-8")))
    now = _without_free(settings)
    before = {key: before.get(key) for key in now}
    require_same_settings(before, now, f"{directory}", "choose another directory")


def begin_run_directory(directory: Path, settings: dict[str, Any]) -> None:
    """Make the directory and write the settings into it."""
    directory.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(to_plain(settings), sort_keys=False)
    (directory / CONFIG_NAME).write_text(text, encoding="utf-8")


def to_plain(value: Any) -> Any:
    """Nested values with lists instead of tuples, as YAML gives them back."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def _without_free(settings: Any) -> Any:
    """Nested settings without those that a run may change on its way."""
    if not isinstance(settings, dict):
        return settings
    kept = {key: _without_free(value) for key, value in settings.items()}
    run = kept.get("run")
    if isinstance(run, dict):
        kept["run"] = {key: run[key] for key in run if key not in FREE_SETTINGS}
    return kept
