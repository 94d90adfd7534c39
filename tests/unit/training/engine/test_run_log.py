"""Log of a run, in files and in trackers."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from swifti2v.training.engine.noise_histogram import SigmaHistogram
from swifti2v.training.engine.run_log import RunLog
from tests.helpers.regression import TWO_PHASES, make_trainer, read_lines


class Notebook:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.numbers: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[int, str]] = []
        self.is_closed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.numbers.append((step, dict(metrics)))

    def log_image(self, step: int, name: str, path: Path) -> None:
        assert path.exists()
        self.pictures.append((step, name))

    def close(self) -> None:
        self.is_closed = True


def test_trackers_get_validations_pictures_and_noise_levels(tmp_path):
    notebook, histogram = Notebook(), SigmaHistogram()
    histogram.add(torch.tensor([0.5, 0.5, 1.0]))
    (tmp_path / "grid.png").write_bytes(b"")
    log = RunLog(tmp_path, 0, is_first=True, trackers=[notebook])
    log.log_validation(4, {"psnr": 30.0}, tmp_path)
    log.log_noise_levels(4, histogram)
    log.close()
    assert notebook.pictures == [(4, "grid")]
    validation, levels = notebook.numbers
    assert validation == (4, {"validation/psnr": 30.0})
    assert levels[0] == 4
    assert len(levels[1]) == 20
    assert levels[1]["noise_levels/0.45-0.50"] == 2
    assert levels[1]["noise_levels/0.95-1.00"] == 1
    assert notebook.is_closed
    assert read_lines(tmp_path, "validation.jsonl") == [{"step": 4, "psnr": 30.0}]
    written = json.loads((tmp_path / "noise_levels.json").read_text())
    assert written == {"step": 4, "counts": histogram.to_dict()}


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path, 0, is_first=False)
    log.log_validation(4, {"psnr": 30.0}, tmp_path)
    log.log_noise_levels(4, SigmaHistogram())
    log.close()
    assert not list(tmp_path.iterdir())


def test_trackers_get_the_numbers_of_every_step(tmp_path):
    notebook = Notebook()
    trainer = make_trainer(tmp_path, phases=TWO_PHASES)
    trainer.trackers = (notebook,)
    trainer.run()
    lines = read_lines(tmp_path)
    for (step, numbers), line in zip(notebook.numbers, lines, strict=True):
        assert {"step": step, "phase": line["phase"], **numbers} == line
