"""The structured start of nano's Stage II, and the ridge regression of an output layer."""

from typing import Any

import pytest
import torch
from torch import nn

from swifti2v.models.codec import BlockCodec
from swifti2v.models.text import encode_prompt
from swifti2v.sampling import plan_sigmas
from swifti2v.training.data import make_procedural_material
from swifti2v.training.draws import Draw
from swifti2v.training.initialization import (
    CHANNELS,
    LOW_CHANNELS,
    fit_output_layer,
    initialize_stage2,
)
from swifti2v.training.nano_codec import fit_codec, measure_residual
from swifti2v.training.nano_config import INFERENCE_LEVELS, NanoConfig, TextEncoderConfig
from swifti2v.training.nano_models import TransformerSize, make_stage2_transformer
from swifti2v.training.stage2 import Stage2Objective, Stage2Task
from swifti2v.training.stage2_sources import MaterialSource, MixConfig
from swifti2v.training.text_encoder import MotionClassifier, make_tokenizer

SIZE = TransformerSize(num_heads=2, num_layers=2)
TEXT_WIDTH = 32
MATERIAL = make_procedural_material(height=64, width=64, num_frames=17, num_clips=2, seed=0)


@pytest.fixture(scope="module")
def codec() -> BlockCodec:
    return fit_codec(MATERIAL.clips)


def draw(step: int, size: int) -> Draw:
    return Draw(seed=0, step=step, batch_size=size, indices=tuple(range(size)))


def test_a_prompt_does_not_change_stage2(codec: BlockCodec) -> None:
    torch.manual_seed(0)
    model = make_stage2_transformer(SIZE, TEXT_WIDTH)
    sigmas = torch.tensor(plan_sigmas(4)[:-1])
    initialize_stage2(model, torch.rand(CHANNELS), sigmas)
    nn.init.normal_(model.proj_out.weight)
    hidden_states = torch.randn(1, 2 * CHANNELS, 3, 4, 4)
    sigma = torch.tensor([[0.0, 0.9, 0.9]])
    tokenizer, encoder = (
        make_tokenizer(),
        MotionClassifier(TextEncoderConfig(width=32, num_layers=1)).encoder,
    )
    prompt = encode_prompt(encoder, tokenizer, ["zoom in"], 40)
    with torch.no_grad():
        with_prompt = model(hidden_states, sigma, prompt)
        without = model(hidden_states, sigma, torch.zeros(1, 1, TEXT_WIDTH))
    # Rounding only: attention to one token or to many equal ones.
    torch.testing.assert_close(with_prompt, without, atol=1e-4, rtol=1e-4)


def test_tokens_start_with_the_low_frequencies_of_their_reference() -> None:
    """Which those are is read from the codec: a smooth picture has all of its energy in them."""
    torch.manual_seed(0)
    model: Any = make_stage2_transformer(SIZE, TEXT_WIDTH)
    initialize_stage2(model, torch.rand(CHANNELS), torch.tensor(plan_sigmas(4)[:-1]))
    ramp = torch.linspace(-0.5, 0.5, 32)
    colours = torch.tensor([[1.0, 0.3, -0.8], [0.5, -0.9, 0.2]])
    picture = colours[0][:, None, None] * ramp + colours[1][:, None, None] * ramp[:, None]
    reference = BlockCodec().encode_frames(picture[None, :, None])
    low = list(LOW_CHANNELS)
    assert reference[:, low].square().sum() > 0.98 * reference.square().sum()
    for channel in (0, CHANNELS // 3, CHANNELS * 2 // 3):  # the means of luma, Cb and Cr
        assert channel in low
    noise = torch.randn(reference.shape)
    tokens = model.patch_embedding(torch.cat([noise, reference], dim=1))[0, : 4 * len(low), 0]
    for patch in range(4):
        own = reference[0, low, 0, patch // 2 :: 2, patch % 2 :: 2]
        found = tokens[patch * len(low) : (patch + 1) * len(low)]
        torch.testing.assert_close(found, 0.7 * own, atol=1e-5, rtol=1e-5)


def test_stage2_starts_with_clean_frames_flagged() -> None:
    torch.manual_seed(0)
    model = make_stage2_transformer(SIZE, TEXT_WIDTH)
    sigmas = torch.tensor(plan_sigmas(4)[:-1])
    initialize_stage2(model, torch.rand(CHANNELS), sigmas)
    embedder = model.condition_embedder
    levels = torch.cat([torch.zeros(1), sigmas]) * 1000
    features = embedder.act_fn(embedder.time_embedder(embedder.timesteps_proj(levels)))
    flag = embedder.time_proj(features)[:, 127]
    torch.testing.assert_close(flag, torch.tensor([3.0, -3, -3, -3, -3]), atol=1e-2, rtol=0)


def test_ridge_fit_beats_the_reference(codec: BlockCodec) -> None:
    torch.manual_seed(0)
    model = make_stage2_transformer(SIZE, TEXT_WIDTH)
    energy = measure_residual(MATERIAL.clips, 4)
    initialize_stage2(model, energy, torch.tensor(plan_sigmas(4)[:-1]))
    task = Stage2Task(
        model,
        codec,
        (MaterialSource(MATERIAL, (), MixConfig(), 32, 4, {17: 1.0}),),
        Stage2Objective(noise=INFERENCE_LEVELS, channel_weight_limit=2.0),
        NanoConfig().to_generation_config().stage2,
        lambda prompts: torch.zeros(len(prompts), 1, TEXT_WIDTH),
    )
    draws = [draw(100 + k, 2) for k in range(4)]

    @torch.no_grad()
    def measure() -> float:
        return sum(float(task.loss(task.load_batch(own), own).sum()) for own in draws)

    before = measure()  # the output is zero: the reference as it is
    fit_output_layer(model, (task.draw_fit_sample(draw(k, 2)) for k in range(60)))
    assert measure() < before
