"""Stage II's task: what reaches the transformer, what is measured, with either kind of VAE."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swifti2v.config import SamplingConfig, Stage2Config
from swifti2v.errors import ConfigError
from swifti2v.media import frames_to_video
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.models.vae.streaming import StreamingEncoder
from swifti2v.segments import Segment, plan_segments
from swifti2v.shapes import pixel_frames
from swifti2v.training.channel_weights import weigh_channels
from swifti2v.training.data.crops import degrade
from swifti2v.training.engine.draws import Draw, draws_of_step, split_batch
from swifti2v.training.engine.optimizers import OptimizerConfig
from swifti2v.training.engine.run_config import PhaseConfig
from swifti2v.training.nano.codec import fit_codec
from swifti2v.training.nano.material import make_procedural_material
from swifti2v.training.nano.material_source import MaterialSource, MixConfig
from swifti2v.training.objectives import ErrorMeasure, segment_flow_loss
from swifti2v.training.stages.batches import Stage2Frames
from swifti2v.training.stages.encoded_clips import EncodedStage2
from swifti2v.training.stages.noise_levels import NoiseLevelConfig
from swifti2v.training.stages.stage2 import Stage2Objective, Stage2Task
from swifti2v.training.windows import WindowConfig, draw_window
from tests.helpers.regression import assert_same, losses, make_trainer
from tests.helpers.tiny import TRANSFORMER, tiny_vae

NUM_FRAMES, CROP = 17, 32
MATERIAL = make_procedural_material(height=48, width=48, num_frames=17, num_clips=2, seed=0)
CODEC = fit_codec(MATERIAL.clips)
RESIDUAL = SamplingConfig(parameterization="reference_residual")
PHASES = (
    PhaseConfig(
        steps=6, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1, weight_decay=0.0)
    ),
)


def make_transformer(channels: int = 768, **size: int) -> SegmentTransformer3DModel:
    torch.manual_seed(0)
    model: SegmentTransformer3DModel = SegmentTransformer3DModel(
        in_channels=2 * channels, out_channels=channels, **{**TRANSFORMER, **size}
    )
    return model


def encode_prompts(prompts: tuple[str, ...]) -> Tensor:
    lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
    return lengths[:, None, None].expand(-1, 3, 16)


def make_task(
    objective: Stage2Objective | None = None,
    vae: VideoVAE = CODEC,
    sources: Any = None,
    **stage2: Any,
) -> Stage2Task:
    mix, own = MixConfig(clips=1, pictures=1), Stage2Config(**{"sampling": RESIDUAL, **stage2})
    objective = objective or Stage2Objective(windows=WindowConfig(segment_sizes=(2, 1)))
    frames = MaterialSource(MATERIAL, (), mix, CROP, 4, {NUM_FRAMES: 1.0}, objective.windows, own)
    return Stage2Task(
        make_transformer(int(vae.config["z_dim"])),
        vae,
        tuple(EncodedStage2(source, vae) for source in sources or (frames,)),
        objective,
        own,
        encode_prompts,
    )


def draw(step: int = 0, size: int = 3) -> Draw:
    return Draw(seed=0, step=step, batch_size=size, indices=tuple(range(size)))


def load_later_segment(task: Stage2Task) -> tuple[Stage2Frames, Draw]:
    """A batch whose window leaves frames out between anchor and context."""
    for step in range(100):
        batch = task.load_batch(draw(step))
        assert isinstance(batch, Stage2Frames)
        if batch.segment.context and batch.segment.context[0] > 1:
            return batch, draw(step)
    raise AssertionError("no later segment is drawn")


def record(task: Stage2Task) -> list[tuple[Tensor, Tensor, Tensor, list[int]]]:
    """Latents with reference, noise levels, prompt and positions of each call of the transformer."""
    seen: list[tuple[Tensor, Tensor, Tensor, list[int]]] = []

    def keep(_: object, values: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        seen.append((values[0], values[1], values[2], list(named["temporal_positions"])))

    task.model.register_forward_pre_hook(keep, with_kwargs=True)
    return seen


@pytest.mark.slow
def test_windows_are_those_of_sampling():
    task = make_task()
    plans = [plan_segments(5, size, 1) for size in (1, 2)]
    seen = {task.load_batch(draw(step)).segment for step in range(60)}
    assert seen == {segment for plan in plans for segment in plan}


def test_given_frames_reach_the_transformer_as_they_are_with_sigma_0():
    task = make_task()
    seen = record(task)
    batch, own = load_later_segment(task)
    task.loss(batch, own)
    ((inputs, sigma, prompt, positions),) = seen
    latents, reference = task.source.encode(batch)
    given = 1 + len(batch.segment.context)
    assert given == 2
    assert torch.equal(inputs[:, :768, :given], latents[:, :, :given])
    assert torch.equal(inputs[:, 768:], reference)
    assert torch.equal(sigma[:, :given], torch.zeros(3, given))
    assert torch.equal(sigma[:, given:], task.draw_sigma(own)[:, None].expand_as(sigma[:, given:]))
    assert not torch.equal(inputs[:, :768, given:], latents[:, :, given:])
    assert positions == list(range(len(batch.segment.window)))
    assert torch.equal(prompt, encode_prompts(batch.prompts))


def test_the_open_points_get_through():
    task = make_task(
        temporal_positions="absolute", context_reference="finished", clean_sigma="target"
    )
    seen = record(task)
    batch, own = load_later_segment(task)
    task.loss(batch, own)
    ((inputs, sigma, _, positions),) = seen
    latents, reference = task.source.encode(batch)
    assert positions == list(batch.segment.window)
    assert positions[1] > 1
    assert torch.equal(inputs[:, 768:, :2], latents[:, :, :2])
    assert torch.equal(inputs[:, 768:, 2:], reference[:, :, 2:])
    assert torch.equal(sigma, task.draw_sigma(own)[:, None].expand_as(sigma))


@pytest.mark.parametrize("parameterization", ["velocity", "reference_residual"])
@pytest.mark.parametrize(("limit", "error"), [(None, "squared"), (2.0, "squared"), (2.0, "root")])
def test_the_loss_is_the_segments_flow_loss(parameterization, limit, error):
    objective = Stage2Objective(
        windows=WindowConfig(segment_sizes=(2,)), channel_weight_limit=limit, error=error
    )
    task = make_task(objective, sampling=SamplingConfig(parameterization=parameterization))
    batch, own = load_later_segment(task)
    window = list(batch.segment.window)
    found = task.source.encode(batch)
    latents, reference, noise = (torch.randn(3, 768, 5, 4, 4) for _ in range(3))
    for whole, part in zip(
        (latents, reference, noise), (*found, own.noise_like(found[0])), strict=True
    ):
        whole[:, :, window] = part
    embeds = encode_prompts(batch.prompts)

    def model(hidden_states: Tensor, sigma: Tensor) -> Tensor:
        output: Tensor = task.model(hidden_states, sigma, embeds)
        return output

    expected = segment_flow_loss(
        model, latents, reference, batch.segment, task.draw_sigma(own), noise,
        parameterization=parameterization,
        measure=ErrorMeasure(None if limit is None else weigh_channels(CODEC, limit), error),
    )  # fmt: skip
    loss = task.loss(batch, own)
    assert loss.shape == (3,)
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad


@pytest.mark.slow
def test_a_resumed_training_is_bitwise_equal_at_nanos_width(tmp_path):
    """There the modulation of a step has so many values that several threads add it up."""

    def make() -> Stage2Task:
        task = make_task(Stage2Objective(windows=WindowConfig(segment_sizes=(4,))))
        task.model = make_transformer(
            num_attention_heads=6, attention_head_dim=64, ffn_dim=1536, freq_dim=64
        )
        return task

    num_threads, run = torch.get_num_threads(), dict[str, Any](batch_size=4, ema_decay=0.9)
    torch.set_num_threads(2)
    try:
        straight = make_trainer(tmp_path / "straight", make(), PHASES, **run)
        straight.run()
        make_trainer(tmp_path / "stopped", make(), PHASES, **run).run(max_steps=3)
        continued = make_trainer(tmp_path / "stopped", make(), PHASES, **run)
        continued.run(resume=True)
    finally:
        torch.set_num_threads(num_threads)
    assert_same(continued, straight)


def test_the_loss_is_taken_on_the_window_where_asked():
    windows = WindowConfig(segment_sizes=(2,))
    losses = []
    for frames in ("target", "window"):
        task = make_task(Stage2Objective(windows=windows, loss_on=frames))
        losses.append(task.loss(*load_later_segment(task)))
    assert not torch.isclose(losses[0], losses[1]).any()


def test_noise_levels_are_spread_over_the_whole_step():
    noise = NoiseLevelConfig(distribution="inference", num_inference_steps=4)
    task = make_task(Stage2Objective(noise=noise))
    parts = split_batch(4, 2, 2)
    levels = [
        float(level)
        for rank in range(2)
        for own in draws_of_step(0, 7, parts, rank)
        for level in task.draw_sigma(own)
    ]
    assert len(set(levels)) == 4  # one of each
    plain = make_task(Stage2Objective(noise=replace(noise, stratified=False)))
    drawn = [len(set(plain.draw_sigma(draw(step, 4)).tolist())) for step in range(20)]
    assert min(drawn) < 4


@pytest.mark.slow
def test_phases_have_their_own_sources_and_lengths():
    whole = WindowConfig(segment_sizes=(99,))
    sources = tuple(
        MaterialSource(MATERIAL, (), mix, CROP, 4, lengths, whole, Stage2Config())
        for mix, lengths in (
            (MixConfig(clips=1), {9: 1.0}),
            (MixConfig(clips=0, pictures=1), {13: 0.5, 17: 0.5}),
        )
    )
    task = make_task(sources=sources)
    for phase, kind, frames in ((0, "clip", {3}), (1, "picture", {4, 5})):
        task.enter_phase(phase)
        batches = [task.load_batch(draw(step)) for step in range(20)]
        assert {len(batch.segment.window) for batch in batches} == frames
        assert all(name.startswith(kind) for batch in batches for name in batch.ids)


class CoveringSource:
    """All frames of a clip up to the window's end, for a causal VAE."""

    def load(self, draw: Draw) -> Stage2Frames:
        windows = WindowConfig(segment_sizes=(2, 1))
        return self.cut(draw, draw_window(windows, Stage2Config(), 5, draw.shared()))

    def cut(self, draw: Draw, segment: Segment) -> Stage2Frames:
        covered = tuple(range(segment.window[-1] + 1))
        frames = [pixel for latent in covered for pixel in pixel_frames(latent)]
        clips = [MATERIAL.clips[index % 2] for index in draw.indices]
        video = torch.cat([frames_to_video(clip[frames, :CROP, :CROP]) for clip in clips])
        return Stage2Frames(
            ids=tuple(f"clip {index}" for index in draw.indices),
            num_replaced=0,
            segment=segment,
            latent_frames=covered,
            video=video,
            reference=degrade(video, 4),
            prompts=("",) * len(clips),
        )


def test_a_causal_vae_gives_the_windows_latents_of_the_whole_clip():
    vae = tiny_vae()
    whole = frames_to_video(MATERIAL.clips[0][:, :CROP, :CROP])
    expected = StreamingEncoder(vae).encode(whole)
    for segment in plan_segments(5, 2, 1):
        batch = CoveringSource().cut(draw(size=1), segment)
        found, _ = EncodedStage2(CoveringSource(), vae).encode(batch)
        assert found.shape == (1, 16, len(segment.window), 4, 4)
        torch.testing.assert_close(found, expected[:, :, list(segment.window)], atol=1e-5, rtol=0)


def test_a_causal_vae_trains():
    task = make_task(vae=tiny_vae(), sources=(CoveringSource(),))
    batch, own = load_later_segment(task)
    loss = task.loss(batch, own)
    assert loss.shape == (3,)
    assert loss.isfinite().all()
    loss.sum().backward()  # type: ignore[no-untyped-call]
    gradient = task.model.patch_embedding.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_a_causal_vae_is_refused_the_window_alone():
    task = make_task(vae=tiny_vae())
    with pytest.raises(ConfigError, match=r"a causal VAE needs the frames before .* alone"):
        task.loss(*load_later_segment(task))


def test_only_a_block_codecs_channels_can_be_weighed():
    with pytest.raises(ConfigError, match="channel_weight_limit is 2"):
        make_task(Stage2Objective(channel_weight_limit=2.0), vae=tiny_vae())


def test_the_block_codec_may_be_given_more_than_the_window():
    batch = CoveringSource().cut(draw(size=2), plan_segments(5, 2, 1)[1])
    found, _ = EncodedStage2(CoveringSource(), CODEC).encode(batch)
    whole = torch.cat([frames_to_video(clip[:, :CROP, :CROP]) for clip in MATERIAL.clips])
    expected = StreamingEncoder(CODEC).encode(whole)[:, :, list(batch.segment.window)]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_validation_is_the_given_one(tmp_path):
    task = make_task()
    assert task.validate(tmp_path) == {}
    own = Stage2Task(
        task.model, CODEC, task.sources, task.objective, task.stage2,
        encode_prompts, validate=lambda path: {"psnr": float(len(path.name))},
    )  # fmt: skip
    assert own.validate(Path("four")) == {"psnr": 4.0}


@pytest.mark.slow
@pytest.mark.parametrize("num_before", [1, 3])
def test_a_stopped_training_continues_bit_by_bit(tmp_path, num_before):
    settings: dict[str, Any] = {"batch_size": 4, "ema_decay": 0.9}
    straight = make_trainer(tmp_path / "straight", make_task(), PHASES, **settings)
    straight.run()
    make_trainer(tmp_path / "stopped", make_task(), PHASES, **settings).run(max_steps=num_before)
    continued = make_trainer(tmp_path / "stopped", make_task(), PHASES, **settings)
    continued.run(resume=True)
    assert_same(continued, straight)
    assert len(set(losses(tmp_path / "straight"))) == 6


@pytest.mark.slow
def test_divided_and_loaded_by_workers_the_losses_are_the_same(tmp_path):
    cases: dict[str, dict[str, Any]] = {
        "one": {},
        "micro": {"num_micro_batches": 2},
        "workers": {"num_workers": 2},
        "recomputed": {"gradient_checkpointing": True},
        "bfloat16": {"precision": "bfloat16"},
    }
    for name, settings in cases.items():
        make_trainer(tmp_path / name, make_task(), PHASES, batch_size=4, **settings).run(
            max_steps=3
        )
    one = losses(tmp_path / "one")
    assert losses(tmp_path / "workers") == one
    assert losses(tmp_path / "recomputed") == pytest.approx(one, rel=1e-5)
    assert losses(tmp_path / "micro") == pytest.approx(one, rel=1e-4)
    assert losses(tmp_path / "bfloat16") == pytest.approx(one, rel=0.03)


def test_a_codec_of_other_cells_trains_too():
    codec = BlockCodec(z_dim=192, scale_factor_spatial=4)
    task = make_task(vae=codec)
    batch, own = load_later_segment(task)
    assert task.source.encode(batch)[0].shape[-2:] == (8, 8)
    assert task.loss(batch, own).isfinite().all()
