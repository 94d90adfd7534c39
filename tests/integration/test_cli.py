import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from PIL import Image
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook

from swifti2v import __version__
from swifti2v.jobs.settings import format_color, parse_color
from swifti2v.media import open_writer, read_metadata
from swifti2v.models.transformer import SegmentTransformerBlock
from swifti2v.sampling import SAMPLING_VERSION
from tests.helpers.command_line import (
    LOSSLESS,
    assert_same_frames,
    error_line,
    frames_of,
    generate,
    save_lora,
    save_photo,
    succeed,
    swifti2v,
)
from tests.helpers.tiny import NUM_FRAMES, SIZE, tiny_pipeline


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


@pytest.mark.slow
def test_seed_minus_1_is_random_and_repeated_by_like_and_resume(model, photo, tmp_path):
    first, work = tmp_path / "a.mkv", tmp_path / "work"
    run = ("generate", photo, "-p", "", "--model", model, *LOSSLESS, "--seed", -1)

    succeed(swifti2v(*run, "-o", first, "--work-dir", work))
    succeed(swifti2v("generate", "--like", first, "-o", tmp_path / "like.mkv"))
    succeed(swifti2v(*run, "-o", tmp_path / "go-on.mkv", "--work-dir", work, "--resume"))
    succeed(swifti2v("generate", "--like", first, "-o", tmp_path / "new.mkv", "--seed", -1))

    assert_same_frames(first, tmp_path / "like.mkv")
    assert_same_frames(first, tmp_path / "go-on.mkv")
    seeds = [
        json.loads(succeed(swifti2v("info", path, "--json")).stdout)["seed"]
        for path in (first, tmp_path / "new.mkv")
    ]
    assert seeds[0] != seeds[1]
    assert min(seeds) >= 0
    refused = swifti2v(*run[:-1], -2, "-o", tmp_path / "no.mkv")
    assert refused.exit_code == 2
    assert "give 0 or more, or -1" in refused.stderr


@pytest.mark.parametrize("color", ["white", "White", "#fff", "#ffffff", "ffffff", "FFF"])
def test_a_background_is_a_colour_as_css_writes_it(color):
    assert parse_color(color) == (255, 255, 255)
    assert format_color(parse_color("rebeccapurple")) == "#663399"


def test_a_named_background_is_stored_by_its_digits(model, tmp_path):
    photo = save_photo(tmp_path / "seen-through.png", SIZE, SIZE, "RGBA")
    flags = ("--background", "orange", "--dry-run", "--json")

    plan = json.loads(succeed(generate(model, photo, tmp_path / "out.mp4", *flags)).stdout)

    assert plan["settings"]["background"] == "#ffa500"


def test_fit_is_noted_and_stored(model, tmp_path):
    photo = save_photo(tmp_path / "wide.png", 128, 64)

    result = succeed(generate(model, photo, tmp_path / "out.mp4", "--fit", "pad"))

    assert "padded" in result.stdout.splitlines()[2]
    assert "fit: pad" in succeed(swifti2v("info", tmp_path / "out.mp4")).stdout


@pytest.mark.slow
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


def test_like_of_a_version_that_drew_other_noise_says_so(model, photo, tmp_path):
    first, older = tmp_path / "first.mp4", tmp_path / "older.mp4"
    succeed(generate(model, photo, first))
    values = json.loads(read_metadata(first)["comment"])
    assert values.pop("sampling_version") == SAMPLING_VERSION
    metadata = {"comment": json.dumps(values)}  # as files were before
    with open_writer(older, height=SIZE, width=SIZE, fps=16, metadata=metadata) as writer:
        writer.write(frames_of(first))
    for video, is_told in ((first, False), (older, True)):
        result = succeed(
            swifti2v("generate", "--like", video, "-o", tmp_path / "a.mp4", "--dry-run")
        )
        assert ("drew other noise: the result will differ" in result.stdout) == is_told


@pytest.mark.parametrize(
    ("prompt", "is_doubted"), [("a dog runs", True), ("", True), ("pan left slowly", False)]
)
def test_a_prompt_that_the_small_model_did_not_learn_is_doubted(
    photo, tmp_path, prompt, is_doubted
):
    command = ("generate", photo, "-p", prompt, "-o", tmp_path / "out.mp4", "--dry-run", "--json")
    notes = json.loads(succeed(swifti2v(*command)).stdout)["notes"]
    assert any("pan left, pan right" in note for note in notes) == is_doubted


def test_float32_residual_reaches_the_blocks_of_its_stage(model, photo, tmp_path):
    seen: dict[bool, set[torch.dtype]] = {False: set(), True: set()}  # by "is of Stage II"

    def look(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, WanTransformerBlock):
            seen[isinstance(module, SegmentTransformerBlock)].add(output.dtype)

    hook = register_module_forward_hook(look)
    speed = ("--dtype", "bfloat16", "--set", "stage2.speed.residual=float32")
    succeed(generate(model, photo, tmp_path / "out.mp4", *speed))
    hook.remove()
    assert seen == {False: {torch.bfloat16}, True: {torch.float32}}
    plan = succeed(generate(model, photo, tmp_path / "b.mp4", *speed, "--dry-run", "--json"))
    stages = json.loads(plan.stdout)["settings"]["config"]
    assert [stages[s]["speed"]["residual"] for s in ("stage1", "stage2")] == ["model", "float32"]


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
            "--set", "fps=21", "--set", "stage2.segment_size=3", "--fps", 22, "--width", SIZE,
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


@pytest.mark.slow
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


def test_version_and_doctor():
    assert succeed(swifti2v("--version")).stdout == f"swifti2v {__version__}\n"
    doctor = succeed(swifti2v("doctor")).stdout
    assert torch.__version__ in doctor
    assert "h264" in doctor
    assert "nano model" in doctor
    found = json.loads(succeed(swifti2v("doctor", "--json")).stdout)
    assert found["version"] == __version__
    assert found["libraries"]["torch"] == torch.__version__
    assert 0 < found["cpu"]["free_bytes"] <= found["cpu"]["memory_bytes"]
    assert found["nano"]["problem"] is None
    assert found["nano"]["num_bytes"] > 30e6
