"""What the README shows, as it stands there."""

import re
from pathlib import Path

import numpy as np

from swifti2v.media import read_clip
from tests.command_line import save_photo

README = Path(__file__).parents[2] / "README.md"


def test_the_python_example_saves_its_video(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    save_photo(tmp_path / "photo.jpg", 80, 48)
    names: dict[str, object] = {}

    exec(compile(code, str(README), "exec"), names)

    clip = read_clip(tmp_path / "out.mp4")
    video = names["video"]
    assert isinstance(video, np.ndarray)
    assert clip.frames.shape == video.shape
    assert np.abs(clip.frames.astype(float) - video).mean() < 4  # compressed with loss
