"""A run is repeated or continued from anywhere: its files are looked for beside what it wrote."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.helpers.command_line import (
    LOSSLESS,
    assert_same_frames,
    error_line,
    save_clip,
    save_lora,
    save_photo,
    succeed,
    swifti2v,
)
from tests.helpers.tiny import NUM_FRAMES, SIZE


@pytest.fixture
def project(model, tmp_path, monkeypatch):
    """A folder with a photo, a LoRA and an own preset, from which a run is started."""
    folder = tmp_path / "project"
    (folder / "in").mkdir(parents=True)
    save_photo(folder / "in/photo.png", SIZE, SIZE)
    save_lora(folder / "in/lora.safetensors")
    save_clip(folder / "in/clip.mkv", NUM_FRAMES)
    index = json.loads((model / "model_index.json").read_text())
    for source in index["components"].values():
        source["source"] = str(model)
    own = {key: value for key, value in index.items() if key[0] != "_"}
    (folder / "own.yaml").write_text(yaml.safe_dump(own))
    (folder / "faster.yaml").write_text("fps: 12\n")
    monkeypatch.chdir(folder)
    return folder


RUN = ("-p", "zoom", "--seed", 7, "--model", "own.yaml", "--lora", "in/lora.safetensors", *LOSSLESS)


def generate_first(*more: object) -> None:
    Path("out").mkdir()
    succeed(swifti2v("generate", "in/photo.png", "-o", "out/a.mkv", *RUN, *more))


@pytest.mark.slow
def test_like_finds_the_files_of_a_run_from_another_folder(project, tmp_path, monkeypatch):
    generate_first()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "in").mkdir(parents=True)
    save_photo(elsewhere / "in/photo.png", SIZE, 2 * SIZE)  # of that name, but another one
    monkeypatch.chdir(elsewhere)
    succeed(swifti2v("generate", "--like", project / "out/a.mkv", "-o", "b.mkv"))
    assert_same_frames(elsewhere / "b.mkv", project / "out/a.mkv")
    stored = json.loads(succeed(swifti2v("info", "b.mkv", "--json")).stdout)
    assert stored["image"]["path"] == str(project / "in/photo.png")


@pytest.mark.slow
def test_like_finds_files_that_moved_along_with_the_video(project, tmp_path, monkeypatch):
    generate_first()
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in ("out/a.mkv", "in/photo.png", "in/lora.safetensors", "own.yaml"):
        shutil.move(project / file, moved)
    monkeypatch.chdir(tmp_path)
    succeed(swifti2v("generate", "--like", "moved/a.mkv", "-o", "b.mkv"))
    assert_same_frames(tmp_path / "b.mkv", moved / "a.mkv")


@pytest.mark.parametrize("changed", ["in/photo.png", "in/lora.safetensors", "own.yaml"])
def test_a_file_of_another_content_is_not_taken_and_the_places_are_listed(
    project, tmp_path, monkeypatch, changed
):
    generate_first()
    file = project / changed
    file.write_bytes(file.read_bytes() + b"\n")
    monkeypatch.chdir(tmp_path)
    message = error_line(swifti2v("generate", "--like", project / "out/a.mkv", "-o", "b.mkv"))
    assert f"{changed} is not found" in message
    assert f"{project / changed} (has changed since, or is another file)" in message
    assert str(project / "out" / changed) in message
    assert not Path("b.mkv").exists()


def test_resume_finds_the_files_of_the_run_from_another_folder(project, tmp_path, monkeypatch):
    generate_first("--work-dir", "work", "--config", "faster.yaml")
    (project / "work/segment_0003.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    command = ("generate", "in/photo.png", "-o", "b.mkv", *RUN, "--work-dir", project / "work")
    more = ("--config", "faster.yaml", "--resume")
    succeed(swifti2v(*command, *more))
    assert_same_frames(tmp_path / "b.mkv", project / "out/a.mkv")

    save_photo(project / "in/photo.png", 2 * SIZE, SIZE)
    message = error_line(swifti2v(*command, *more))
    assert "in/photo.png does not exist, nor one that the run was made with" in message
    assert str(project / "in/photo.png") in message


def test_refine_like_finds_clip_and_photo(project, tmp_path, monkeypatch):
    model = ("--model", "own.yaml", "--seed", 7, *LOSSLESS)
    succeed(
        swifti2v(
            "refine", "in/clip.mkv", "--image", "in/photo.png", "-p", "", "-o", "a.mkv", *model
        )
    )
    monkeypatch.chdir(tmp_path)
    succeed(swifti2v("refine", "--like", project / "a.mkv", "-o", "b.mkv"))
    assert_same_frames(tmp_path / "b.mkv", project / "a.mkv")
    (project / "in/clip.mkv").unlink()
    assert "clip.mkv is not found" in error_line(
        swifti2v("refine", "--like", project / "a.mkv", "-o", "c.mkv")
    )


@pytest.mark.slow
def test_the_variant_of_a_preset_is_repeated_and_a_run_continues_with_no_other(
    project, tmp_path, monkeypatch
):
    text = yaml.safe_load((project / "own.yaml").read_text())
    transformer = text["components"]["stage1_transformer"]
    transformer["variants"] = {"copy": {**transformer, "source": transformer["source"]}}
    (project / "own.yaml").write_text(yaml.safe_dump(text))
    own = [word if word != "own.yaml" else "own.yaml:copy" for word in RUN]
    Path("out").mkdir()
    again = ("generate", "in/photo.png", "-o", "out/a.mkv", "--work-dir", "work")
    succeed(swifti2v(*again, *own))
    message = error_line(swifti2v(*again, *RUN, "--resume"))
    assert "variant" in message
    monkeypatch.chdir(tmp_path)
    succeed(swifti2v("generate", "--like", project / "out/a.mkv", "-o", "b.mkv"))
    stored = json.loads(succeed(swifti2v("info", "b.mkv", "--json")).stdout)
    assert stored["model"].endswith("own.yaml:copy")
