"""Explicit noise levels and noising anew: what the models are told, and what changes nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swifti2v.config import GenerationConfig, merge, parse_config, to_dict
from swifti2v.jobs.settings import read_settings
from swifti2v.pipelines.progress import Stopwatch
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.pipelines.upscale import second_pass
from swifti2v.training.data.clips import LoadedClip
from swifti2v.training.stages.validation import validate_stage1, validate_stage2
from tests.helpers.command_line import (
    LOSSLESS,
    assert_same_frames,
    error_line,
    generate,
    refine,
    save_clip,
    save_photo,
    succeed,
    swifti2v,
)
from tests.helpers.evaluation_clips import panning_clip
from tests.helpers.serving import form, serve
from tests.helpers.timesteps import told
from tests.helpers.tiny import SIZE, KeptSegments, tiny_pipeline

LADDER = [1, 0.757, 0.522]
SAMPLING = {"num_inference_steps": 3, "sigmas": LADDER, "rule": "renoise"}
FEW_STEPS: dict[str, Any] = {"stage1": {"sampling": SAMPLING}, "stage2": {"sampling": SAMPLING}}
ALL = [1000.0, 757.0, 522.0]


def configured() -> SwiftI2VPipeline:
    pipe = tiny_pipeline()
    pipe.config = parse_config(GenerationConfig, merge(to_dict(pipe.config), FEW_STEPS), "test")
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return configured()


@pytest.fixture(scope="module")
def few_steps(tmp_path_factory):
    """A stored model whose own settings are the ladder's."""
    directory = tmp_path_factory.mktemp("few") / "few"
    configured().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def synthesize(
    pipe: SwiftI2VPipeline, image: Image.Image, store: Any = None, **changes: Any
) -> Any:
    config = pipe.configure(**changes)
    motion = np.random.default_rng(1).integers(0, 256, (17, 16, 16, 3), dtype=np.uint8)
    stream = pipe.refine(motion, image, "p", generator=5, config=config, store=store)
    return list(stream)


def test_the_models_see_exactly_the_levels(few_steps, photo, tmp_path):
    """From the command line; 17 frames are four segments."""
    motion = save_clip(tmp_path / "motion.mkv", 9)
    video = tmp_path / "a.mkv"
    with told() as seen:
        succeed(generate(few_steps, photo, video, *LOSSLESS))
    assert seen == ALL * 5
    stored = read_settings(video).config
    assert stored.stage2.sampling.sigmas == tuple(LADDER)
    assert "renoise" in succeed(swifti2v("info", video)).stdout
    with told() as seen:
        succeed(swifti2v("generate", "--like", video, "-o", tmp_path / "b.mkv"))
    assert seen == ALL * 5
    assert_same_frames(video, tmp_path / "b.mkv")
    with told() as seen:
        succeed(refine(few_steps, motion, photo, tmp_path / "c.mkv"))
    assert seen == ALL * 2
    with told() as seen:
        succeed(
            swifti2v(
                "upscale", motion, "-o", tmp_path / "d.mkv", "--model", few_steps, "--width", 64,
                "--height", 64, "--strength", 0.757,
            )
        )  # fmt: skip
    assert seen == ALL[1:] * 2


def test_rows_of_a_batch_and_jobs_of_a_server_see_the_levels(few_steps, photo, tmp_path):
    manifest = tmp_path / "clips.csv"
    manifest.write_text(f"image,prompt,seed\n{photo},zoom,7\n")
    with told() as seen:
        succeed(swifti2v("batch", manifest, "-o", tmp_path / "out", "--set", f"model={few_steps}"))
    assert seen == ALL * 5
    with serve(few_steps, tmp_path / "data") as live:
        with told() as seen:
            job = live.finish(live.submit(prompt="zoom", seed=7)["id"])
        assert job["status"] == "completed", job
        assert seen == ALL * 5
        other = live.client.post("/v1/videos", **form(prompt="zoom", num_inference_steps=2))
        assert other.status_code == 400
        assert "sigmas lists 3 noise levels" in other.json()["error"]["message"]


def test_the_plan_counts_the_levels_that_run(few_steps, tmp_path):
    pipe = configured()
    pipe.config = pipe.configure(strength=0.6)
    pipe.save_pretrained(tmp_path / "one")

    def flops(model: Path) -> dict[str, float]:
        plan = succeed(swifti2v("plan", "--model", model, "--device", "h100", "--json"))
        found: dict[str, float] = json.loads(plan.stdout)["flops"]
        return found

    whole, one = flops(few_steps), flops(tmp_path / "one")
    assert whole["stage2"] == pytest.approx(3 * one["stage2"])
    assert whole["stage1"] == one["stage1"]


def test_validation_in_training_sees_the_levels(pipe, tmp_path):
    large, small = (LoadedClip("a", panning_clip(9, 1, s, s), None, "p") for s in (SIZE, SIZE // 4))
    with told() as seen:
        validate_stage2(pipe, [large], tmp_path, 0)
    assert seen == ALL * 2
    with told() as seen:
        validate_stage1(pipe, [small], tmp_path, 0)
    assert seen == ALL


@pytest.mark.parametrize(("strength", "expected"), [(0.757, ALL[1:]), (0.6, ALL[2:])])
def test_a_strength_starts_from_the_reference_at_the_level_that_runs_first(
    pipe, image, strength, expected
):
    """Seen in what the transformer is given: the rest of it is the reference, times 1 - level."""
    starts: list[torch.Tensor] = []

    def look(module: Any, args: Any, kwargs: Any = None) -> None:
        starts.append(args[0][:, :768, -1].clone())

    hook = pipe.stage2.transformer.register_forward_pre_hook(look)
    with told() as seen:
        made = [synthesize(pipe, image, strength=s) for s in (strength, 1.0)]
    hook.remove()
    assert seen == expected * 4 + ALL * 4
    assert not np.array_equal(made[0][0].frames, made[1][0].frames)
    level = expected[0] / 1000
    start, noise = starts[0], starts[4 * len(expected)]
    (reference,) = torch.unbind((start - level * noise) / (1 - level))
    shown = starts_reference(pipe, image)
    torch.testing.assert_close(reference, shown, atol=1e-4, rtol=1e-4)


def starts_reference(pipe: SwiftI2VPipeline, image: Image.Image) -> torch.Tensor:
    """Reference latents of the first target frame, as the transformer is shown them."""
    shown: list[torch.Tensor] = []
    hook = pipe.stage2.transformer.register_forward_pre_hook(
        lambda module, args: shown.append(args[0][0, 768:, -1].clone())
    )
    synthesize(pipe, image)
    hook.remove()
    return shown[0]


@pytest.mark.parametrize("done", [1, 3])
def test_noising_anew_resumes_to_the_bit(pipe, image, done):
    whole = synthesize(pipe, image, strength=0.757)
    kept = KeptSegments({s.index: s.latents.clone() for s in whole[:done]})
    resumed = synthesize(pipe, image, kept, strength=0.757)
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a.latents, b.latents)
        assert np.array_equal(a.frames, b.frames)


def test_noise_of_a_frame_and_step_is_the_same_in_every_layout_of_windows(pipe, image):
    """A model that predicts no change leaves nothing but noise: that of each frame and step."""
    quiet = configured()
    for parameter in quiet.stage2.transformer.proj_out.parameters():
        torch.nn.init.zeros_(parameter)

    def latents(segment_size: int, context_size: int) -> torch.Tensor:
        made = synthesize(quiet, image, segment_size=segment_size, context_size=context_size)
        return torch.cat([segment.latents for segment in made], dim=2)

    expected = latents(1, 1)
    assert not torch.equal(expected[:, :, 0], expected[:, :, 1])
    for segment_size, context_size in ((2, 1), (3, 1), (3, 0), (4, 2)):
        assert torch.equal(latents(segment_size, context_size), expected)


def test_the_rule_and_stage_one_count_in_the_clip(pipe, image):
    conditions = pipe.encode(image, "p", pipe.config, Stopwatch())
    euler = pipe.configure(**{"stage1.sampling.rule": "euler"})
    clips = [
        pipe.generate_motion_reference(image, conditions, seed, config).frames
        for seed, config in ((5, pipe.config), (5, pipe.config), (6, pipe.config), (5, euler))
    ]
    assert np.array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2])
    assert not np.array_equal(clips[0], clips[3])


def test_an_enlarged_clip_keeps_its_ladder(pipe):
    sampling = second_pass(pipe.configure(strength=0.757)).stage2.sampling
    assert sampling.plan_sigmas() == [0.757, 0.522, 0]


def test_a_step_count_that_disagrees_is_named(few_steps, tmp_path):
    photo = save_photo(tmp_path / "p.png", SIZE, SIZE)
    message = error_line(generate(few_steps, photo, tmp_path / "a.mp4", "--steps", 4))
    assert "sigmas lists 3 noise levels" in message
    assert not (tmp_path / "a.mp4").exists()
