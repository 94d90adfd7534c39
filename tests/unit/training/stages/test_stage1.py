"""Stage I's task and its clips: the pipeline's condition, and the displacement of a move."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swifti2v.config import SamplingConfig, Stage1Config
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.models.vae.streaming import StreamingEncoder
from swifti2v.pipelines.camera_moves import MOVES
from swifti2v.pipelines.course import Course, draw_chart, draw_course, even_course
from swifti2v.pipelines.displacement import enlarge, move_photo, read_displacement
from swifti2v.pipelines.stage1 import Stage1Pipeline
from swifti2v.shapes import FrameSize
from swifti2v.training.data.camera_motion import Scene
from swifti2v.training.engine.draws import Draw, draws_of_step, split_batch
from swifti2v.training.engine.optimizers import OptimizerConfig
from swifti2v.training.engine.run_config import PhaseConfig
from swifti2v.training.nano.camera_source import CameraMoveSource
from swifti2v.training.nano.codec import fit_codec
from swifti2v.training.nano.material import make_procedural_material
from swifti2v.training.nano.models import NanoSize, make_stage1_transformer
from swifti2v.training.objectives import displacement_loss, photometric_loss
from swifti2v.training.stages.batches import Stage1Frames
from swifti2v.training.stages.encoded_clips import EncodedStage1
from swifti2v.training.stages.stage1 import Stage1Objective, Stage1Task
from tests.helpers.regression import losses, make_trainer
from tests.helpers.tiny import TRANSFORMER, tiny_vae

MATERIAL = make_procedural_material(height=64, width=64, num_frames=17, num_clips=2, seed=0)
CODEC = fit_codec(MATERIAL.clips, 4, 4)
LOW = FrameSize(16, 16)
SCENES = tuple(Scene(picture, None, None) for picture in MATERIAL.pictures)
NUM_LATENT_FRAMES = 5
CHART = Stage1Config(
    downscale=4,
    condition="chart",
    motion="displacement",
    sampling=SamplingConfig(parameterization="reference_residual"),
)
TEXT = 32


def make_source(num_drawn: dict[int, float] | None = None) -> CameraMoveSource:
    return CameraMoveSource(SCENES, {LOW: 1.0}, {NUM_LATENT_FRAMES: 1.0}, num_drawn or {2: 1.0})


def encode_prompts(prompts: tuple[str, ...]) -> Tensor:
    """The prompt's length, told without a text encoder."""
    torch.manual_seed(0)
    table = torch.randn(400, TEXT)
    return torch.stack([table[len(prompt)].expand(2, -1) for prompt in prompts])


def make_started() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return make_stage1_transformer(NanoSize(num_heads=2, num_layers=2), TEXT)


def randomize(model: WanTransformer3DModel) -> None:
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)


def make_task(
    num_drawn: dict[int, float] | None = None,
    objective: Stage1Objective | None = None,
    stage1: Stage1Config = CHART,
) -> Stage1Task:
    transformer = make_started()
    pipeline, own = Stage1Pipeline(transformer, CODEC), objective or Stage1Objective()
    source = EncodedStage1(make_source(num_drawn), pipeline, stage1)
    return Stage1Task(pipeline, (source,), own, stage1, encode_prompts)


def load_frames(task: Stage1Task, own: Draw | None = None) -> Stage1Frames:
    batch = task.load_batch(own or draw())
    assert isinstance(batch, Stage1Frames)
    return batch


def find_drawn(some: Stage1Frames, whole: Stage1Frames) -> list[int]:
    """Latent frames of the first clip that were drawn, told by its clock."""
    clock = whole.course.clock[0].tolist()
    places = [clock.index(value) for value in some.course.clock[0].tolist()]
    return [place // 4 for place in places if place % 4 == 0]


def draw(step: int = 0, size: int = 7) -> Draw:
    return Draw(seed=0, step=step, batch_size=size, indices=tuple(range(size)))


def test_clips_are_moves_of_their_prompts_with_the_displacement_that_made_them():
    batch = make_source().load(draw(size=14))
    assert batch.video.shape == (14, 3, 9, *LOW)
    assert batch.displacement is not None
    assert batch.displacement.shape == (14, 2, 9, *LOW)
    assert batch.prompts == batch.ids
    assert (batch.displacement[:, :, 0] == 0).all()
    moved = move_photo(batch.video[:, :, :1], batch.displacement)
    still = batch.video[:, :, :1].expand_as(batch.video)
    inside = (..., slice(4, -4), slice(4, -4))
    near, far = ((a - batch.video)[inside].square().mean() for a in (moved, still))
    assert near < 0.3 * far  # shapes have edges, and things come into view


def test_the_chart_shows_the_course_of_the_drawn_frames():
    batch = make_source({4: 1.0}).load(draw(size=20))
    assert batch.course.clock.shape == (20, 17)
    assert batch.course.sway.shape == (20, 17, 3)
    assert not batch.course.clock[:, 0].any()
    assert (batch.course.clock.diff(dim=1) > 0).all()
    assert (batch.course.clock[:, 1] < 0.15).all()
    some = make_source({1: 1.0}).load(draw(size=20))
    (frame,) = find_drawn(some, batch)[1:]
    # The course does not depend on which frames of it are drawn.
    drawn = [0, *range(4 * frame - 3, 4 * frame + 1)]
    assert torch.equal(some.course.clock, batch.course.clock[:, drawn])
    assert torch.equal(some.course.sway, batch.course.sway[:, drawn])
    for index in (0, 19):
        own = Course(batch.course.clock[index], batch.course.sway[index])
        assert torch.equal(draw_chart(batch.course, *LOW)[index], draw_chart(own, *LOW))


def test_a_dolly_is_often_drawn_over_a_scene_with_something_in_front():
    source = make_source()
    moves = (MOVES["dolly in"], MOVES["pan left"])
    rngs = [np.random.default_rng(seed) for seed in range(60)]
    fronts = [sum(source._draw_scene(m, rng).front is not None for rng in rngs) for m in moves]
    assert 10 < fronts[0] < 40
    assert fronts[1] == 0


def test_sizes_lengths_and_frames_are_drawn_by_their_shares():
    source = CameraMoveSource(
        SCENES, {FrameSize(16, 16): 0.75, FrameSize(24, 16): 0.25}, {3: 0.5, 9: 0.5},
        {1: 0.75, 8: 0.25},
    )  # fmt: skip
    batches = [source.load(draw(step, 1)) for step in range(80)]
    assert 8 <= sum(batch.video.shape[-2:] == (24, 16) for batch in batches) <= 32
    num_drawn = [(batch.video.shape[2] + 3) // 4 for batch in batches]
    assert set(num_drawn) == {2, 3, 9}  # a short clip gives what it has
    assert 4 <= num_drawn.count(9) <= 20
    for batch, number in zip(batches, num_drawn, strict=True):
        assert batch.video.shape[2] == 4 * number - 3
        assert (batch.course.clock.diff(dim=1) > 0).all()
    ends = {round(float(b.course.clock[0, -1]), 1) for b in batches if b.video.shape[2] == 5}
    assert min(ends) < 0.3 < 0.8 < max(ends)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_clips_do_not_depend_on_the_division(seed):
    source = make_source()
    (whole,) = draws_of_step(seed, 3, split_batch(14, 1, 1), 0)
    parts = split_batch(14, 1, 2)
    pieces = [source.load(draws_of_step(seed, 3, parts, rank)[0]) for rank in range(2)]
    batch = source.load(whole)
    assert torch.equal(torch.cat([piece.video for piece in pieces]), batch.video)
    assert pieces[0].prompts + pieces[1].prompts == batch.prompts
    assert pieces[0].ids + pieces[1].ids == batch.ids


@pytest.mark.parametrize("condition", ["zeros", "chart"])
def test_the_condition_is_the_pipelines(condition):
    stage1 = replace(CHART, condition=condition)
    whole = make_task({4: 1.0}, stage1=stage1)
    some = make_task({2: 1.0}, stage1=stage1)
    pipeline = Stage1Pipeline(whole.model, CODEC)
    expected: list[Tensor] = []
    for task in (whole, some):
        batch = load_frames(task, draw(5))
        _, found, _ = task.source.encode(batch)
        for index in (0, 3):
            photo = batch.video[index : index + 1, :, :1]
            if len(expected) < 2:
                own = Course(batch.course.clock[index], batch.course.sway[index])
                after = pipeline.continue_image(photo, own, stage1)
                assert after.any() == (condition == "chart")
                expected.append(pipeline.prepare_condition(photo, after))
            frames = find_drawn(batch, load_frames(whole, draw(5)))
            torch.testing.assert_close(
                found[index : index + 1], expected[index // 3][:, :, frames], atol=1e-5, rtol=0
            )
    assert len(frames) == 3


@pytest.mark.parametrize("seed", [0, 7])
def test_the_chart_of_sampling_is_that_of_training(seed):
    """A clip whose course has the seed of a run is shown as the run shows it."""
    pipeline = Stage1Pipeline(make_started(), CODEC)
    photo = torch.zeros(1, 3, 1, *LOW)
    after = pipeline.continue_image(photo, draw_course(17, seed), CHART)
    assert torch.equal(after[0], draw_chart(draw_course(17, seed), *LOW)[:, 1:])
    zeros = pipeline.continue_image(photo, draw_course(17, seed), replace(CHART, condition="zeros"))
    assert zeros.shape == after.shape
    assert not zeros.any()


def test_a_clip_of_which_no_course_is_known_gets_an_even_chart():
    task = make_task({4: 1.0})
    batch = replace(load_frames(task, draw(2)), course=even_course(17), displacement=None)
    _, found, _ = task.source.encode(batch)
    chart = draw_chart(even_course(17), *LOW)[None, :, 1:]
    expected = task.pipeline.prepare_condition(
        batch.video[:, :, :1], chart.expand(len(batch.video), -1, -1, -1, -1)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert task.loss(batch, draw(2)).isfinite().all()


def test_latents_are_those_of_the_streamed_clip():
    task = make_task({4: 1.0})
    batch = load_frames(task)
    torch.testing.assert_close(
        task.source.encode(batch)[0], StreamingEncoder(CODEC).encode(batch.video)
    )


@pytest.mark.parametrize("error_of", ["velocity", "clean"])
def test_the_loss_is_the_flow_loss_and_the_displacements(error_of):
    objective = Stage1Objective(
        error_of=error_of, channel_weight_limit=8.0, displacement_weight=0.5
    )
    task = make_task(objective=objective)
    randomize(task.model)
    seen: list[Tensor] = []

    def keep(_: object, __: object, named: dict[str, Any], output: tuple[Tensor]) -> None:
        seen.extend((named["hidden_states"], named["timestep"], output[0]))

    task.model.register_forward_hook(keep, with_kwargs=True)
    batch, own = load_frames(task), draw()
    loss = task.loss(batch, own)
    inputs, timestep, output = seen
    latents = task.source.encode(batch)[0]
    sigma, noise = task.draw_sigma(own), own.noise_like(latents)
    level = sigma[:, None, None, None, None]
    torch.testing.assert_close(timestep, 1000 * sigma)
    torch.testing.assert_close(inputs[:, :192], (1 - level) * latents + level * noise)
    way = read_displacement(output, batch.course, 4, 4)
    moved = StreamingEncoder(CODEC).encode(move_photo(batch.video[:, :, :1], enlarge(way, *LOW)))
    clean = moved + output[:, 5:]
    error = (clean - latents).square() / (level.square() if error_of == "velocity" else 1)
    assert task.channel_weight is not None
    expected = (error * task.channel_weight[:, None, None, None]).flatten(1).mean(dim=1)
    assert batch.displacement is not None
    expected = expected + 0.5 * displacement_loss(way, batch.displacement)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    unknown = task.loss(replace(batch, displacement=None), own)
    moved = move_photo(batch.video[:, :, :1], enlarge(way, *LOW))
    torch.testing.assert_close(
        loss - unknown,
        0.5 * (displacement_loss(way, batch.displacement) - photometric_loss(moved, batch.video)),
        rtol=1e-3,
        atol=1e-4,
    )


def test_clips_of_unknown_motion_teach_displacement_by_their_pixels():
    task = make_task(objective=Stage1Objective(error_of="clean"))
    batch = load_frames(task)
    assert batch.displacement is not None
    task.loss(replace(batch, displacement=None), draw()).sum().backward()  # type: ignore[no-untyped-call]
    gradient = task.model.proj_out.bias.grad
    assert gradient is not None
    assert (gradient.view(4, 197)[:, :5].abs().amax(dim=0) > 0).all()
    # The better a displacement, the less its error: at the truth, half way, at rest.
    photo = batch.video[:, :, :1]
    inside = (..., slice(2, -2), slice(2, -2))
    errors = torch.stack([
        photometric_loss(move_photo(photo, part * batch.displacement)[inside], batch.video[inside])
        for part in (1.0, 0.5, 0.0)
    ]).mean(dim=1)  # fmt: skip
    assert errors[0] < errors[1] < errors[2]


def test_a_new_model_begins_with_the_photo_at_rest_and_learns_displacement():
    task = make_task(objective=Stage1Objective(error_of="clean"))
    batch, own = load_frames(task), draw()
    loss = task.loss(batch, own)
    latents = task.source.encode(batch)[0]
    still = (latents - latents[:, :, :1]).square().flatten(1).mean(dim=1)
    assert batch.displacement is not None
    away = displacement_loss(torch.zeros(7, 2, 9, 4, 4), batch.displacement)
    torch.testing.assert_close(loss, still + away, rtol=1e-4, atol=1e-5)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    gradient = task.model.proj_out.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    # Each 2x2 patch of tokens: 5 channels of motion and 192 latents to add.
    by_channel = gradient.view(4, 197, -1).abs().amax(dim=(0, 2))
    assert (by_channel[:5] > 0).all()
    assert (by_channel[5:] > 0).any()


class Always(EncodedStage1):
    """The same batch in every step."""

    def __init__(self, source: EncodedStage1, batch: Stage1Frames) -> None:
        super().__init__(source.frames, source.pipeline, source.stage1)
        self.batch = batch

    def load(self, draw: Draw) -> Stage1Frames:
        return self.batch


@pytest.mark.slow
def test_training_lowers_the_error(tmp_path):
    """At first of the displacement: prompts are told apart by their embeddings."""
    task = make_task(objective=Stage1Objective(error_of="clean"))
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=5, weight_decay=0.0)
    phases = (PhaseConfig(steps=30, optimizer=optimizer),)
    frozen = load_frames(task)
    before = float(task.loss(frozen, draw()).mean().detach())
    source: Any = task.source
    task.sources = (Always(source, frozen),)
    make_trainer(tmp_path, task, phases, batch_size=7, ema_decay=None).run()
    assert float(task.loss(frozen, draw()).mean().detach()) < 0.7 * before
    assert losses(tmp_path)[-1] < 0.7 * losses(tmp_path)[0]


@pytest.mark.parametrize("kind", ["wan", "block"])
def test_wan_models_train_on_photos_prompts_and_image_embeddings(kind, tmp_path):
    vae: VideoVAE = tiny_vae() if kind == "wan" else BlockCodec()
    channels = int(vae.config["z_dim"])
    torch.manual_seed(0)
    make: Any = WanTransformer3DModel
    model = make(in_channels=2 * channels + 4, out_channels=channels, image_dim=8, **TRANSFORMER)
    photos: list[Tensor] = []

    def encode_photos(values: Tensor) -> Tensor:
        photos.append(values)
        return torch.ones(len(values), 257, 8)

    source = CameraMoveSource(SCENES, {FrameSize(32, 32): 1.0}, {5: 1.0}, {4: 1.0})
    zeros = replace(CHART, condition="zeros", motion="latents")
    pipeline = Stage1Pipeline(model, vae)
    task = Stage1Task(
        pipeline, (EncodedStage1(source, pipeline, zeros, encode_photos),), Stage1Objective(),
        zeros, lambda prompts: torch.ones(len(prompts), 3, 16),
    )  # fmt: skip
    batch = load_frames(task, draw(size=2))
    loss = task.loss(batch, draw(size=2))
    assert loss.shape == (2,)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert model.patch_embedding.weight.grad.abs().sum() > 0
    assert torch.equal(photos[0], batch.video[:, :, :1])
    assert task.validate(tmp_path) == {}
