"""A Stage I that generates displacement: the photo moved, and the motion handed to Stage II."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from swifti2v.config import SamplingConfig, Stage1Config
from swifti2v.errors import ConfigError, LoadingError
from swifti2v.jobs.work_dir import MOTION_REFERENCE, WorkDir
from swifti2v.pipelines.camera_moves import SHIFT
from swifti2v.pipelines.course import draw_course
from swifti2v.pipelines.displacement import move_photo
from swifti2v.pipelines.progress import Stopwatch
from swifti2v.pipelines.stage1 import Conditions, Stage1Pipeline
from swifti2v.pipelines.transition import MotionReference
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.shapes import NUM_WAYS
from tests.helpers.tiny import SIZE, tiny_components, tiny_pipeline

NUM_FRAMES, HEIGHT, WIDTH = 9, 32, 48
CONFIG = Stage1Config(
    condition="chart",
    motion="displacement",
    sampling=SamplingConfig(num_inference_steps=2, parameterization="reference_residual"),
)


def make_stage1(scale: float = 1.0) -> Stage1Pipeline:
    """A random transformer whose output layer is multiplied by ``scale``."""
    parts = tiny_components(displaces=True)
    torch.nn.init.normal_(parts.stage1_transformer.proj_out.weight, std=0.02 * scale)
    torch.nn.init.zeros_(parts.stage1_transformer.proj_out.bias)
    return Stage1Pipeline(parts.stage1_transformer, parts.stage1_vae)


def set_bias(stage1: Stage1Pipeline, channel: int, value: float) -> None:
    """Add a value to one channel of the output, at every cell."""
    bias = stage1.transformer.proj_out.bias
    bias.data.view(-1, stage1.transformer.config["out_channels"])[:, channel] = value


@pytest.fixture(scope="module")
def conditions() -> Conditions:
    embeds = torch.randn(2, 1, 4, 16, generator=torch.Generator().manual_seed(1))
    return Conditions(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])


@pytest.fixture(scope="module")
def photo() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(1, 3, 1, HEIGHT, WIDTH, generator=generator) * 1.6 - 0.8


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [1, 3])
def test_an_output_of_zero_is_the_photo_at_rest(conditions, photo, num_steps):
    config = replace(CONFIG, sampling=replace(CONFIG.sampling, num_inference_steps=num_steps))
    clip = make_stage1(0)(photo, conditions, NUM_FRAMES, 0, config)
    assert clip.video.shape == (1, 3, NUM_FRAMES, HEIGHT, WIDTH)
    torch.testing.assert_close(clip.video, photo.expand_as(clip.video), atol=1e-4, rtol=0)
    assert clip.displacement is not None
    assert clip.displacement.shape == (1, 2, NUM_FRAMES, HEIGHT // 8, WIDTH // 8)
    assert not clip.displacement.any()


@torch.no_grad()
def test_displacement_moves_the_photo_in_every_frame_but_the_first(conditions, photo):
    stage1 = make_stage1(0)
    set_bias(stage1, 0, 1.0)  # a pan to the right
    clip = stage1(photo, conditions, NUM_FRAMES, 3, CONFIG)
    assert clip.displacement is not None
    expected = torch.zeros(1, 2, NUM_FRAMES, HEIGHT, WIDTH)
    expected[:, 0] = SHIFT * WIDTH * draw_course(NUM_FRAMES, 3).clock[:, None, None]
    torch.testing.assert_close(clip.displacement, expected[..., ::8, ::8], atol=1e-4, rtol=0)
    moved = move_photo(photo, expected).clamp(-1, 1)
    torch.testing.assert_close(clip.video, moved, atol=1e-3, rtol=0)


@torch.no_grad()
def test_the_residual_is_added_to_the_moved_photo(conditions, photo):
    stage1 = make_stage1(0)
    set_bias(stage1, NUM_WAYS, 8.0)  # brightness of every cell
    clip = stage1(photo * 0.5, conditions, NUM_FRAMES, 0, CONFIG)
    difference = clip.video - photo * 0.5
    assert clip.displacement is not None
    assert not clip.displacement.any()
    # A cell's mean is its sum over 4 x 8 x 8 values, divided by 16; the deviation of the codec is 0.5.
    torch.testing.assert_close(
        difference, torch.full_like(difference, 8 * 0.5 / 16), atol=1e-4, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_seed_decides_the_clip(conditions, photo, guidance_scale):
    stage1 = make_stage1()
    config = replace(CONFIG, sampling=replace(CONFIG.sampling, guidance_scale=guidance_scale))
    first, again, other = (
        stage1(photo, conditions, NUM_FRAMES, seed, config) for seed in (3, 3, 4)
    )
    assert torch.equal(first.video, again.video)
    assert first.displacement is not None
    assert again.displacement is not None
    assert other.displacement is not None
    assert torch.equal(first.displacement, again.displacement)
    assert not first.displacement[:, :, 0].any()
    assert first.displacement[:, :, 1:].abs().amin(dim=(1, 3, 4)).max() > 0
    assert not torch.allclose(first.displacement, other.displacement, atol=1e-3)
    plain = stage1(photo, conditions, NUM_FRAMES, 3, CONFIG)
    assert torch.equal(first.video, plain.video) == (guidance_scale == 1)


@torch.no_grad()
def test_another_chart_is_another_motion_though_the_noise_is_the_same(conditions, photo):
    stage1 = make_stage1()
    grey = replace(CONFIG, condition="zeros")
    first, other = (stage1(photo, conditions, NUM_FRAMES, 3, own) for own in (CONFIG, grey))
    assert first.displacement is not None
    assert other.displacement is not None
    assert not torch.equal(first.displacement, other.displacement)


@torch.no_grad()
def test_redrawing_keeps_the_clips_shape_and_tells_displacement(conditions, photo):
    clip = make_stage1()(photo, conditions, NUM_FRAMES, 0, CONFIG)
    redrawn = make_stage1().redraw(clip.video, conditions, 1, CONFIG, 0.7)
    assert redrawn.video.shape == clip.video.shape
    assert redrawn.displacement is not None
    still = make_stage1(0).redraw(clip.video, conditions, 1, CONFIG, 0.7)
    first = clip.video[:, :, :1]
    torch.testing.assert_close(still.video, first.expand_as(clip.video), atol=1e-3, rtol=0)


@torch.no_grad()
def test_the_motion_reference_is_the_clip_in_frames(conditions, photo):
    clip = make_stage1()(photo, conditions, NUM_FRAMES, 0, CONFIG)
    motion = clip.to_motion_reference()
    assert motion.frames.shape == (NUM_FRAMES, HEIGHT, WIDTH, 3)
    assert motion.displacement is not None
    assert clip.displacement is not None
    assert motion.displacement.shape == (NUM_FRAMES, 2, HEIGHT // 8, WIDTH // 8)
    assert torch.equal(motion.displacement[3], clip.displacement[0, :, 3])


def refuse_to_fit(pipe: SwiftI2VPipeline, changes: dict[str, Any]) -> None:
    next(pipe.stream(Image.new("RGB", (SIZE, SIZE)), "", config=pipe.configure(**changes)))


def test_a_model_of_the_other_kind_is_refused_before_any_work(tmp_path):
    displacing, plain = tiny_pipeline(displaces=True), tiny_pipeline()
    image = Image.new("RGB", (SIZE, SIZE))
    with pytest.raises(ConfigError, match=r"stage1\.motion is latents, but .* the other kind"):
        refuse_to_fit(displacing, {"stage1.motion": "latents"})
    changes = {
        "stage1.motion": "displacement",
        "stage1.sampling.parameterization": "reference_residual",
    }
    with pytest.raises(ConfigError, match=r"stage1\.motion is displacement"):
        refuse_to_fit(plain, changes)
    with pytest.raises(ConfigError, match="parameterization is reference_residual, not velocity"):
        refuse_to_fit(plain, {"stage1.motion": "displacement"})
    displacing.save_pretrained(tmp_path / "right")
    again = SwiftI2VPipeline.from_pretrained(tmp_path / "right", device="cpu")
    assert np.array_equal(again(image, "").frames, displacing(image, "").frames)
    displacing.config = plain.config
    displacing.save_pretrained(tmp_path / "wrong")
    with pytest.raises(LoadingError, match=r"out_channels is 773, but .* need 768"):
        SwiftI2VPipeline.from_pretrained(tmp_path / "wrong", device="cpu")


def make_photo() -> Image.Image:
    y, x = np.mgrid[:SIZE, :SIZE]
    waves = [np.sin(x / 2) * np.cos(y / 3), np.sin(x / 5 + y / 2), np.cos(x / 3)]
    return Image.fromarray((127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8))


@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_run_resumed_from_its_work_dir_makes_the_same_frames(tmp_path, done):
    """With the photo's detail carried along the displacement, which is stored beside the frames."""
    pipe, image = tiny_pipeline(displaces=True), make_photo()
    torch.nn.init.normal_(pipe.stage1.transformer.proj_out.weight[:32], std=0.05)
    config = pipe.configure(**{"stage2.reference_detail": "carried"})
    conditions = pipe.encode(image, "pan left", config, Stopwatch())
    motion = pipe.generate_motion_reference(image, conditions, 5, config)
    assert motion.displacement is not None
    assert motion.displacement.abs().max() > 0.1
    whole = list(pipe.synthesize(motion, image, conditions, 5, config))
    work_dir = WorkDir(tmp_path / "run", resume=False)
    work_dir.start({"seed": 5})
    work_dir.save_motion_reference(motion)
    for segment in whole[:done]:
        work_dir.save_segment(segment.index, segment.latents)
    again = WorkDir(tmp_path / "run", resume=True)
    stored = again.load_motion_reference()
    assert stored is not None
    assert np.array_equal(stored.frames, motion.frames)
    assert stored.displacement is not None
    assert torch.equal(stored.displacement, motion.displacement)
    resumed = list(pipe.synthesize(stored, image, conditions, 5, config, store=again))
    for own, other in zip(resumed, whole, strict=True):
        assert np.array_equal(own.frames, other.frames)
    # The displacement matters: searched motion makes another clip.
    searched = MotionReference(motion.frames)
    frames = [s.frames for s in pipe.synthesize(searched, image, conditions, 5, config)]
    assert not np.array_equal(np.concatenate(frames), np.concatenate([s.frames for s in whole]))


def stored_motion(directory: Path) -> MotionReference:
    work_dir = WorkDir(directory, resume=False)
    work_dir.start({"seed": 1})
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)
    displacement = torch.tensor(rng.normal(size=(5, 2, 2, 3))).float()
    motion = MotionReference(frames, displacement)
    work_dir.save_motion_reference(motion)
    return motion


def test_files_of_before_the_displacement_still_load(tmp_path):
    motion = stored_motion(tmp_path)
    WorkDir(tmp_path, resume=True).save_motion_reference(MotionReference(motion.frames))
    assert load_file(tmp_path / MOTION_REFERENCE).keys() == {"tensor"}
    loaded = WorkDir(tmp_path, resume=True).load_motion_reference()
    assert loaded is not None
    assert np.array_equal(loaded.frames, motion.frames)
    assert loaded.displacement is None


@pytest.mark.parametrize("damage", ["cut", "changed", "exchanged", "left out"])
def test_a_damaged_motion_reference_is_made_again(tmp_path, damage, caplog):
    motion = stored_motion(tmp_path)
    path = tmp_path / MOTION_REFERENCE
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "changed":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    else:
        assert motion.displacement is not None
        tensors = load_file(path)
        if damage == "exchanged":
            tensors["displacement"] = tensors["displacement"].flip(0)
        else:
            del tensors["displacement"]
        header = int.from_bytes(content[:8], "little")
        metadata = {"sha256": content[8 : 8 + header].decode().split('"sha256":"')[1][:64]}
        save_file(tensors, path, metadata)
    assert WorkDir(tmp_path, resume=True).load_motion_reference() is None
    assert "is damaged: it is deleted and made again" in caplog.text
    assert not path.exists()
