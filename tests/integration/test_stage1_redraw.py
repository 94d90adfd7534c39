"""Stage I draws a clip again; its calls stay what they were, to the bit."""

import pytest
import torch

from swifti2v.config import SamplingConfig, Stage1Config
from swifti2v.errors import ConfigError, ShapeError
from swifti2v.models.vae.streaming import StreamingDecoder, StreamingEncoder
from swifti2v.pipelines.course import draw_course
from swifti2v.pipelines.progress import Progress
from swifti2v.pipelines.stage1 import Conditions, Stage1Pipeline, plan_redraw_sigmas
from swifti2v.sampling import add_noise, denoise, draw_noise
from swifti2v.schedules import plan_sigmas
from tests.helpers.tiny import tiny_components

NUM_FRAMES, HEIGHT, WIDTH = 9, 16, 32
CONFIGS = [
    Stage1Config(
        condition=condition,
        sampling=SamplingConfig(
            num_inference_steps=3, strength=strength, parameterization=parameterization
        ),
    )
    for condition in ("zeros", "chart")
    for strength in (1.0, 0.5)
    for parameterization in ("velocity", "reference_residual")
]  # fmt: skip


@pytest.fixture(scope="module")
def stage1() -> Stage1Pipeline:
    parts = tiny_components()
    return Stage1Pipeline(parts.stage1_transformer, parts.stage1_vae)


@pytest.fixture(scope="module")
def conditions() -> Conditions:
    embeds = torch.randn(2, 1, 4, 16, generator=torch.Generator().manual_seed(1))
    return Conditions(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(1, 3, NUM_FRAMES, HEIGHT, WIDTH, generator=generator) * 2 - 1


def run_by_hand(
    stage1: Stage1Pipeline,
    image: torch.Tensor,
    start: torch.Tensor | None,
    conditions: Conditions,
    config: Stage1Config,
    sigmas: list[float],
) -> torch.Tensor:
    """The recipe of ``__call__``, written out; ``start`` takes the place of the still image."""
    course = draw_course(NUM_FRAMES, 7)
    after = stage1.continue_image(image, course, config)
    condition = stage1.prepare_condition(image, after)
    noise = draw_noise((768, 2, 4), range(3), 7, "cpu", stage="stage1")
    unexpected: list[torch.Tensor] = []
    still = condition[:, 4:, :1].expand(-1, -1, 3, -1, -1)
    clean = still if start is None else start
    latents = noise if sigmas[0] >= 1 else add_noise(clean, noise, sigmas[0])
    velocity = stage1.velocity(condition, conditions, config, image, course, unexpected.append)
    latents = denoise(velocity, latents, 0, sigmas)
    assert not unexpected  # these models tell no displacement
    return StreamingDecoder(stage1.vae).decode(latents)


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
def test_a_call_is_its_recipe_to_the_bit(stage1, conditions, video, config):
    image = video[:, :, :1]
    sampling = config.sampling
    sigmas = plan_sigmas(sampling.num_inference_steps, sampling.shift, sampling.strength)
    expected = run_by_hand(stage1, image, None, conditions, config, sigmas)
    assert torch.equal(stage1(image, conditions, NUM_FRAMES, 7, config).video, expected)


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
def test_redrawing_is_the_recipe_from_the_noised_clip(stage1, conditions, video, config):
    clean = StreamingEncoder(stage1.vae).encode(video)
    assert plan_redraw_sigmas(config.sampling, 0.9)[1:] == plan_sigmas(3)[2:]
    sigmas = plan_redraw_sigmas(config.sampling, 0.9)
    expected = run_by_hand(stage1, video[:, :, :1], clean, conditions, config, sigmas)
    redrawn = stage1.redraw(video, conditions, 7, config, 0.9).video
    assert redrawn.shape == video.shape
    assert torch.equal(redrawn, expected)


@torch.no_grad()
def test_from_pure_noise_only_the_first_frame_is_left(stage1, conditions, video):
    config = Stage1Config(sampling=SamplingConfig(num_inference_steps=2))
    call = stage1(video[:, :, :1], conditions, NUM_FRAMES, 7, config).video
    assert torch.equal(stage1.redraw(video, conditions, 7, config, 1.0).video, call)
    assert not torch.equal(stage1.redraw(video, conditions, 7, config, 0.99).video, call)


@torch.no_grad()
def test_it_is_guided_and_seeded(stage1, conditions, video):
    plain = Stage1Config()
    guided = Stage1Config(sampling=SamplingConfig(guidance_scale=3.0))
    own = stage1.redraw(video, conditions, 7, plain, 0.8).video
    assert not torch.equal(own, stage1.redraw(video, conditions, 8, plain, 0.8).video)
    assert not torch.equal(own, stage1.redraw(video, conditions, 7, guided, 0.8).video)


def test_progress_counts_the_steps_that_are_left(stage1, conditions, video):
    events: list[Progress] = []
    with torch.no_grad():
        stage1.redraw(video, conditions, 7, Stage1Config(), 0.9, events.append)
    assert [(e.stage, e.step, e.num_steps) for e in events] == [
        ("stage1", 1, 3), ("stage1", 2, 3), ("stage1", 3, 3),
    ]  # fmt: skip


def test_the_schedule_is_cut_at_the_level():
    sampling = SamplingConfig(num_inference_steps=4, strength=0.5)
    whole = plan_sigmas(4)
    assert plan_redraw_sigmas(sampling, 1.0) == whole
    assert plan_redraw_sigmas(sampling, 0.9) == [0.9, *whole[2:]]
    assert plan_redraw_sigmas(sampling, whole[2]) == whole[2:]
    assert plan_redraw_sigmas(sampling, 0.01) == [0.01, 0.0]


@pytest.mark.parametrize("sigma", [0.0, -0.1, 1.01, float("nan")])
def test_levels_out_of_range_are_refused(stage1, conditions, video, sigma):
    with pytest.raises(ConfigError, match="sigma is"):
        stage1.redraw(video, conditions, 7, Stage1Config(), sigma)


def test_clips_that_do_not_fit_are_refused(stage1, conditions, video):
    with pytest.raises(ShapeError, match="num_frames 8"):
        stage1.redraw(video[:, :, :8], conditions, 7, Stage1Config(), 0.5)
    with pytest.raises(ShapeError, match="width 30"):
        stage1.redraw(video[..., :30], conditions, 7, Stage1Config(), 0.5)
