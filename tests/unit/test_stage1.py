"""Stage I's task and its clips: the pipeline's condition, seven motions over one view."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swifti2v.config import SamplingConfig, Stage1Config
from swifti2v.models.codec import BlockCodec
from swifti2v.models.frame_codec import VideoVAE
from swifti2v.models.vae import StreamingEncoder
from swifti2v.pipelines.stage1 import Stage1Pipeline
from swifti2v.shapes import LatentShape
from swifti2v.training.camera_motion import CAMERA_MOTIONS
from swifti2v.training.data import make_procedural_material
from swifti2v.training.draws import Draw, draws_of_step, split_batch
from swifti2v.training.motion_phases import FeatureLayout, initialize_stage1, make_phases
from swifti2v.training.nano_codec import fit_codec
from swifti2v.training.nano_models import TransformerSize, make_stage1_transformer
from swifti2v.training.optimizers import OptimizerConfig
from swifti2v.training.phases_task import PhasesTask
from swifti2v.training.run_config import PhaseConfig
from swifti2v.training.stage1 import Stage1Objective, Stage1Task
from swifti2v.training.stage1_sources import CameraMotionSource, Stage1Batch
from tests.regression import losses, make_trainer
from tests.tiny import TRANSFORMER, tiny_vae

MATERIAL = make_procedural_material(height=64, width=64, num_frames=17, num_clips=2, seed=0)
CODEC = fit_codec(MATERIAL.clips, 4, 4)
LOW = (16, 16)
NUM_LATENT_FRAMES = 5
STILL = CAMERA_MOTIONS.index("static")
CHART = Stage1Config(
    downscale=4,
    condition="chart",
    sampling=SamplingConfig(parameterization="reference_residual"),
)
TEXT = 32


def make_source(num_drawn: dict[int, float] | None = None) -> CameraMotionSource:
    return CameraMotionSource(MATERIAL.stills, LOW, NUM_LATENT_FRAMES, num_drawn or {2: 1.0})


def encode_prompts(prompts: tuple[str, ...]) -> Tensor:
    """The motion's number, told without a text encoder."""
    torch.manual_seed(0)
    table = torch.randn(200, TEXT)
    return torch.stack([table[len(prompt)].expand(2, -1) for prompt in prompts])


def make_started() -> tuple[WanTransformer3DModel, FeatureLayout]:
    torch.manual_seed(0)
    transformer = make_stage1_transformer(TransformerSize(num_heads=2, num_layers=2), TEXT)
    return transformer, initialize_stage1(transformer)


def make_task(
    num_drawn: dict[int, float] | None = None,
    objective: Stage1Objective | None = None,
    stage1: Stage1Config = CHART,
) -> Stage1Task:
    transformer = make_started()[0]
    own = objective or Stage1Objective()
    return Stage1Task(transformer, CODEC, (make_source(num_drawn),), own, stage1, encode_prompts)


def draw(step: int = 0, size: int = 7) -> Draw:
    return Draw(seed=0, step=step, batch_size=size, indices=tuple(range(size)))


def test_seven_motions_share_a_view_and_tell_their_name():
    batch = make_source().load(draw(size=14))
    assert batch.video.shape == (14, 3, 9, *LOW)
    assert batch.num_latent_frames == NUM_LATENT_FRAMES
    assert len(batch.latent_frames) == 3
    assert batch.latent_frames[0] == 0
    for view in (slice(0, 7), slice(7, 14)):
        photos = batch.video[view, :, 0]
        assert torch.equal(photos, photos[:1].expand_as(photos))
        last = batch.video[view, :, -1]
        different = (last[:, None] - last[None]).abs().amax(dim=(2, 3, 4)) > 1e-3
        assert torch.equal(different, ~torch.eye(7, dtype=torch.bool))
        clip = batch.video[view][STILL]
        torch.testing.assert_close(clip, clip[:, :1].expand_as(clip), atol=1e-5, rtol=0)
        names = {name.split(" over ")[1] for name in batch.ids[view]}
        assert len(names) == 1
    assert not torch.equal(batch.video[0, :, 0], batch.video[7, :, 0])
    assert [name.split(" over ")[0] for name in batch.ids] == [*CAMERA_MOTIONS] * 2
    for name, prompt in zip(batch.ids, batch.prompts, strict=True):
        if name.startswith(("pan", "tilt")):
            assert name.split()[1] in prompt.lower()


def test_frames_and_their_numbers_are_drawn():
    source = make_source({1: 0.75, 4: 0.25})
    drawn = [source.load(draw(step, 1)).latent_frames for step in range(80)]
    assert {len(frames) for frames in drawn} == {2, 5}
    assert 8 <= sum(len(frames) == 5 for frames in drawn) <= 32
    assert {frames[1] for frames in drawn if len(frames) == 2} == {1, 2, 3, 4}
    assert all(list(frames) == sorted(frames) for frames in drawn)


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
    for task in (whole, some):
        batch = task.load_batch(draw(5))
        assert isinstance(batch, Stage1Batch)
        found = task.prepare_condition(batch, task.encode(batch))
        for index in (0, 3):
            photo = batch.video[index : index + 1, :, :1]
            expected = pipeline.prepare_condition(photo, LatentShape(96, 5, 4, 4), stage1)
            frames = list(batch.latent_frames)
            torch.testing.assert_close(found[index : index + 1], expected[:, :, frames])
    assert len(frames) == 3


def test_latents_are_those_of_the_streamed_clip():
    task = make_task({4: 1.0})
    batch = task.load_batch(draw())
    assert isinstance(batch, Stage1Batch)
    torch.testing.assert_close(task.encode(batch), StreamingEncoder(CODEC).encode(batch.video))


@pytest.mark.parametrize("error_of", ["velocity", "clean"])
def test_the_loss_is_the_flow_loss_of_what_the_transformer_says(error_of):
    objective = Stage1Objective(error_of=error_of, channel_weight_limit=8.0)
    task = make_task(objective=objective)
    seen: list[Tensor] = []

    def keep(_: object, __: object, named: dict[str, Any], output: tuple[Tensor]) -> None:
        seen.extend((named["hidden_states"], named["timestep"], output[0]))

    task.model.register_forward_hook(keep, with_kwargs=True)
    batch, own = task.load_batch(draw()), draw()
    loss = task.loss(batch, own)
    inputs, timestep, output = seen
    latents = task.encode(batch)
    sigma, noise = task.draw_sigma(own), own.noise_like(latents)
    level = sigma[:, None, None, None, None]
    torch.testing.assert_close(timestep, 1000 * sigma)
    torch.testing.assert_close(inputs[:, :96], (1 - level) * latents + level * noise)
    clean = latents[:, :, :1] + output  # the residual to the photo
    error = (clean - latents).square() / (level.square() if error_of == "velocity" else 1)
    assert task.channel_weight is not None
    expected = (error * task.channel_weight[:, None, None, None]).flatten(1).mean(dim=1)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_a_fit_sample_wants_what_the_photo_lacks():
    task = make_task()
    sample = task.draw_fit_sample(draw())
    latents = task.encode(task.load_batch(draw()))
    assert torch.equal(sample.residual, latents - latents[:, :, :1])
    output = sample.forward()
    assert isinstance(output, Tensor)
    assert output.shape == latents.shape


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

    source = CameraMotionSource(MATERIAL.stills, (32, 32), 5, {4: 1.0})
    zeros = replace(CHART, condition="zeros")
    task = Stage1Task(
        model, vae, (source,), Stage1Objective(), zeros,
        lambda prompts: torch.ones(len(prompts), 3, 16), encode_photos,
    )  # fmt: skip
    batch = task.load_batch(draw(size=2))
    assert isinstance(batch, Stage1Batch)
    loss = task.loss(batch, draw(size=2))
    assert loss.shape == (2,)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert model.patch_embedding.weight.grad.abs().sum() > 0
    assert torch.equal(photos[0], batch.video[:, :, :1])
    assert task.validate(tmp_path) == {}


def make_phases_task() -> PhasesTask:
    transformer, layout = make_started()
    first = make_stage1_transformer(TransformerSize(num_heads=2, num_layers=1), TEXT)
    state = transformer.state_dict()
    first.load_state_dict({name: state[name] for name in first.state_dict()})
    start = Stage1Task(
        first, CODEC, (make_source({1: 1.0}),), Stage1Objective(), CHART, encode_prompts
    )
    return PhasesTask(first, layout, start)


def test_the_phases_are_those_of_motion_place_and_time():
    task = make_phases_task()
    batch, own = task.load_batch(draw()), draw()
    frame = batch.latent_frames[1]
    times = [0.0, (4 * frame - 1.5) / 16]  # the mean of its four frames
    wanted = torch.stack([make_phases(motion, times, (4, 4)) for motion in CAMERA_MOTIONS])
    block: Any = task.model.blocks[0]

    def write(_: object, __: object, tokens: Tensor) -> Tensor:
        tokens[..., task.layout.phases] = wanted
        return tokens

    before = task.loss(batch, own)
    assert before.shape == (7,)
    assert (before > 0).all()
    hook = block.register_forward_hook(write)
    torch.testing.assert_close(task.loss(batch, own), torch.zeros(7), atol=1e-6, rtol=0)
    hook.remove()


def test_training_lowers_the_error_of_the_phases(tmp_path):
    task = make_phases_task()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    optimizer = OptimizerConfig(learning_rate=5e-3, warmup_steps=5, weight_decay=0.0)
    phases = (PhaseConfig(steps=30, optimizer=optimizer),)
    make_trainer(tmp_path, task, phases, batch_size=7, ema_decay=None).run()
    assert losses(tmp_path)[-1] < 0.3 * losses(tmp_path)[0]
    changed = {
        name for name, value in task.model.state_dict().items() if not value.equal(before[name])
    }
    assert changed
    learnt = ("blocks.0.", "condition_embedder.text_embedder.")
    assert all(name.startswith(learnt) for name in changed)
