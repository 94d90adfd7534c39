"""Files that are there whole or not at all."""

from pathlib import Path

import pytest

from swifti2v.storage import whole_file, write_whole


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "clip.mkv"
    path.write_text("old")
    with whole_file(path, ending=".mkv") as unfinished:
        assert unfinished.suffix == ".mkv"
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def write_half(path: Path) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text("half")
        raise ValueError("stop")


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "plan.json"
    write_whole(path, "{}")
    with pytest.raises(ValueError, match="stop"):
        write_half(path)
    assert path.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_written_is_an_error_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "plan.json"
    write_whole(path, b"\x00")
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass
    assert path.read_bytes() == b"\x00"


def test_text_is_utf8(tmp_path):
    write_whole(tmp_path / "a.txt", "ä\n")
    assert (tmp_path / "a.txt").read_bytes() == "ä\n".encode()
