"""A run's stderr: its own lines, and nothing of the libraries below."""

import re
import subprocess
import sys

import pytest

from tests.helpers.hub import make_hub, photo, write_preset

OWN = (
    r"loading .*\.yaml",
    r"seed: 7",
    r"Stage I done",
    r"(Stage I|Stage II, segment \d of \d): step \d of \d(, \d:\d\d:\d\d left)?",
    r"segment \d of \d done: \d+ frames, \d+\.\d s(, \d:\d\d:\d\d left)?",
    r"WARNING: .*: the reference half of Stage II is zero, .*",
    r"note: .*",
)


@pytest.mark.slow
def test_stderr_holds_our_lines_alone(tmp_path):
    hub = make_hub(tmp_path / "hub")
    model = write_preset(hub, tmp_path)
    photo().save(tmp_path / "photo.png")
    arguments = ["generate", "photo.png", "-p", "a dog runs", "-o", "out.mp4", "--seed", "7"]

    done = subprocess.run(
        [sys.executable, "-m", "swifti2v", *arguments, "--model", str(model)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if not any(re.fullmatch(own, line) for own in OWN)] == []
    assert lines[0].startswith("loading ")
    assert any(line.startswith("segment 1 of ") for line in lines)
