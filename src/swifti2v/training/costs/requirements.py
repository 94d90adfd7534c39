"""Needs of a training besides its settings: packages of extras, and data."""

import dataclasses
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from swifti2v.errors import InputError
from swifti2v.training.data.clips import ManifestConfig
from swifti2v.training.data.readers import DATASET_FILES
from swifti2v.training.engine.optimizers import OptimizerConfig
from swifti2v.training.engine.run_config import RunConfig

TRAIN, QUANT = "pip install 'swifti2v[train]'", "pip install 'swifti2v[quant]'"


def require_packages(settings: Any) -> None:
    """Refuse a training that would miss a package later.

    Raises:
        InputError: Naming every package, what needs it, and how to get it or do without.
    """
    needed = {need: None for part in _walk(settings) for need in _needs(part)}
    missing = [f"{why} needs {name}: {remedy}" for name, why, remedy in needed if not _has(name)]
    if missing:
        raise InputError(f"not installed: {'; '.join(missing)}")


def find_missing_data(settings: Any) -> list[str]:
    """Paths of manifests that are not there."""
    paths = [part.path for part in _walk(settings) if isinstance(part, ManifestConfig)]
    return [path for path in dict.fromkeys(paths) if not Path(path).exists()]


def _walk(value: Any) -> Iterator[Any]:
    """All dataclasses in a configuration, itself included."""
    if dataclasses.is_dataclass(value):
        yield value
        for item in dataclasses.fields(value):
            yield from _walk(getattr(value, item.name))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _walk(item)


def _needs(part: Any) -> Iterator[tuple[str, str, str]]:
    """Package, what needs it, and the remedy."""
    if isinstance(part, RunConfig):
        without = "or --set run.trackers=[]"
        if "tensorboard" in part.trackers:
            yield "tensorboard", "run.trackers", f"{TRAIN}, {without}"
        if "wandb" in part.trackers:
            yield "wandb", "run.trackers", f"pip install wandb, {without}"
    elif isinstance(part, OptimizerConfig) and part.kind == "adamw_8bit":
        yield "torchao", "optimizer.kind adamw_8bit", f"{QUANT}, or adamw"
    elif isinstance(part, ManifestConfig):
        path = Path(part.path)
        if path.suffix.lower() == ".parquet":
            yield "pyarrow", part.path, TRAIN
        if any((path / name).is_file() for name in DATASET_FILES):
            yield "datasets", part.path, TRAIN


def _has(package: str) -> bool:
    return find_spec(package) is not None
