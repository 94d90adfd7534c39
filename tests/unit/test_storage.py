"""Files that are there whole or not at all."""

import json
from pathlib import Path

import pytest

from swifti2v.errors import InputError
from swifti2v.storage import (
    encode_text,
    hash_file,
    require_same_settings,
    whole_directory,
    whole_file,
    write_whole,
)


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


def fill(path: Path, text: str, error: Exception | None = None) -> None:
    with whole_directory(path) as unfinished:
        (unfinished / "inner").mkdir(parents=True)
        (unfinished / "inner/a.txt").write_text(text)
        if error is not None:
            raise error


def test_a_directory_takes_the_place_of_another_only_when_it_is_whole(tmp_path):
    path = tmp_path / "model"
    (tmp_path / "model.writing/half").mkdir(parents=True)
    fill(path, "old")
    with pytest.raises(ValueError, match="stop"):
        fill(path, "half", ValueError("stop"))
    with pytest.raises(FileNotFoundError), whole_directory(path):
        pass
    assert [item.name for item in path.iterdir()] == ["inner"]
    assert (path / "inner/a.txt").read_text() == "old"
    fill(path, "new")
    assert (path / "inner/a.txt").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ending", ["", ".mp4"])
@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "a" * 247, "\udce9" * 255])
def test_the_longest_names_can_be_written(tmp_path, name, ending):
    with whole_file(tmp_path / name, ending) as unfinished:
        assert unfinished.name.endswith(f".writing{ending}")
        unfinished.write_text("new")
    assert (tmp_path / name).read_text() == "new"
    (tmp_path / name).unlink()
    with whole_directory(tmp_path / name) as unfinished:
        unfinished.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_json_with_any_file_name_is_written_and_read_back(tmp_path):
    names = ["Caf\udce9.png", "café.png"]
    write_whole(tmp_path / "names.json", json.dumps(names, ensure_ascii=False))
    text = (tmp_path / "names.json").read_text(encoding="utf-8")
    assert json.loads(text) == names
    assert encode_text("café") == "café".encode()


def test_settings_that_differ_are_named_with_both_values():
    stored = {"seed": 1, "stage2": {"size": 3, "tile": None}, "phases": [1, {"a": 2}], "old": True}
    require_same_settings(stored, stored | {"seed": 1}, "run x", "another one")
    now = {"seed": 2, "stage2": {"size": 3, "tile": (4, 5)}, "phases": [1, {"a": 3}]}
    with pytest.raises(InputError) as caught:
        require_same_settings(stored, now, "run x", "another one")
    assert str(caught.value) == (
        "run x was made with other settings: seed is 1 there and 2 now; stage2.tile is None there "
        "and [4, 5] now; phases.1.a is 2 there and 3 now; old is True there and None now; use the same settings, or another one"
    )


def test_the_hash_of_a_folder_tells_names_and_content(tmp_path):
    for name, content in (("a", "1"), ("b", "2")):
        (tmp_path / name).write_text(content)
    before = hash_file(tmp_path)
    assert hash_file(tmp_path / "a") != hash_file(tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / "c")
    assert hash_file(tmp_path) != before
