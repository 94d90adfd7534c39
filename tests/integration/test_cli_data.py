"""``swifti2v data inspect`` on tiny training sets."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from swifti2v.cli.data import CELL_HEIGHT, CELL_WIDTH, data_app
from tests.helpers import foreign_clips
from tests.helpers.command_line import error_line, succeed
from tests.helpers.training_clips import (
    OPENVID,
    ULTRAVIDEO,
    save_counting_clip,
    save_csv,
    save_damaged_clip,
    save_picture,
)

app = typer.Typer()
app.add_typer(data_app, name="data")
BUCKET, PICTURES = "9x32x48", "1x32x48"


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", "inspect", *map(str, arguments)])


def report_of(*arguments: object) -> Any:
    return json.loads(succeed(inspect(*arguments, "--json")).stdout)


@pytest.fixture
def openvid(tmp_path: Path) -> Path:
    save_counting_clip(tmp_path / "part0" / "long.mp4", 48, fps=32)
    save_counting_clip(tmp_path / "part1" / "short.mp4", 4)
    save_counting_clip(tmp_path / "part1" / "tall.mp4", 16, height=48, width=32)
    rows = [
        {"video": "long.mp4", "caption": "a grey field grows brighter", "fps": "32.0"},
        {"video": "short.mp4", "caption": "brief"},
        {"video": "tall.mp4", "caption": "upright"},
        {"video": "gone.mp4", "caption": "not there"},
    ]
    return save_csv(tmp_path / "OpenVidHD.csv", OPENVID, rows)


def test_openvid(openvid: Path) -> None:
    report = report_of(openvid, "--bucket", BUCKET)
    assert (report["videos"], report["images"], report["fps"]) == (3, 0, 16)
    assert report["buckets"] == [
        {"bucket": BUCKET, "samples": 1, "weight": 1, "seconds": 1.5, "uncaptioned": 0}
    ]
    assert {group["cause"]: group["ids"] for group in report["rejects"]} == {
        "too short": ["short.mp4"], "aspect": ["tall.mp4"], "file not found": ["gone.mp4"],
    }  # fmt: skip
    assert report["captions"]["words"] == {"min": 5, "median": 5, "p95": 5, "max": 5}


def test_ultravideo_with_other_rate_and_root(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for name in ("u1", "u2"):
        save_counting_clip(tmp_path / "clips_short_1" / f"{name}.mp4", 24, fps=24)
    rows = [
        {"clip_id": f"{name}.mp4", "frame_width": 3840, "fps": 24, "start_time": 60,
         "end_time": 61, "Summarized Description": "x"}
        for name in ("u1", "u2", "u3")
    ]  # fmt: skip
    table = save_csv(tmp_path_factory.mktemp("csv") / "short.csv", ULTRAVIDEO, rows)
    result = inspect(table, "--root", tmp_path, "--bucket", BUCKET, "--fps", 12)
    lines = succeed(result).stdout.splitlines()
    assert lines[0] == (
        "2 samples can be trained on (2.0 s of video at 12 fps, 0 with a reference), 1 cannot"
    )
    assert lines[1] == f"bucket {BUCKET}: 2 samples, weight 2, 2.0 s"
    assert "rejected, file not found: 1 (u3.mp4)" in lines
    assert lines[-1] == f"  the first: file not found: no u3.mp4 below {tmp_path}"


def test_clips_without_captions_are_looked_into_as_well(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    save_counting_clip(folder / "fits.mp4", 20)
    save_counting_clip(folder / "short.mp4", 4)
    save_counting_clip(folder / "told.mp4", 20)
    table = tmp_path / "clips.csv"
    table.write_text("video\nfits.mp4\nshort.mp4\n")
    for source in (folder, table):
        result = inspect(source, "--root", folder, "--bucket", BUCKET)
        assert "can be trained on; " in error_of(result)
        num_more = 2 if source == folder else 1
        assert f"0.0 s; {num_more} more if they had a caption" in result.stdout
        assert "rejected, no caption, and too short: 1 (short.mp4)" in result.stdout

    (folder / "told.txt").write_text("counting")
    report = report_of(folder, "--bucket", BUCKET)
    (bucket,) = report["buckets"]
    assert (bucket["samples"], bucket["uncaptioned"]) == (1, 1)
    assert {group["cause"]: group["ids"] for group in report["rejects"]} == {
        "no caption": ["fits.mp4"], "no caption, and too short": ["short.mp4"],
    }  # fmt: skip


def error_of(result: Result) -> str:
    """The error after a report."""
    assert result.exit_code == 1, result.output
    return result.stderr.splitlines()[-1]


def test_a_sheet_shows_every_bucket_and_finds_damage(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for index in range(4):
        save_counting_clip(folder / f"c{index}.mp4", 20)
        (folder / f"c{index}.txt").write_text("counting")
    save_picture(folder / "p.png")
    (folder / "p.txt").write_text("orange")
    save_damaged_clip(folder / "a.mkv")
    (folder / "a.txt").write_text("begins well")
    sheet = tmp_path / "sheet.png"
    options = (folder, "--bucket", BUCKET, "--bucket", PICTURES, "--sheet", sheet)
    report = report_of(*options, "--bucket", "17x32x48")
    assert report["shown"] == ["p.png", "c0.mp4", "c1.mp4", "c2.mp4"]
    assert {each["bucket"]: each["samples"] for each in report["buckets"]} == {
        BUCKET: 0, PICTURES: 1, "17x32x48": 4,
    }  # fmt: skip
    (group,) = report["rejects"]
    assert (group["cause"], group["ids"]) == ("cannot be read", ["a.mkv"])
    with Image.open(sheet) as image:
        assert image.size == (4 * CELL_WIDTH, 4 * CELL_HEIGHT)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    cells = pixels[CELL_HEIGHT // 2 :: CELL_HEIGHT, CELL_WIDTH // 2 :: CELL_WIDTH]  # the centres
    assert cells[0].tolist() == [[200, 100, 50], *([[0, 0, 0]] * 3)]
    for row in cells[1:, :, 0]:  # 16 frames apart in all, 4 levels brighter each
        assert row[-1] - row[0] == pytest.approx(64, abs=4)
        assert (np.diff(row) > 10).all()


def test_nothing_to_train_on_is_an_error_after_the_report(openvid: Path) -> None:
    result = inspect(openvid, "--bucket", "9x320x480")
    assert result.exit_code == 1
    assert "0 samples can be trained on" in result.stdout
    assert "rejected, too small: 2 (long.mp4, short.mp4)" in result.stdout
    assert "error: no sample of" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bucket", "81x704"), "'81x704' is not FRAMESxHEIGHTxWIDTH"),
        (("--fps", "0"), "fps is 0.0"),
        (("--max-crop", "2"), "--max-crop is 2"),
        (("--split", "val"), "has no split 'val'"),
        (("--root", "/nowhere"), "root /nowhere is not a folder"),
        (("--sheet", "sheet.jpg"), "must end in .png"),
        (("--sheet", "/nowhere/sheet.png"), "does not exist or is not writable"),
    ],
)
def test_bad_options_are_refused_before_any_work(openvid, options, message):
    assert message in error_line(inspect(openvid, *options))


def test_a_sheet_never_replaces_a_sample(tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "p.png")
    (tmp_path / "p.txt").write_text("x")
    before = picture.read_bytes()
    result = inspect(tmp_path, "--bucket", PICTURES, "--sheet", picture)
    assert "is a sample; choose another name" in error_line(result)
    assert picture.read_bytes() == before


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    assert "none.csv does not exist" in error_line(inspect(tmp_path / "none.csv"))


def test_changes_to_clips_are_reported(tmp_path: Path) -> None:
    uneven = [0, 33, 67, 100, 200, 233, 267, 300]
    foreign_clips.save(tmp_path / "a.mkv", 8, times=uneven, tick=Fraction(1, 1000))
    foreign_clips.save(tmp_path / "b.mkv", 8, rate=25, pixel_aspect=Fraction(2))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("counting")
    report = report_of(tmp_path, "--bucket", "5x64x96", "--max-crop", 0.5)
    assert {note["cause"]: note["ids"] for note in report["notes"]} == {
        "its frame rate varies": ["a.mkv"],
        "its pixels are not square": ["b.mkv"],
    }
    text = succeed(inspect(tmp_path, "--bucket", "5x64x96", "--max-crop", 0.5)).stdout
    assert "note, its frame rate varies: 1 (a.mkv)" in text
