import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.tiny import NUM_FRAMES, SIZE, TEXT_LENGTH, tiny_pipeline
from typer.testing import CliRunner, Result

from swifti2v import __version__
from swifti2v.cli import app
from swifti2v.media import open_writer, read_clip

LOSSLESS = ("--codec", "ffv1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def photo(tmp_path):
    return save_photo(tmp_path / "photo.png", SIZE, SIZE)


def save_photo(path: Path, width: int, height: int, mode: str = "RGB") -> Path:
    ramp = np.linspace(0, 255, width * height * len(mode)).reshape(height, width, len(mode))
    Image.fromarray(ramp.astype(np.uint8), mode).save(path)
    return path


def save_clip(path: Path, num_frames: int, width: int = 16, height: int = 16) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), np.uint8)
    with open_writer(path, height=height, width=width, fps=8, codec="ffv1") as writer:
        writer.write(frames)
    return path


def swifti2v(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def generate(model: Path, photo: Path, output: Path, *more: object) -> Result:
    return swifti2v(
        "generate", photo, "-p", "zoom", "-o", output, "--model", model, "--seed", 7, *more
    )


def succeed(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def error_line(result: Result) -> str:
    """The message of a run that failed as it should."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def frames_of(path: Path) -> Any:
    return read_clip(path).frames


def assert_same_frames(path: Path, other: Path) -> None:
    np.testing.assert_array_equal(frames_of(path), frames_of(other))


def fill_with_nan(model: Path, stage: str) -> None:
    (file,) = (model / stage / "transformer").glob("*.safetensors")
    state = load_file(file)
    state["proj_out.bias"] = torch.full_like(state["proj_out.bias"], torch.nan)
    save_file(state, file)


def copy_model(model: Path, to: Path) -> Path:
    for file in model.rglob("*"):
        if file.is_file():
            target = to / file.relative_to(model)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return to


def test_generate_writes_the_clip_and_says_where(model, photo, tmp_path):
    output = tmp_path / "out.mp4"

    result = succeed(generate(model, photo, output))

    assert frames_of(output).shape == (NUM_FRAMES, SIZE, SIZE, 3)
    path, summary = result.stdout.splitlines()
    assert path == str(output.resolve())
    assert "seed 7" in summary
    assert "segment 4 of 4 done: 4 frames" in result.stderr


def test_generate_gives_the_frames_of_the_pipeline(model, photo, tmp_path):
    output = tmp_path / "out.mkv"

    succeed(generate(model, photo, output, *LOSSLESS))

    expected = tiny_pipeline()(Image.open(photo).convert("RGB"), "zoom", generator=7).frames
    np.testing.assert_array_equal(frames_of(output), expected)


def test_json_is_one_object_with_the_whole_account(model, photo, tmp_path):
    output = tmp_path / "out.mp4"

    result = succeed(generate(model, photo, output, "--json", "--fps", 24))

    report = json.loads(result.stdout)
    seconds, peak = report.pop("seconds"), report.pop("peak_rss_bytes")
    assert [segment.pop("seconds") > 0 for segment in report["segments"]] == [True] * 4
    assert report == {
        "output": str(output.resolve()),
        "width": SIZE,
        "height": SIZE,
        "num_frames": NUM_FRAMES,
        "fps": 24,
        "seed": 7,
        "model": str(model),
        "segments": [{"index": i, "latent_range": [i + 1, i + 2]} for i in range(4)],
        "peak_device_bytes": None,
    }
    stages = ["text", "stage1", "reference", "stage2", "decode"]
    assert list(seconds) == [*stages, "total", "first_segment"]
    assert sum(seconds[stage] for stage in stages) <= seconds["total"] + 0.01
    assert 0 < seconds["first_segment"] < seconds["total"]
    assert 50e6 < peak < 50e9


def test_a_random_seed_is_drawn_printed_and_stored(model, photo, tmp_path):
    seeds = []
    for name in ("a.mp4", "b.mp4"):
        run = swifti2v(
            "generate", photo, "-p", "", "-o", tmp_path / name, "--model", model, "--json"
        )
        seeds.append(json.loads(succeed(run).stdout)["seed"])
        stored = json.loads(succeed(swifti2v("info", tmp_path / name, "--json")).stdout)
        assert stored["seed"] == seeds[-1]
        assert f"seed: {seeds[-1]}" in run.stderr

    assert seeds[0] != seeds[1]


def test_fit_is_noted_and_stored(model, tmp_path):
    photo = save_photo(tmp_path / "wide.png", 128, 64)

    result = succeed(generate(model, photo, tmp_path / "out.mp4", "--fit", "pad"))

    assert "padded" in result.stdout.splitlines()[2]
    assert "fit: pad" in succeed(swifti2v("info", tmp_path / "out.mp4")).stdout


def test_like_repeats_a_video_exactly_and_flags_win(model, tmp_path):
    photo = save_photo(tmp_path / "seen-through.png", 96, 80, "RGBA")
    first, again, other = (tmp_path / name for name in ("a.mkv", "b.mkv", "c.mkv"))
    lora = save_lora(tmp_path / "lora.safetensors")
    succeed(
        generate(
            model, photo, first, *LOSSLESS, "--fit", "pad", "--background", "#336699",
            "--steps", 3, "--lora", f"stage2={lora}:0.5", "--set", "stage2.clean_sigma=target",
        )
    )  # fmt: skip

    succeed(swifti2v("generate", "--like", first, "-o", again))
    succeed(swifti2v("generate", "--like", first, "-o", other, "--seed", 8, "-p", "pan"))

    assert_same_frames(first, again)
    settings = [
        json.loads(swifti2v("info", path, "--json").stdout) for path in (first, again, other)
    ]
    assert settings[1] == settings[0]
    assert settings[2] == {**settings[0], "seed": 8, "prompt": "pan"}
    assert (frames_of(first) != frames_of(other)).any()


def test_like_refuses_a_photo_that_has_changed(model, photo, tmp_path):
    succeed(generate(model, photo, tmp_path / "out.mp4"))
    save_photo(photo, 70, 70)

    run = swifti2v("generate", "--like", tmp_path / "out.mp4", "-o", tmp_path / "again.mp4")

    assert "has changed" in error_line(run)
    assert not (tmp_path / "again.mp4").exists()


def test_a_video_without_settings_is_named(model, photo, tmp_path):
    output = tmp_path / "out.mp4"
    succeed(generate(model, photo, output, "--no-metadata"))

    assert "carries no settings" in error_line(swifti2v("info", output))
    assert "carries no settings" in error_line(
        swifti2v("generate", "--like", output, "-o", tmp_path / "again.mp4")
    )


def test_flags_beat_set_beats_config_beats_the_model(model, photo, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("fps: 20\nheight: 128\nstage2: {segment_size: 2, context_size: 0}\n")

    result = succeed(
        generate(
            model, photo, tmp_path / "out.mp4", "--dry-run", "--json", "--config", file,
            "--set", "fps=21", "--set", "stage2.segment_size=3", "--fps", 22,
        )
    )  # fmt: skip

    plan = json.loads(result.stdout)
    config = plan["settings"]["config"]
    assert (config["fps"], config["stage2"]["segment_size"]) == (22, 3)
    assert (config["height"], config["width"], config["num_frames"]) == (128, SIZE, NUM_FRAMES)
    assert config["stage2"]["context_size"] == 0
    assert plan["segments"] == [[1, 4], [4, 5]]
    assert plan["sizes"]["motion_reference"] == [16, 32]


def test_dry_run_writes_nothing(model, photo, tmp_path):
    before = sorted(tmp_path.rglob("*"))

    result = succeed(
        generate(model, photo, tmp_path / "out.mp4", "--dry-run", "--work-dir", tmp_path / "work")
    )

    assert "segment_size: 1" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_contact_sheet_shows_frames_of_the_clip(model, photo, tmp_path):
    sheet = tmp_path / "sheet.png"

    succeed(generate(model, photo, tmp_path / "out.mkv", *LOSSLESS, "--contact-sheet", sheet))

    frames = frames_of(tmp_path / "out.mkv")
    shown = np.asarray(Image.open(sheet))
    np.testing.assert_array_equal(shown[:SIZE, :SIZE], frames[0])
    np.testing.assert_array_equal(shown[-SIZE:, -SIZE:], frames[-1])


def save_lora(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    name = "transformer.blocks.0.attn1.to_q"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(2, 24, generator=generator),
        f"{name}.lora_B.weight": torch.randn(24, 2, generator=generator),
    }
    save_file(tensors, path)
    return path


def test_loras_reach_the_stage_they_are_meant_for(model, photo, tmp_path):
    lora = save_lora(tmp_path / "lora.safetensors")
    results = {}
    for name, flags in {
        "none": (),
        "zero": ("--lora", f"{lora}:0"),
        "first": ("--lora", f"{lora}:2"),
        "second": ("--lora", f"stage2={lora}:2"),
    }.items():
        work = tmp_path / name
        run = generate(
            model, photo, tmp_path / f"{name}.mkv", *LOSSLESS, *flags, "--work-dir", work
        )
        succeed(run)
        motion = load_file(work / "motion_reference.safetensors")["tensor"]
        results[name] = motion, frames_of(tmp_path / f"{name}.mkv")

    def differs(name: str) -> tuple[bool, bool]:
        motion, frames = results[name]
        return not motion.equal(results["none"][0]), bool((frames != results["none"][1]).any())

    assert differs("zero") == (False, False)
    assert differs("first") == (True, True)
    assert differs("second") == (False, True)


def test_a_prompt_over_the_limit_is_refused_or_cut(model, photo, tmp_path):
    prompt = "a" * TEXT_LENGTH
    run = ("generate", photo, "-o", tmp_path / "out.mp4", "--model", model, "-p", prompt)

    assert f"the limit is {TEXT_LENGTH}" in error_line(swifti2v(*run))
    assert not (tmp_path / "out.mp4").exists()
    succeed(swifti2v(*run, "--truncate-prompt"))


@pytest.mark.parametrize("num_finished", range(5))
def test_a_resumed_run_gives_the_same_video(model, photo, tmp_path, num_finished):
    whole, resumed, work = tmp_path / "whole.mkv", tmp_path / "resumed.mkv", tmp_path / "work"
    succeed(generate(model, photo, whole, *LOSSLESS, "--work-dir", work))
    for file in sorted(work.glob("segment_*"))[num_finished:]:
        file.unlink()
    (work / "segment_0003.safetensors.writing").write_bytes(b"half")
    if num_finished == 0:
        (work / "motion_reference.safetensors").unlink()

    result = succeed(
        generate(model, photo, resumed, *LOSSLESS, "--work-dir", work, "--resume", "--json")
    )

    assert_same_frames(resumed, whole)
    assert len(json.loads(result.stdout)["segments"]) == 4
    assert sorted(file.name for file in work.iterdir()) == [
        "motion_reference.safetensors",
        "plan.json",
        *(f"segment_{index:04d}.safetensors" for index in range(4)),
    ]


def test_a_damaged_segment_is_made_again_with_a_note(model, photo, tmp_path):
    whole, work = tmp_path / "whole.mkv", tmp_path / "work"
    succeed(generate(model, photo, whole, *LOSSLESS, "--work-dir", work))
    damaged = work / "segment_0001.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-7])

    result = succeed(
        generate(model, photo, tmp_path / "b.mkv", *LOSSLESS, "--work-dir", work, "--resume")
    )

    assert "segment_0001.safetensors is damaged" in result.stderr
    assert damaged.read_bytes() == content
    assert_same_frames(tmp_path / "b.mkv", whole)


def test_resume_takes_the_seed_of_the_run(model, photo, tmp_path):
    work = tmp_path / "work"
    run = ("generate", photo, "-p", "zoom", "--model", model, "--work-dir", work, "--json")
    first = succeed(swifti2v(*run, "-o", tmp_path / "a.mp4"))

    again = succeed(swifti2v(*run, "-o", tmp_path / "b.mp4", "--resume"))

    assert json.loads(again.stdout)["seed"] == json.loads(first.stdout)["seed"]


def test_a_work_dir_is_refused_where_it_is_of_another_run(model, photo, tmp_path):
    work, output = tmp_path / "work", tmp_path / "out.mp4"
    succeed(generate(model, photo, output, "--work-dir", work))
    output.unlink()

    resume = ("--work-dir", work, "--resume")
    assert "--resume" in error_line(generate(model, photo, output, "--work-dir", work))
    assert "seed is 7" in error_line(generate(model, photo, output, *resume, "--seed", 8))
    assert "config.stage2.context_size is 1" in error_line(
        generate(model, photo, output, *resume, "--context-size", 0)
    )
    save_photo(photo, 70, 70)
    assert "image.sha256" in error_line(generate(model, photo, output, *resume))
    assert not output.exists()


def start_process(model: Path, photo: Path, output: Path, work: Path) -> subprocess.Popen[str]:
    """A run with steps enough to be met in the middle."""
    arguments = ["generate", photo, "-p", "zoom", "-o", output, "--model", model, "--seed", 7]
    arguments += [*LOSSLESS, "--steps", 100, "--work-dir", work]
    command = [sys.executable, "-c", "from swifti2v.cli import app; app()", *map(str, arguments)]
    process = subprocess.Popen(command, text=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (work / "segment_0000.safetensors").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_process_is_continued_to_the_same_video(model, photo, tmp_path, number):
    output, work = tmp_path / "out.mkv", tmp_path / "work"
    process = start_process(model, photo, output, work)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)

    assert not (work / "segment_0003.safetensors").exists()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        kept = int(errors.split("interrupted: ")[1].split(" of 4 segments")[0])
        assert len(frames_of(output)) == 4 * kept + 1
    more = (*LOSSLESS, "--steps", 100)
    succeed(generate(model, photo, output, *more, "--work-dir", work, "--resume"))
    succeed(generate(model, photo, tmp_path / "whole.mkv", *more))
    assert_same_frames(output, tmp_path / "whole.mkv")


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

    run = generate(Path("no-such-model"), photo, tmp_path / "out.mp4", "--work-dir", tmp_path / "w")

    assert "bad.png" in error_line(run)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--height", 65), "nearest are 64 and 80"),
        (("--width", 96), "nearest are 64 and 128"),
        (("--num-frames", 16), "nearest are 13 and 17"),
        (("--num-frames", 1), "num_frames is 1"),
        (("--segment-size", 0), "command line: stage2.segment_size is 0"),
        (("--set", "stage2.no_such=1"), "--set stage2.no_such=1: stage2.no_such"),
        (("--set", "fps"), "not of the form"),
        (("--set", "fps=fast"), "fps"),
        (("--config", "no-such.yaml"), "no-such.yaml"),
        (("--model", "no-such-model"), "unknown model"),
        (("--lora", "no-such.safetensors:0.5"), "no-such.safetensors does not exist"),
        (("--lora", "a.safetensors:much"), "PATH:STRENGTH"),
        (("--background", "red"), "#rrggbb"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--device", "toaster"), "toaster"),
        (("--codec", "ffv1"), "ffv1"),
        (("--crf", 99), "crf 99"),
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


def refine(model: Path, motion: Path, photo: Path, output: Path, *more: object) -> Result:
    return swifti2v(
        "refine", motion, "--image", photo, "-p", "zoom", "-o", output, "--model", model,
        "--seed", 7, *more,
    )  # fmt: skip


def test_refine_takes_length_size_and_rate_from_the_clip(model, photo, tmp_path):
    motion, output = save_clip(tmp_path / "motion.mkv", 13), tmp_path / "out.mkv"

    result = succeed(refine(model, motion, photo, output, *LOSSLESS, "--json"))

    report = json.loads(result.stdout)
    assert (report["num_frames"], report["width"], report["fps"]) == (13, SIZE, 8)
    assert report["seconds"]["stage1"] == 0
    pipe = tiny_pipeline()
    image = Image.open(photo).convert("RGB")
    pieces = pipe.refine(frames_of(motion), image, "zoom", generator=7)
    expected = np.concatenate([piece.frames for piece in pieces])
    np.testing.assert_array_equal(frames_of(output), expected)


def test_refine_takes_the_first_frames_of_a_clip_that_does_not_fit(model, photo, tmp_path):
    motion, output = save_clip(tmp_path / "motion.mkv", 12), tmp_path / "out.mp4"

    message = error_line(refine(model, motion, photo, output))
    assert "nearest are 9 and 13" in message
    assert "--num-frames 9" in message

    succeed(refine(model, motion, photo, output, "--num-frames", 9))
    assert len(frames_of(output)) == 9


def test_refine_resumes(model, photo, tmp_path):
    motion, work = save_clip(tmp_path / "motion.mkv", 13), tmp_path / "work"
    whole, again = tmp_path / "a.mkv", tmp_path / "b.mkv"
    succeed(refine(model, motion, photo, whole, *LOSSLESS, "--work-dir", work))
    (work / "segment_0001.safetensors").unlink()

    succeed(refine(model, motion, photo, again, *LOSSLESS, "--work-dir", work, "--resume"))

    assert_same_frames(again, whole)
    save_clip(motion, 13, width=32, height=32)
    more = ("--height", SIZE, "--width", SIZE, "--work-dir", work, "--resume")
    assert "motion.sha256" in error_line(refine(model, motion, photo, again, *LOSSLESS, *more))


@pytest.mark.parametrize(
    ("num_frames", "width", "flags", "named"),
    [
        (1, 16, (), "1 frame(s)"),
        (13, 32, ("--height", SIZE, "--width", SIZE), "the aspects differ"),
        (13, 18, (), "nearest are 64 and 80; the motion clip is 18x16: crop it"),
        (9, 16, ("--num-frames", 13), "fewer than the 13"),
    ],
)
def test_refine_refuses_a_clip_that_does_not_fit(
    model, photo, tmp_path, num_frames, width, flags, named
):
    motion = save_clip(tmp_path / "motion.mkv", num_frames, width)

    assert named in error_line(refine(model, motion, photo, tmp_path / "out.mp4", *flags))
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("content", [None, b"", b"no clip"])
def test_refine_refuses_a_clip_that_cannot_be_read(model, photo, tmp_path, content):
    motion = tmp_path / "motion.mp4"
    if content is not None:
        motion.write_bytes(content)

    assert "motion.mp4" in error_line(refine(model, motion, photo, tmp_path / "out.mp4"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "photo.png", "-o", "out.mp4"),
        ("generate", "-p", "zoom", "-o", "out.mp4"),
        ("generate", "photo.png", "-p", "zoom", "-o", "out.mp4", "--resume"),
        ("generate", "photo.png", "-p", "zoom", "-o", "out.mp4", "--fit", "stretch"),
        ("generate", "photo.png", "-p", "zoom", "-o", "out.mp4", "--no-such-option"),
        ("refine", "motion.mp4", "-p", "zoom", "-o", "out.mp4"),
        ("no-such-command",),
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    assert swifti2v(*arguments).exit_code == 2


def test_version_and_doctor():
    assert succeed(swifti2v("--version")).stdout == f"swifti2v {__version__}\n"
    doctor = succeed(swifti2v("doctor")).stdout
    assert torch.__version__ in doctor
    assert "h264" in doctor
    assert "nano model" in doctor


def test_debug_shows_the_traceback(tmp_path):
    run = generate(Path("none"), tmp_path / "none.png", tmp_path / "out.mp4", "--debug")

    assert run.exit_code == 1
    assert type(run.exception).__name__ == "MediaError"
