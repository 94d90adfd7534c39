import os
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.command_line import (
    LOSSLESS,
    copy_model,
    error_line,
    fill_with_nan,
    frames_of,
    generate,
    save_photo,
    succeed,
    swifti2v,
)
from tests.helpers.tiny import SIZE, TEXT_LENGTH


def test_a_prompt_over_the_limit_is_refused_or_cut(model, photo, tmp_path):
    prompt = "a" * TEXT_LENGTH
    run = ("generate", photo, "-o", tmp_path / "out.mp4", "--model", model, "-p", prompt)

    assert f"the limit is {TEXT_LENGTH}" in error_line(swifti2v(*run))
    assert not (tmp_path / "out.mp4").exists()
    succeed(swifti2v(*run, "--truncate-prompt"))


@pytest.mark.parametrize(("stage", "named"), [("stage1", "Stage I "), ("stage2", "segment 0")])
def test_nan_stops_the_run_before_any_video(model, photo, tmp_path, stage, named):
    broken = copy_model(model, tmp_path / "broken")
    fill_with_nan(broken, stage)

    message = error_line(generate(broken, photo, tmp_path / "out.mp4"))

    assert f"{named}" in message
    assert "NaN or infinity at step 1" in message
    assert "no segment was finished" in message
    assert not (tmp_path / "out.mp4").exists()


def test_nan_midway_keeps_the_finished_segments(model, photo, tmp_path):
    broken, work = copy_model(model, tmp_path / "broken"), tmp_path / "work"
    succeed(generate(broken, photo, tmp_path / "whole.mkv", *LOSSLESS, "--work-dir", work))
    fill_with_nan(broken, "stage2")
    (work / "segment_0002.safetensors").unlink()

    output = tmp_path / "out.mkv"
    message = error_line(generate(broken, photo, output, *LOSSLESS, "--work-dir", work, "--resume"))

    assert "Stage II, segment 2 returned NaN" in message
    assert f"2 of 4 segments (9 frames) are kept in {output.resolve()}" in message
    np.testing.assert_array_equal(frames_of(output), frames_of(tmp_path / "whole.mkv")[:9])


def test_a_full_disk_is_one_error_and_keeps_what_fits(model, photo, tmp_path):
    whole, output = tmp_path / "whole.mkv", tmp_path / "out.mkv"
    succeed(generate(model, photo, whole, *LOSSLESS))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole.stat().st_size * 2 // 3, limits[1]))
    try:
        result = generate(model, photo, output, *LOSSLESS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    message = error_line(result)
    assert "failed (File too large)" in message
    assert "2 of 4 segments (9 frames) are kept" in message
    assert len(frames_of(output)) == 9


def test_a_full_disk_under_the_work_dir_is_one_error(model, photo, tmp_path):
    work = tmp_path / "work"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (14_000, limits[1]))  # motion reference alone: 13 kB
    try:
        result = generate(model, photo, tmp_path / "out.mp4", "--work-dir", work)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert "segment_0000.safetensors cannot be written (File too large)" in error_line(result)
    assert sorted(path.name for path in work.iterdir()) == [
        "conditions.safetensors",
        "motion_reference.safetensors",
        "plan.json",
    ]


def bad_image(path: Path, kind: str) -> Path:
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "corrupt":
        save_photo(path, SIZE, SIZE)
        path.write_bytes(path.read_bytes()[:-60])
    elif kind == "text":
        path.write_text("no image")
    elif kind == "animated":
        images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        images[0].save(path, format="GIF", save_all=True, append_images=images[1:])
    elif kind == "giant":
        save_photo(path, 8, 8)
        content = bytearray(path.read_bytes())
        content[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in a PNG's header
        path.write_bytes(content)
    elif kind == "transparent":
        save_photo(path, SIZE, SIZE, "RGBA")
    return path


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "corrupt", "text", "animated", "giant", "transparent"]
)
def test_a_bad_photo_is_one_error_before_the_model_is_loaded(tmp_path, kind):
    photo = bad_image(tmp_path / "bad.png", kind)
    before = sorted(tmp_path.rglob("*"))

    run = generate(Path("nano"), photo, tmp_path / "out.mp4", "--work-dir", tmp_path / "w")

    assert "bad.png" in error_line(run)
    assert "loading" not in run.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--height", 65), "nearest are 64 and 128"),
        (("--width", 96), "nearest are 64 and 128"),
        (
            ("--num-frames", 16),
            "error: --num-frames 16 does not fit: it must be 4k + 1; the nearest",
        ),
        (("--num-frames", 1), "error: --num-frames is 1; it must be at least 5"),
        (("--segment-size", 0), "error: --segment-size is 0"),
        (("--steps", 0), "error: --steps is 0"),
        (("--guidance-scale", -1), "error: --guidance-scale is -1"),
        (("--fps", 0), "error: --fps is 0"),
        (("--height", 65), "error: --height 65 does not fit"),
        (("--set", "height=65"), "error: --height 65 does not fit"),
        (("--set", "fps=0"), "error: --set fps=0: fps is 0"),
        (("--set", "stage2.no_such=1"), "--set stage2.no_such=1: stage2.no_such"),
        (("--set", "fps"), "not of the form"),
        (("--set", "fps=fast"), "fps"),
        (("--config", "no-such.yaml"), "no-such.yaml"),
        (("--model", "no-such-model"), "unknown model"),
        (("--lora", "no-such.safetensors:0.5"), "no-such.safetensors does not exist"),
        (("--lora", "a.safetensors:much"), "is not PATH[:STRENGTH][:partial]"),
        (("--background", "reddish"), "--background 'reddish' is not an opaque colour"),
        (("--background", "#ffff"), "--background '#ffff' is not an opaque colour"),
        (("--background", ""), "--background '' is not an opaque colour"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--device", "toaster"), "toaster"),
        (("--codec", "ffv1"), "ffv1"),
        (("--crf", 99), "error: --crf 99 does not fit; h264 takes 0 (best) to 51"),
        (("-o", "no-such-folder/out.mp4"), "no-such-folder"),
        (("-o", "out.avi"), ".avi"),
        (("--contact-sheet", "no-such-folder/sheet.png"), "no-such-folder"),
        (("--work-dir", "photo.png"), "is a file"),
        (("-o", "photo.png"), "photo.png"),
    ],
)
def test_a_bad_setting_is_one_error_and_nothing_is_written(
    model, photo, tmp_path, monkeypatch, flags, named
):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*")}

    run = generate(model, photo, tmp_path / "out.mp4", "--work-dir", tmp_path / "work", *flags)

    assert named in error_line(run)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_write_permission_is_refused(model, photo, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)

    assert "not writable" in error_line(generate(model, photo, tmp_path / "locked" / "out.mp4"))


@pytest.mark.parametrize(
    "name", ["text_encoder", "stage1/transformer", "stage2/transformer", "stage2/vae"]
)
def test_truncated_weights_are_named(model, photo, tmp_path, name):
    broken = copy_model(model, tmp_path / "broken")
    (file,) = (broken / name).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    assert file.name in error_line(generate(broken, photo, tmp_path / "out.mp4"))
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "photo.png", "-o", "out.mp4"),
        ("generate", "-p", "zoom", "-o", "out.mp4"),
        ("generate", "photo.png", "-p", "zoom", "-o", "out.mp4", "--resume"),
        ("generate", "photo.png", "-p", "zoom", "-o", "out.mp4", "--fit", "stretch"),
        ("generate", "photo.png", "-p", "zoom", "-o", "out.mp4", "--no-such-option"),
        ("compare", "a", "b", "-o", "page", "--seed", "-2"),
        ("refine", "motion.mp4", "-p", "zoom", "-o", "out.mp4"),
        ("no-such-command",),
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    assert swifti2v(*arguments).exit_code == 2


def test_debug_shows_the_traceback(tmp_path):
    run = generate(Path("nano"), tmp_path / "none.png", tmp_path / "out.mp4", "--debug")

    assert run.exit_code == 1
    assert type(run.exception).__name__ == "MediaError"
