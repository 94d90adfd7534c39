"""The README's code runs as it is printed."""

import re
from pathlib import Path

import pytest

from swifti2v.config import GenerationConfig, parse_config
from swifti2v.media import probe_clip
from swifti2v.models.loading.sources import find_model
from tests.helpers.command_line import save_photo

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_the_python_example_saves_its_video(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    save_photo(tmp_path / "photo.jpg", 80, 48)

    exec(compile(code, str(README), "exec"), {})

    config = parse_config(GenerationConfig, find_model("nano")[0].settings, "nano")
    info = probe_clip(tmp_path / "out.mp4")
    assert (info.num_frames, info.width, info.height, info.fps) == (
        config.num_frames, config.width, config.height, config.fps,
    )  # fmt: skip
