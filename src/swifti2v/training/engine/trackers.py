"""Destinations of a training's numbers: a metrics file, TensorBoard, Weights & Biases."""

import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from swifti2v.errors import InputError, LoadingError
from swifti2v.storage import write_whole


class Tracker(Protocol):
    """Destination of the numbers and pictures of a training."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the metrics of a step, counted from 1; 0 is the state before the first.

        A step may be logged more than once (training, validation).
        """
        ...

    def log_image(self, step: int, name: str, path: Path) -> None:
        """Note a picture of a step, in the series of that name; the file stays where it is."""
        ...

    def close(self) -> None:
        """Write what is left; nothing can be logged afterwards."""
        ...


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, with its ``step``, written out line by line.

    JSON has no NaN and no infinity: such a number is written as ``null``. A picture is a line with
    ``image`` and ``path``. A file that is there is continued; after a stop call ``cut`` first, as
    the last line may be half written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Append a line; words may stand among the numbers.

        Raises:
            InputError: A metric is called ``step``.
        """
        if "step" in metrics:
            raise InputError("a metric is called 'step'; it is the step's own key, rename it")
        self._append({"step": step, **{name: _to_json(v) for name, v in metrics.items()}})

    def log_image(self, step: int, name: str, path: Path) -> None:
        """Append a line that names the picture's file."""
        self._append({"step": step, "image": name, "path": str(path)})

    def cut(self, num_steps: int) -> int:
        """Drop the lines after a step, and a last line that is half written; returns how many.

        The file is replaced in one go.

        Raises:
            LoadingError: A line that is not the last is not a JSON object with a step.
        """
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = []
        for number, line in enumerate(lines, start=1):
            step = _read_step(line)
            if step is None and number < len(lines):
                raise LoadingError(
                    f"{self.path}, line {number} is not a JSON object with a step; remove it"
                )
            if step is not None and step <= num_steps:
                kept.append(line)
        if len(kept) < len(lines):
            write_whole(self.path, b"".join(kept))
            self._file.close()
            self._file = self.path.open("a", encoding="utf-8")
        return len(lines) - len(kept)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


class TensorBoardTracker:
    """Event files for ``tensorboard --logdir``.

    What an earlier run in the directory logged from the first step logged here on is hidden: a
    training that continues from a checkpoint replaces the steps after it.

    Raises:
        InputError: tensorboard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        self._module = _import_extra(
            "torch.utils.tensorboard", "pip install 'swifti2v[train]', or --set run.trackers=[]"
        )
        self._directory = directory
        self._writer: Any = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to each metric's curve."""
        writer = self._open(step)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def log_image(self, step: int, name: str, path: Path) -> None:
        """Copy the picture into the event file."""
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._open(step).add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left and close."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, step: int) -> Any:
        if self._writer is None:
            directory = os.fspath(self._directory)
            self._writer = self._module.SummaryWriter(directory, purge_step=step)
        return self._writer


class WandbTracker:
    """A run of Weights & Biases; without a network set ``WANDB_MODE=offline``.

    A run of the same id is continued, so that a resumed training stays one run. It takes no step
    before its last one again.

    Raises:
        InputError: wandb is not installed.
    """

    def __init__(
        self, project: str, directory: Path, run_id: str, config: Mapping[str, Any]
    ) -> None:
        self._wandb = _import_extra("wandb", "pip install wandb")
        self._run = self._wandb.init(
            project=project,
            dir=os.fspath(directory),
            id=run_id,
            resume="allow",
            config=dict(config),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics to the run."""
        self._run.log(dict(metrics), step=step)

    def log_image(self, step: int, name: str, path: Path) -> None:
        """Upload the picture."""
        self._run.log({name: self._wandb.Image(os.fspath(path))}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_trackers(
    names: Sequence[str], directory: Path, settings: Mapping[str, Any]
) -> list[Tracker]:
    """The trackers of a run besides its metrics file.

    Raises:
        InputError: One is not installed.
    """
    opened: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            opened.append(TensorBoardTracker(directory / "tensorboard"))
        else:
            run_id = directory.resolve().name
            opened.append(WandbTracker("swifti2v", directory, run_id, dict(settings)))
    return opened


def _to_json(value: float | str) -> float | str | None:
    return value if isinstance(value, str) or math.isfinite(value) else None


def _import_extra(module: str, remedy: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"this tracker needs {module} ({error}); {remedy}") from None


def _read_step(line: bytes) -> int | None:
    """Step of a whole line, or None."""
    if not line.endswith(b"\n"):
        return None
    try:
        values = json.loads(line)
    except ValueError:
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return step if isinstance(step, int) else None
