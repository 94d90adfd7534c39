"""Cost of training steps: every combination is trained for real, in a process of its own."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from swifti2v.cli import app
from swifti2v.errors import ConfigError, SwiftI2VError
from swifti2v.training.costs.throughput import (
    Throughput,
    combine,
    measure_throughput,
    parse_choices,
    render_throughput,
)
from swifti2v.units import MB

TINY = """
width: 32
num_layers: 1
max_tokens: 20
run: {batch_size: 2, precision: float32, ema_decay: null}
phases: [{steps: 50}]
"""


def test_values_are_read_with_their_brackets() -> None:
    assert parse_choices("run.batch_size=1,2,4") == ("run.batch_size", ["1", "2", "4"])
    assert parse_choices("a=[1, 2],{b: 3, c: 4}") == ("a", ["[1, 2]", "{b: 3, c: 4}"])
    for wrong in ("a", "=1", "a=", "a=1,,2"):
        with pytest.raises(ConfigError, match=r"a\.b=1,2,4"):
            parse_choices(wrong)


def test_every_combination_comes_once() -> None:
    assert list(combine({})) == [{}]
    made = list(combine({"a": ["1", "2"], "b": ["x", "y", "z"]}))
    assert len(made) == 6
    assert made[0] == {"a": "1", "b": "x"}
    assert len({tuple(settings.items()) for settings in made}) == 6


@pytest.mark.slow
def test_trainings_are_measured_one_by_one(tmp_path: Path) -> None:
    config = tmp_path / "text.yaml"
    config.write_text(TINY)
    seen: list[Throughput] = []
    results = measure_throughput(
        "text", config, {"run.batch_size": ["2", "8"]}, tmp_path / "runs", 4, seen.append
    )
    assert results == seen
    assert [result.settings["run.batch_size"] for result in results] == ["2", "8"]
    for result in results:
        assert result.samples_per_second > 0
        assert 100 * 2**20 < result.peak_rss_bytes < 20 * 2**30


def test_the_table_has_a_row_for_each_setting() -> None:
    results = [
        Throughput(
            settings={"run.batch_size": size},
            samples_per_second=2.5,
            peak_rss_bytes=3 * MB,
            peak_device_bytes=0,
        )
        for size in ("2", "8")
    ]
    assert render_throughput(results).splitlines() == [
        "| `run.batch_size` | samples/s | peak RSS, MB |",
        "| --- | --- | --- |",
        "| 2 | 2.50 | 3 |",
        "| 8 | 2.50 | 3 |",
    ]


@pytest.mark.slow
def test_a_failed_training_says_why(tmp_path: Path) -> None:
    with pytest.raises(SwiftI2VError, match=r"run\.batch_size.*it must be at least 1"):
        measure_throughput("text", None, {"run.batch_size": ["0"]}, tmp_path / "runs", 4)


def test_trainings_that_cannot_be_measured_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 steps are too few"):
        measure_throughput("text", None, {}, tmp_path / "runs", 2)
    with pytest.raises(ConfigError, match="a relay is two trainings"):
        measure_throughput("relay", None, {}, tmp_path / "runs", 4)


def test_the_command_refuses_a_full_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["bench", "training", "--output-dir", str(tmp_path)])
    assert result.exit_code != 0
    assert "is not empty" in result.output
