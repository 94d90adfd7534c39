"""Task of a relay on images, and what its images may be."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from swifti2v.config import (
    AttentionConfig,
    GenerationConfig,
    Stage2Config,
    merge,
    parse_config,
)
from swifti2v.errors import ConfigError
from swifti2v.models.attention import GclfAttention
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.training.data.buckets import BucketRules
from swifti2v.training.data.clips import DataConfig
from swifti2v.training.data.crops import degrade
from swifti2v.training.data.phases import ClipsPhase
from swifti2v.training.engine.draws import Draw
from swifti2v.training.objectives import bell_weight
from swifti2v.training.relay.degradations import DegradationConfig, degrade_latents
from swifti2v.training.relay.image_task import ImageObjective, ImageTask
from swifti2v.training.relay.training import RelayConfig
from swifti2v.training.stages.batches import VideoBatch
from swifti2v.training.stages.latents import encode_clips
from tests.helpers.tiny import SETTINGS, TRANSFORMER, tiny_components

DRAW = Draw(seed=3, step=5, batch_size=2, indices=(0, 1))


def make_batch(side: int = 64) -> VideoBatch:
    video = torch.rand(2, 3, 1, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return VideoBatch(ids=("a", "b"), num_replaced=0, video=video, prompts=("one", "two"))


def make_task(
    objective: ImageObjective,
    *,
    in_channels: int = 1536,
    parameterization: str = "velocity",
    **stage2: Any,
) -> ImageTask:
    torch.manual_seed(0)
    parts = tiny_components()
    transformer = SegmentTransformer3DModel(
        in_channels=in_channels, out_channels=768, **TRANSFORMER
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    sampling = {"parameterization": parameterization}
    values = merge(SETTINGS, {"stage2": {**stage2, "sampling": sampling}})
    config = parse_config(GenerationConfig, values, "test")
    return ImageTask(
        transformer.eval(),
        parts.stage2_vae,
        (),
        objective,
        config,
        lambda prompts: torch.ones(len(prompts), 4, 16),
    )


@torch.no_grad()
def run(task: ImageTask, noisy: torch.Tensor, sigma: torch.Tensor, beside: Any) -> torch.Tensor:
    """The transformer's output for one frame, without any of the code under test."""
    hidden = noisy if beside is None else torch.cat([noisy, beside], dim=1)
    output: torch.Tensor = task.model(
        hidden, sigma[:, None], torch.ones(2, 4, 16), temporal_positions=range(1)
    )
    return output


@torch.no_grad()
@pytest.mark.parametrize("in_channels", [768, 1536])
@pytest.mark.parametrize("error_of", ["velocity", "clean"])
def test_flow_is_that_of_a_clip_of_one_frame(in_channels: int, error_of: Any) -> None:
    task, batch = (
        make_task(ImageObjective(error_of=error_of), in_channels=in_channels),
        make_batch(),
    )
    loss = task.loss(batch, DRAW)
    latents = encode_clips(task.vae, batch.video)
    assert latents.shape == (2, 768, 1, 8, 8)
    beside = (
        encode_clips(task.vae, degrade(batch.video, 4, Stage2Config(reference_start="motion")))
        if in_channels == 1536
        else None
    )
    sigma, noise = task.draw_sigma(DRAW), DRAW.noise_like(latents)
    level = sigma[:, None, None, None, None]
    velocity = run(task, (1 - level) * latents + level * noise, sigma, beside)
    error = (velocity - (noise - latents)).square().mean(dim=(1, 2, 3, 4))
    expected = error if error_of == "velocity" else error * sigma**2
    torch.testing.assert_close(loss, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "degradation", [DegradationConfig(), DegradationConfig(kind="blur"), None], ids=str
)
@pytest.mark.parametrize("parameterization", ["velocity", "reference_residual"])
def test_hfato_starts_without_detail_and_asks_for_it(
    degradation: DegradationConfig | None, parameterization: str
) -> None:
    objective = ImageObjective(loss="hfato", degradation=degradation)
    task, batch = make_task(objective, parameterization=parameterization), make_batch()
    loss = task.loss(batch, DRAW)
    latents = encode_clips(task.vae, batch.video)
    beside = encode_clips(task.vae, degrade(batch.video, 4, Stage2Config(reference_start="motion")))
    start = beside if degradation is None else degrade_latents(latents, degradation)
    sigma, noise = task.draw_sigma(DRAW), DRAW.noise_like(latents)
    level = sigma[:, None, None, None, None]
    noisy = (1 - level) * start + level * noise
    output = run(task, noisy, sigma, beside)
    clean = noisy - level * output if parameterization == "velocity" else beside + output
    expected = bell_weight(sigma) * (clean - latents).square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["down_up", "noise"])
def test_samples_do_not_depend_on_how_a_step_is_divided(kind: Any) -> None:
    objective = ImageObjective(loss="hfato", degradation=DegradationConfig(kind=kind))
    task, batch = make_task(objective), make_batch()
    whole = task.loss(batch, DRAW)
    for index in range(2):
        one = replace(
            batch, video=batch.video[index : index + 1], prompts=batch.prompts[index : index + 1]
        )
        torch.testing.assert_close(
            task.loss(one, replace(DRAW, indices=(index,))), whole[index : index + 1]
        )


@torch.no_grad()
def test_attention_and_channel_weights_are_those_asked_for() -> None:
    batch = make_batch()
    plain = make_task(ImageObjective(loss="hfato"))
    gclf = AttentionConfig(kind="gclf", window=(2, 2))
    coarse = make_task(ImageObjective(loss="hfato"), attention={"kind": "gclf", "window": (2, 2)})
    weighted = make_task(ImageObjective(loss="hfato", channel_weight_limit=2.0))
    losses = [task.loss(batch, DRAW) for task in (plain, coarse, weighted)]
    assert not torch.allclose(losses[0], losses[1])
    # The tiny codec scales all channels alike, so all weights are 1.
    torch.testing.assert_close(losses[0], losses[2])
    attention: Any = coarse.model.blocks[0].attn1
    assert attention.processor == GclfAttention(gclf, 4, 4)


def test_buckets_of_a_relay_hold_images() -> None:
    def relay(bucket: tuple[int, int, int], crop: int | None) -> RelayConfig:
        data = DataConfig(rules=BucketRules(buckets=(bucket,)))
        return RelayConfig(phases=(ClipsPhase(steps=1, data=data),), crop=crop)

    relay((1, 32, 64), 32)
    with pytest.raises(ConfigError, match="bucket 5x32x32 is one of clips"):
        relay((5, 32, 32), None)
    with pytest.raises(ConfigError, match="crop 33 is larger than the bucket 64x32"):
        relay((1, 32, 64), 33)
