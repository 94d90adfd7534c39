import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import Result

from swifti2v.media import read_clip
from swifti2v.models.lora.provenance import RECIPE, RELAY1
from swifti2v.pipelines.upscale import upscale
from tests.helpers import foreign_clips
from tests.helpers.command_line import (
    LOSSLESS,
    assert_same_frames,
    error_line,
    frames_of,
    save_clip,
    save_lora,
    succeed,
    swifti2v,
)
from tests.helpers.tiny import SIZE, tiny_pipeline

CARRIED = ("--set", "stage2.reference_detail=carried")
GCLF = ("--attention", "gclf", "--set", "stage2.attention.window=[1, 1]")


def run(model: Path, clip: Path, output: Path, *more: object) -> Result:
    return swifti2v("upscale", clip, "-o", output, "--model", model, "--seed", 7, *LOSSLESS, *more)


@pytest.fixture
def clip(tmp_path):
    return save_clip(tmp_path / "clip.mkv", 13)


def test_upscale_needs_a_clip_alone_and_makes_it_four_times_larger(model, clip, tmp_path):
    output = tmp_path / "out.mkv"

    report = json.loads(succeed(run(model, clip, output, "--json")).stdout)

    assert (report["num_frames"], report["width"], report["fps"]) == (13, SIZE, 8)
    assert report["seconds"]["stage1"] == 0
    assert report["segments"][0]["latent_range"] == [0, 2]
    pieces = upscale(tiny_pipeline(), frames_of(clip), generator=7)
    expected = np.concatenate([piece.frames for piece in pieces])
    np.testing.assert_array_equal(frames_of(output), expected)


def test_without_a_photo_there_is_no_detail_to_carry(model, clip, tmp_path):
    line = error_line(run(model, clip, tmp_path / "a.mkv", *CARRIED))
    assert "stage2.anchor is generated" in line
    assert "set stage2.reference_detail=none" in line


@pytest.mark.slow
def test_all_at_once_gives_another_clip_in_one_segment(model, clip, tmp_path):
    streamed, whole = tmp_path / "a.mkv", tmp_path / "b.mkv"
    succeed(run(model, clip, streamed))

    report = json.loads(succeed(run(model, clip, whole, "--windows", "none", "--json")).stdout)

    assert [segment["latent_range"] for segment in report["segments"]] == [[0, 4]]
    assert frames_of(whole).shape == frames_of(streamed).shape
    assert (frames_of(whole) != frames_of(streamed)).any()


@pytest.mark.slow
def test_options_reach_the_settings_and_the_video_repeats_them(model, clip, tmp_path):
    first, again = tmp_path / "a.mkv", tmp_path / "b.mkv"
    more = ("--strength", 0.4, "--windows", "none", *GCLF, "-p", "a dog")
    plan = json.loads(succeed(run(model, clip, first, *more, "--dry-run", "--json")).stdout)
    stage2 = plan["settings"]["config"]["stage2"]
    assert stage2["sampling"]["strength"] == 0.4
    assert (stage2["segment_size"], stage2["anchor"]) == (None, "generated")
    assert (stage2["attention"]["kind"], stage2["attention"]["window"]) == ("gclf", [1, 1])
    assert plan["settings"]["prompt"] == "a dog"
    succeed(run(model, clip, first, *more))

    succeed(swifti2v("upscale", clip, "-o", again, "--like", first))

    assert_same_frames(first, again)
    clip_again = save_clip(tmp_path / "other.mkv", 13)
    clip_again.write_bytes(clip_again.read_bytes() + b"\0")
    told = swifti2v("upscale", clip_again, "-o", tmp_path / "c.mkv", "--like", first, *LOSSLESS)
    assert "the clip differs from that of" in succeed(told).output


def test_a_lora_goes_to_stage_two(model, clip, tmp_path):
    plain, changed = tmp_path / "a.mkv", tmp_path / "b.mkv"
    lora = save_lora(tmp_path / "lora.safetensors")
    succeed(run(model, clip, plain))
    succeed(run(model, clip, changed, "--lora", lora))
    assert (frames_of(plain) != frames_of(changed)).any()
    info = json.loads(succeed(swifti2v("info", changed, "--json")).stdout)
    assert [record["stage"] for record in info["loras"]] == ["stage2"]


def test_a_stopped_run_goes_on(model, clip, tmp_path):
    work, whole, again = tmp_path / "work", tmp_path / "a.mkv", tmp_path / "b.mkv"
    succeed(run(model, clip, whole, "--work-dir", work))
    (work / "segment_0001.safetensors").unlink()

    succeed(run(model, clip, again, "--work-dir", work, "--resume"))

    assert_same_frames(whole, again)


def test_a_clip_of_another_aspect_is_cropped_and_it_is_said(model, tmp_path):
    clip, output = save_clip(tmp_path / "wide.mkv", 13, width=24), tmp_path / "out.mkv"
    result = succeed(run(model, clip, output, "--height", SIZE, "--width", SIZE))
    assert "the clip of 24x16 is cropped to 16x16" in result.stdout
    cropped = frames_of(clip)[:, :, 4:20]
    expected = np.concatenate([s.frames for s in upscale(tiny_pipeline(), cropped, generator=7)])
    np.testing.assert_array_equal(frames_of(output), expected)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--strength", 0), "strength is 0; it must be above 0 and at most 1"),
        (("--strength", 1.5), "strength is 1.5; it must be above 0 and at most 1"),
        (("--strength", -0.5), "strength is -0.5"),
        (("--strength", "nan"), "strength is nan"),
        ((*GCLF, "--height", 48), "must be a multiple of 32; the nearest are 32 and 64"),
        ((*GCLF, "--set", "stage2.attention.pool=3"), "of 48; the nearest are 48 and 96"),
        (("--set", "stage2.attention.pool=1"), "stage2.attention.pool is 1; it must be between"),
        (("--width", 70), "width 70 does not fit"),
        (("--height", 1024, "--width", 16), "no part of it has the output's aspect of 1:64"),
        (("--num-frames", 12), "nearest are 9 and 13"),
        (("--lora", "missing.safetensors"), "missing.safetensors does not exist"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(model, clip, tmp_path, flags, named):
    assert named in error_line(run(model, clip, tmp_path / "out.mkv", *flags))
    assert not (tmp_path / "out.mkv").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--fit", "pad"), "only photos are padded"),
        (("--windows", "none", "--segment-size", 2), "leave one of the two out"),
        (("--resume",), "--resume needs --work-dir"),
    ],
)
def test_options_that_contradict_each_other_are_usage_errors(model, clip, tmp_path, flags, named):
    result = run(model, clip, tmp_path / "out.mkv", *flags)
    assert result.exit_code == 2
    assert named in " ".join(result.output.replace("│", " ").split())


def test_a_lora_that_does_not_belong_here_is_refused(model, clip, tmp_path):
    path, down, up = tmp_path / "lora.safetensors", "blocks.0.attn1.to_q.lora_A.weight", None
    up = down.replace("lora_A", "lora_B")
    wide = {down: torch.zeros(2, 48), up: torch.zeros(48, 2)}
    ranks = {down: torch.zeros(2, 24), up: torch.zeros(24, 3)}
    fits = {down: torch.zeros(2, 24), up: torch.zeros(24, 2)}
    for tensors, metadata, named in (
        (wide, {}, "does not fit blocks.0.attn1.to_q.weight (24, 24)"),
        (ranks, {}, "does not fit blocks.0.attn1.to_q.weight (24, 24)"),
        (fits, {RECIPE: RELAY1}, "the first LoRA of a relay"),
        (fits, {"swifti2v_base_sha256": "0" * 64}, "load the model it was trained on"),
    ):
        save_file(tensors, path, metadata)
        assert named in error_line(run(model, clip, tmp_path / "out.mkv", "--lora", path))


def plan(model: Path, clip: Path, *more: object) -> dict[str, Any]:
    result = run(model, clip, clip.with_name("out.mkv"), "--dry-run", "--json", *more)
    return dict(json.loads(succeed(result).stdout))


def test_a_varying_rate_keeps_its_time_and_it_is_said(model, tmp_path):
    times = [50 * i for i in range(9)] + [450 + 200 * i for i in range(8)]
    path = foreign_clips.save(tmp_path / "a.mkv", times=times, tick=Fraction(1, 1000))
    clip = read_clip(path)
    whole = (len(clip.frames) - 1) // 4 * 4 + 1
    planned = plan(model, path, "--num-frames", whole)
    assert planned["settings"]["config"]["fps"] == clip.fps == 20
    assert "a.mkv: its frame rate varies" in planned["notes"][0]
    slower = plan(model, path, "--fps", 10, "--num-frames", 17)
    assert slower["settings"]["config"]["fps"] == 10
    assert "resampled to 10: frames are left out" in slower["notes"][1]


def test_a_longer_sound_or_other_pixels_do_not_matter(model, tmp_path):
    path = foreign_clips.save(
        tmp_path / "a.mkv", sound_seconds=2, pixel_aspect=Fraction(2), rate=Fraction(30000, 1001)
    )
    planned = plan(model, path)
    config = planned["settings"]["config"]
    assert (config["num_frames"], config["width"], config["height"]) == (17, 4 * 192, 4 * 64)
    assert config["fps"] == 30000 / 1001
    assert "96x64 is enlarged to 192x64" in planned["notes"][0]


def test_a_see_through_clip_needs_a_background_and_repeats_with_it(model, tmp_path):
    frames = np.full((5, 16, 16, 4), 90, np.uint8)
    frames[1::2, :, :8, 0] = 255  # what is hidden flickers
    frames[..., 3] = 255
    frames[:, :, :8, 3] = 0
    path = foreign_clips.save(tmp_path / "a.mov", frames=frames, codec="qtrle", pixel_format="argb")
    assert "--background" in error_line(run(model, path, tmp_path / "no.mkv"))
    filled, again = tmp_path / "filled.mkv", tmp_path / "again.mkv"
    succeed(run(model, path, filled, "--background", "#0000ff"))
    expected = read_clip(path, background=(0, 0, 255)).frames
    assert (expected[:, :, :8] == (0, 0, 255)).all()
    made = [piece.frames for piece in upscale(tiny_pipeline(), expected, generator=7)]
    np.testing.assert_array_equal(frames_of(filled), np.concatenate(made))
    succeed(swifti2v("upscale", path, "-o", again, "--like", filled))
    assert_same_frames(filled, again)


def test_a_length_that_does_not_fit_is_refused_with_what_reading_did(model, tmp_path):
    path = foreign_clips.save(tmp_path / "a.mp4", num_frames=17, rate=25)
    refused = run(model, path, tmp_path / "no.mkv", "--fps", 20)
    assert "14 does not fit" in error_line(refused)
    assert "(its 25 fps are resampled to 20: frames are left out)" in refused.stderr
