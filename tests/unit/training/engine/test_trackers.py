"""Trackers: the metrics file survives a stop, TensorBoard gets what was logged."""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from swifti2v.errors import InputError, LoadingError
from swifti2v.training.engine.trackers import MetricsFile, TensorBoardTracker, Tracker, WandbTracker
from tests.helpers.regression import ROOT, run_in_subprocess


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    metrics: Tracker = MetricsFile(path)
    metrics.log(1, {"loss": 0.5, "num_samples": 8})
    assert read(path) == [{"step": 1, "loss": 0.5, "num_samples": 8}]
    metrics.log_image(1, "grid", Path("grid_1.png"))
    assert read(path)[1] == {"step": 1, "image": "grid", "path": "grid_1.png"}
    metrics.close()


def test_numbers_json_has_not_become_null(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.log(1, {"psnr": math.inf, "loss": math.nan})
    metrics.close()
    assert "NaN" not in metrics.path.read_text()
    assert read(metrics.path) == [{"step": 1, "psnr": None, "loss": None}]


def test_a_metric_called_step_is_refused(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="called 'step'"):
        metrics.log(1, {"step": 2.0})
    metrics.close()
    assert metrics.path.read_text() == ""


def read_events(directory: Path) -> Any:
    module = "tensorboard.backend.event_processing.event_accumulator"
    events = importlib.import_module(module).EventAccumulator(str(directory))
    events.Reload()
    return events


@settings(max_examples=50, deadline=None)
@given(
    num_logged=st.integers(0, 8),
    num_kept=st.integers(0, 10),
    missing=st.integers(0, 200),
)
def test_a_continued_file_is_that_of_a_run_without_a_stop(
    tmp_path_factory, num_logged, num_kept, missing
):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    first = MetricsFile(path)
    for step in range(1, num_logged + 1):
        first.log(step, {"loss": 1 / step})
        first.log(step, {"validation/psnr": 20.0 + step})
    first.close()
    content = path.read_bytes()
    path.write_bytes(content[: max(0, len(content) - missing)])  # a stop in the middle of a line
    whole = path.read_bytes().count(b"\n")

    second = MetricsFile(path)
    second.cut(num_kept)
    left = read(path)
    assert len(left) == min(whole, 2 * num_kept, 2 * num_logged)
    second.log(99, {"loss": 0.0})
    second.close()
    assert read(path) == [*left, {"step": 99, "loss": 0.0}]
    assert list(path.parent.iterdir()) == [path]


def test_cut_counts_what_it_drops(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics.log(step, {"loss": 1.0})
    assert metrics.cut(3) == 0
    assert metrics.cut(1) == 2
    metrics.close()
    assert [line["step"] for line in read(metrics.path)] == [1]


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "1"}'])
def test_a_damaged_line_within_the_file_is_named_and_nothing_is_dropped(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    path.write_text(content)
    metrics = MetricsFile(path)
    with pytest.raises(LoadingError, match="line 2"):
        metrics.cut(1)
    metrics.close()
    assert path.read_text() == content


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grid.png")
    tracker: Tracker = TensorBoardTracker(tmp_path / "events")
    tracker.log(1, {"loss": 0.5, "learning_rate": 1e-5})
    tracker.log(2, {"loss": 0.25})
    tracker.log_image(2, "grid", tmp_path / "grid.png")
    tracker.close()
    events = read_events(tmp_path / "events")
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert events.Scalars("learning_rate")[0].value == pytest.approx(1e-5)
    (image,) = events.Images("grid")
    assert (image.step, image.height, image.width) == (2, 4, 6)


def test_tensorboard_hides_the_steps_after_the_checkpoint(tmp_path):
    first = TensorBoardTracker(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)})
    first.close()
    second = TensorBoardTracker(tmp_path)
    second.log(2, {"loss": 20.0})
    second.close()
    events = read_events(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


@pytest.mark.slow
def test_wandb_keeps_a_run_offline_and_continues_it(tmp_path):
    pytest.importorskip("wandb")
    run_in_subprocess(ROOT / "tests/helpers/wandb_offline.py", "write", tmp_path)
    found = json.loads(run_in_subprocess(ROOT / "tests/helpers/wandb_offline.py", "read", tmp_path))
    first, second = found  # one file for each call; they are one run by their id
    assert [own["id"] for own in found] == ["run", "run"]
    assert first["config"] == {"run": {"seed": 7}}
    assert first["history"] == [[1, {"loss": 0.5, "lr": 1e-5}], [2, {"loss": 0.25}]]
    assert second["history"] == [[3, {"loss": 0.125}]]
    assert first["pictures"] == 1


def test_a_missing_extra_is_named_with_its_remedy(tmp_path, monkeypatch):
    for module in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)  # what Python does for a module it has not
    with pytest.raises(InputError, match=r"pip install 'swifti2v\[train\]'"):
        TensorBoardTracker(tmp_path)
    with pytest.raises(InputError, match="pip install wandb"):
        WandbTracker("swifti2v", tmp_path, "run", {})
