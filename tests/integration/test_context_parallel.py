"""Processes that share a clip: two make the video of one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from swifti2v.cli.processes import parse_processes
from swifti2v.errors import ShapeError
from swifti2v.models.context_parallel import Bands
from tests.helpers.command_line import (
    LOSSLESS,
    error_line,
    frames_of,
    save_photo,
    succeed,
    swifti2v,
)

SMALL = ("--width", 160, "--height", 96, "--num-frames", 17, "--seed", 3, *LOSSLESS)


def words(photo: Path, output: Path, *more: object) -> list[str]:
    return [
        str(word) for word in ("generate", photo, "-p", "pan left", "-o", output, *SMALL, *more)
    ]


def run_two(arguments: list[str]) -> str:
    environment = {name: v for name, v in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "swifti2v", *arguments, "--context-parallel", "ulysses:2"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_make_the_video_of_one(tmp_path):
    """To the rounding of sums in another order: one level in few values."""
    photo = save_photo(tmp_path / "photo.png", 160, 96)
    succeed(swifti2v(*words(photo, tmp_path / "one.mkv")))
    work = ("--work-dir", tmp_path / "work")
    stdout = run_two(words(photo, tmp_path / "two.mkv", *work))
    assert stdout.splitlines()[0] == str(tmp_path / "two.mkv")
    assert stdout.count("two.mkv") == 1  # of the first process alone
    one, two = (frames_of(tmp_path / f"{name}.mkv").astype(int) for name in ("one", "two"))
    assert np.abs(one - two).max() <= 1
    assert (one != two).mean() < 1e-3

    (tmp_path / "work" / "segment_0001.safetensors").unlink()
    run_two(words(photo, tmp_path / "again.mkv", *work, "--resume"))
    assert np.abs(frames_of(tmp_path / "again.mkv").astype(int) - two).max() <= 1


def test_bands_hold_each_row_once():
    assert [Bands(3, index).rows(12) for index in range(3)] == [range(4), range(4, 8), range(8, 12)]
    assert Bands().rows(7) == range(7)
    with pytest.raises(ShapeError, match="7 rows of tokens do not divide into 2 processes"):
        Bands(2, 1).rows(7)


def test_what_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    photo = save_photo(tmp_path / "photo.png", 160, 96)
    assert parse_processes("ulysses:8") == 8
    result = swifti2v(*words(photo, tmp_path / "a.mkv", "--context-parallel", "ring:2"))
    assert result.exit_code == 2
    assert "'ring:2' is not ulysses:N" in result.stderr
    monkeypatch.setenv("WORLD_SIZE", "3")  # as of a launcher
    line = error_line(
        swifti2v(*words(photo, tmp_path / "a.mkv", "--context-parallel", "ulysses:2"))
    )
    assert "2 processes are to share a window, but 3 were started" in line
