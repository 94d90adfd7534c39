"""File names and prompts in other encodings, and outputs without a suffix."""

import json
import os
from pathlib import Path

import pytest

from tests.helpers.command_line import (
    assert_same_frames,
    error_line,
    frames_of,
    generate,
    refine,
    save_clip,
    save_lora,
    save_photo,
    succeed,
    swifti2v,
)
from tests.helpers.tiny import SIZE

LATIN_1 = "Caf\udce9"
"""Name as Python holds one whose bytes are Latin-1."""
SHORT = ("--num-frames", 5)


def test_photos_and_videos_may_have_names_in_any_encoding(model, tmp_path):
    photo = save_photo(tmp_path / f"{LATIN_1}.png", SIZE, SIZE)
    output, sheet = tmp_path / f"out {LATIN_1}.mp4", tmp_path / f"{LATIN_1} sheet.png"

    result = succeed(generate(model, photo, output, *SHORT, "--contact-sheet", sheet))

    assert result.stdout_bytes.splitlines()[0] == os.fsencode(output)
    assert sheet.is_file()
    stored = json.loads(succeed(swifti2v("info", output, "--json")).stdout)
    assert stored["image"]["path"] == str(photo)
    again = tmp_path / "again.mp4"
    report = json.loads(
        succeed(swifti2v("generate", "--like", output, "-o", again, "--json")).stdout
    )
    assert report["output"] == str(again)
    assert_same_frames(again, output)


@pytest.mark.slow
def test_clips_may_have_names_in_any_encoding(model, photo, tmp_path):
    motion = save_clip(tmp_path / f"{LATIN_1}.mkv", 5)
    clips = [tmp_path / "a.mp4", tmp_path / f"{LATIN_1}.mp4"]
    for clip in clips:
        succeed(refine(model, motion, photo, clip))
    folder = tmp_path / f"report {LATIN_1}"
    values = json.loads(succeed(swifti2v("evaluate", motion, "-o", folder, "--json")).stdout)
    assert values["video"] == str(motion)
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["video"] == str(motion)
    assert "Caf\\udce9" in (folder / "metrics.csv").read_text(encoding="utf-8")
    page = succeed(swifti2v("compare", *clips, "-o", tmp_path / "page"))
    assert "index.html" in page.stdout


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--prompt", "the prompt 'caf\\udce9' is not UTF-8: type it in a UTF-8 terminal"),
        ("--negative-prompt", "the prompt 'caf\\udce9' is not UTF-8"),
        ("--work-dir", "--work-dir caf"),
        ("--lora", "--lora caf"),
    ],
)
def test_texts_and_weights_in_another_encoding_are_refused_before_any_work(
    model, photo, tmp_path, monkeypatch, flag, named
):
    monkeypatch.chdir(tmp_path)
    save_lora(tmp_path / "lora.safetensors").rename(tmp_path / "caf\udce9")
    message = error_line(generate(model, photo, Path("out.mp4"), *SHORT, flag, "caf\udce9"))
    assert named in message
    assert not (tmp_path / "out.mp4").exists()


def test_the_longest_names_can_be_written(model, photo, tmp_path):
    output = tmp_path / f"{'a' * 251}.mp4"
    sheet = tmp_path / f"{'b' * 251}.png"
    succeed(generate(model, photo, output, *SHORT, "--contact-sheet", sheet))
    assert len(frames_of(output)) == 5
    too_long = error_line(generate(model, photo, tmp_path / f"{'a' * 252}.mp4", *SHORT))
    assert "File name too long" in too_long


def test_pngs_are_written_into_a_folder_where_they_are_asked_for(model, photo, tmp_path):
    folder = tmp_path / "frames"
    message = error_line(generate(model, photo, folder, *SHORT))
    assert "frames has no suffix; name a video, such as frames.mp4, or give --codec png" in message
    assert "leave crf" in error_line(
        generate(model, photo, folder, *SHORT, "--codec", "png", "--crf", 9)
    )
    assert not folder.exists()

    succeed(generate(model, photo, folder, *SHORT, "--codec", "png"))
    assert len(list(folder.glob("*.png"))) == 5
    again = tmp_path / "again"
    succeed(swifti2v("generate", "--like", folder, "-o", again))
    assert sorted(path.read_bytes() for path in again.iterdir()) == sorted(
        path.read_bytes() for path in folder.iterdir()
    )
    as_video = error_line(swifti2v("generate", "--like", folder, "-o", tmp_path / "a.mp4"))
    assert "with codec png give a folder" in as_video
