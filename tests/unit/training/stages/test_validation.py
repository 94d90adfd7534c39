"""Validation: what is measured, on what, and what is left to look at."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swifti2v.media import Frames, downscale, frames_to_video, probe_clip, video_to_frames
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.training.data.clips import LoadedClip
from swifti2v.training.stages.validation import (
    NUM_SHOWN,
    measure_round_trip,
    validate_stage1,
    validate_stage2,
)
from tests.helpers.evaluation_clips import panning_clip
from tests.helpers.tiny import SIZE, tiny_pipeline, tiny_vae

LOW = SIZE // 4
STAGES = {"stage1": (validate_stage1, LOW), "stage2": (validate_stage2, SIZE)}
per_stage = pytest.mark.parametrize("stage", STAGES)


@cache
def pipe() -> SwiftI2VPipeline:
    return tiny_pipeline()


def clip_of(side: int, num_frames: int = 5, step: int = 1, name: str = "a") -> LoadedClip:
    return LoadedClip(name, panning_clip(num_frames, step, side, side), None, "pan left")


def rows_of(path: Path, height: int, width: int) -> list[list[Frames]]:
    """The pictures of a grid."""
    grid = np.asarray(Image.open(path))
    assert grid.shape[1] == NUM_SHOWN * width
    lines = np.split(grid, grid.shape[0] // height)
    return [np.split(line, NUM_SHOWN, axis=1) for line in lines]


@per_stage
def test_the_measures_are_means_over_the_clips(stage, tmp_path):
    validate, side = STAGES[stage]
    clips = [clip_of(side, step=1), clip_of(side, step=2)]
    both = validate(pipe(), clips, tmp_path, 0)
    each = [validate(pipe(), [clip], tmp_path, 0) for clip in clips]
    assert both.keys() == each[0].keys()
    for name, value in both.items():
        assert value == pytest.approx(np.mean([values[name] for values in each]))
        assert np.isfinite(value)


@per_stage
def test_the_seed_alone_decides_and_the_pipeline_is_left_as_it_was(stage, tmp_path):
    validate, side = STAGES[stage]
    clips = [clip_of(side)]
    config = pipe().config
    transformer = getattr(pipe().components, f"{stage}_transformer")
    weights = {name: value.clone() for name, value in transformer.state_dict().items()}
    first, again, other = (validate(pipe(), clips, tmp_path, seed) for seed in (0, 0, 1))
    assert first == again
    assert first["psnr"] != other["psnr"]
    assert pipe().config == config
    assert all(torch.equal(value, weights[n]) for n, value in transformer.state_dict().items())


@per_stage
def test_clips_and_a_grid_of_truth_above_output_are_left(stage, tmp_path):
    validate, side = STAGES[stage]
    clips = [clip_of(side), clip_of(side, num_frames=9, step=2)]
    validate(pipe(), clips, tmp_path, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"clip-0.mp4", "clip-1.mp4", "grid.png"}
    for number, clip in enumerate(clips):
        info = probe_clip(tmp_path / f"clip-{number}.mp4")
        assert (info.num_frames, info.height, info.width) == (len(clip.frames), side, side)
    rows = rows_of(tmp_path / "grid.png", side, side)
    assert len(rows) == 4
    for truth, clip in zip(rows[::2], clips, strict=True):
        np.testing.assert_array_equal(truth[0], clip.frames[0])
        np.testing.assert_array_equal(truth[-1], clip.frames[-1])
    assert (rows[1][-1] != rows[0][-1]).any()


def test_stage2_is_given_the_clips_small_version_and_without_one_makes_it(tmp_path):
    clip = clip_of(SIZE)
    small = downscale(clip.frames, pipe().config.stage1.downscale)
    assert small.shape == (5, LOW, LOW, 3)
    given = LoadedClip(clip.id, clip.frames, small, clip.prompt)
    other = LoadedClip(clip.id, clip.frames, small[::-1].copy(), clip.prompt)
    made, same, changed = (
        validate_stage2(pipe(), [each], tmp_path, 0) for each in (clip, given, other)
    )
    assert made == same
    assert made["psnr"] != changed["psnr"]


def test_seams_are_measured_where_segments_have_frames_between_them(tmp_path):
    own = tiny_pipeline()
    clips = [clip_of(SIZE, num_frames=17)]
    for segment_size, has_seams in ((1, False), (2, True), (4, False)):
        own.config = own.configure(segment_size=segment_size)
        measured = validate_stage2(own, clips, tmp_path, 0)
        assert ("seam_score" in measured) == has_seams
        assert {"psnr", "detail_coherence", "flicker"} <= measured.keys()


def test_what_the_vae_gives_is_compared_with_the_clip(tmp_path):
    vae, clip = tiny_vae(), clip_of(SIZE)
    with torch.no_grad():
        measured = measure_round_trip(vae, [clip], None, tmp_path)
        video: Any = vae.decode(vae.encode(frames_to_video(clip.frames)).latent_dist.mean)
    output = video_to_frames(video.sample)
    errors = np.square(output.astype(float) - clip.frames).mean(axis=(1, 2, 3))
    assert measured["psnr"] == pytest.approx(float((10 * np.log10(255**2 / errors)).mean()))
    truth, decoded = rows_of(tmp_path / "grid.png", SIZE, SIZE)
    np.testing.assert_array_equal(truth[0], clip.frames[0])
    np.testing.assert_array_equal(decoded[-1], output[-1])


def test_a_round_trip_is_that_of_the_square_at_the_centre(tmp_path):
    vae, clip = tiny_vae(), clip_of(SIZE)
    centre = clip.frames[:, 16:48, 16:48]
    with torch.no_grad():
        measured = measure_round_trip(vae, [clip], 32, tmp_path)
        alone = measure_round_trip(vae, [LoadedClip("a", centre, None, "")], None, tmp_path)
    assert measured == alone
    assert measured["psnr"] < 30
    truth, _ = rows_of(tmp_path / "grid.png", 32, 32)
    np.testing.assert_array_equal(truth[0], centre[0])
