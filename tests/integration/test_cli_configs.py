import json
from pathlib import Path

import pytest
import yaml

from swifti2v.shipped import shipped_configs
from tests.helpers.command_line import error_line, succeed, swifti2v


def test_configs_are_listed_shown_and_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    titles = json.loads(succeed(swifti2v("configs", "list", "--json")).stdout)
    assert {"nano_stage2", "tables/baselines", "presets/paper"} <= titles.keys()
    assert all(title and len(title.splitlines()) == 1 for title in titles.values())
    lines = succeed(swifti2v("configs", "list")).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*titles]

    shown = succeed(swifti2v("configs", "show", "tables/baselines")).stdout
    copied = succeed(swifti2v("configs", "copy", "tables/baselines")).stdout.strip()
    assert Path(copied) == tmp_path / "baselines.yaml"
    assert Path(copied).read_text() == shown == shipped_configs()["tables/baselines"].read_text()
    assert "exists already" in error_line(swifti2v("configs", "copy", "tables/baselines"))
    assert "nano_stage2" in error_line(swifti2v("configs", "show", "nano_stage3"))


def test_a_shipped_name_is_a_config_and_a_file_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = ("train", "text", "--output-dir", "out", "--dry-run", "--config")
    assert yaml.safe_load(succeed(swifti2v(*train, "nano_text")).stdout)["width"] == 128
    Path("nano_text").write_text("width: 64\nmodel_heads: 4\n")
    assert "model_heads" in error_line(swifti2v(*train, "nano_text"))
    refused = error_line(swifti2v(*train, "nano_txt"))
    assert "'nano_txt' does not exist" in refused
    assert "swifti2v configs list" in refused


@pytest.mark.parametrize("name", [n for n in shipped_configs() if not n.startswith("presets/")])
def test_a_config_says_the_command_that_takes_it(name):
    first = shipped_configs()[name].read_text().partition("Command: ")[2].splitlines()[0]
    assert f"--config {name} " in f"{first} " or first.startswith("runs/nano.sh")
