"""Rows of a manifest: read strictly, before anything is made."""

import json
from pathlib import Path
from typing import Any

import pytest

from swifti2v.batch.rows import read_rows
from swifti2v.errors import ConfigError, InputError


@pytest.fixture
def folder(tmp_path):
    for name in ("lake.jpg", "snake.png", "clip.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def write_csv(folder: Path, *lines: str) -> Path:
    (folder / "clips.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "clips.csv"


def write_jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "clips.jsonl"


def test_both_kinds_of_tables_give_the_same_rows(folder):
    csv = write_csv(
        folder,
        "image,prompt,num_frames,stage2.context_size,negative_prompt,loras",
        'lake.jpg,"pan left, slowly",17,2,no,a.safetensors',
        "snake.png,1984,,,,",
    )
    jsonl = write_jsonl(
        folder,
        {
            "image": "lake.jpg",
            "prompt": "pan left, slowly",
            "num_frames": 17,
            "stage2": {"context_size": 2},
            "negative_prompt": "no",
            "loras": [{"path": "a.safetensors"}],
        },
        {"image": "snake.png", "prompt": "1984", "num_frames": None},
    )
    first, second = read_rows(csv, {})
    assert [first, second] == read_rows(jsonl, {})
    assert (first.id, first.image) == ("lake", str(folder / "lake.jpg"))
    assert first.changes == {
        "num_frames": 17, "stage2": {"context_size": 2}, "negative_prompt": "no",
    }  # fmt: skip
    assert (second.prompt, second.changes) == ("1984", {})


def test_a_row_wins_over_the_defaults(folder):
    path = write_csv(folder, "image,prompt,id,num_frames,crf", "lake.jpg,a,x,,", "lake.jpg,b,y,9,3")
    defaults = {"num_frames": 33, "crf": 20, "stage2": {"segment_size": 2}}
    first, second = read_rows(path, defaults)
    assert (first.changes["num_frames"], first.crf) == (33, 20)
    assert (second.changes["num_frames"], second.crf) == (9, 3)
    assert second.changes["stage2"] == {"segment_size": 2}


def test_a_seed_follows_from_the_id_alone(folder):
    path = write_csv(folder, "image,prompt,id", "lake.jpg,a,x", "lake.jpg,a,y")
    other = write_jsonl(folder, {"image": "snake.png", "prompt": "b", "id": "y"})
    (x, y), (again,) = read_rows(path, {}), read_rows(other, {})
    assert x.seed != y.seed == again.seed


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        ({"prompt": "a"}, ConfigError, "row 1: .*image: it is missing"),
        ({"image": "lake.jpg"}, ConfigError, "prompt: it is missing"),
        (
            {"image": "gone.jpg", "prompt": "a"},
            InputError,
            "row 1: image .*gone.jpg does not exist",
        ),
        (
            {"image": "lake.jpg", "prompt": "a", "frames": 9},
            ConfigError,
            "frames: there is no such",
        ),
        ({"image": "lake.jpg", "prompt": "a", "num_frames": "many"}, ConfigError, "num_frames"),
        ({"image": "lake.jpg", "prompt": "a", "num_frames": 1}, ConfigError, "num_frames is 1"),
        ({"image": "lake.jpg", "prompt": "a", "codec": "gif"}, ConfigError, "codec"),
        ({"image": "lake.jpg", "prompt": "a", "codec": "png"}, ConfigError, "row 1: codec png"),
        (
            {"image": "lake.jpg", "prompt": "a", "id": "../x"},
            ConfigError,
            "'../x' cannot name a file",
        ),
        ({"image": "lake.jpg", "prompt": "a", "id": "x" * 200}, ConfigError, "cannot name a file"),
        (
            {"image": "lake.jpg", "prompt": "a", "model": "nono"},
            ConfigError,
            "unknown model 'nono'",
        ),
        ({"image": "lake.jpg", "prompt": "a", "seed": "x"}, ConfigError, "seed"),
        ({"image": "lake.jpg", "prompt": "a", "seed": -1}, ConfigError, "seed is -1"),
        (
            {"image": "lake.jpg", "prompt": "a", "motion": "gone.mp4"},
            InputError,
            "motion .*gone.mp4",
        ),
    ],
)
def test_bad_rows_are_refused_by_name(folder, row, error, words):
    with pytest.raises(error, match=words):
        read_rows(write_jsonl(folder, row), {})


def test_ids_that_a_file_system_may_confuse_are_refused(folder):
    rows = [{"image": "lake.jpg", "prompt": "a", "id": id_} for id_ in ("Lake", "lake")]
    with pytest.raises(InputError, match="'Lake' comes 2 times"):
        read_rows(write_jsonl(folder, *rows), {})


def test_tables_that_are_none_are_refused(folder):
    with pytest.raises(InputError, match=r"give \.csv or \.jsonl"):
        read_rows(folder / "clip.mp4", {})
    with pytest.raises(InputError, match="has no rows"):
        read_rows(write_csv(folder, "image,prompt"), {})
    with pytest.raises(InputError, match="more fields than columns"):
        read_rows(write_csv(folder, "image,prompt", "lake.jpg,a,b"), {})
