"""The start of nano's Stage II: principal components of its references, and neighbours."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swifti2v.models.text import encode_prompt
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.training.nano.codec import fit_codec
from swifti2v.training.nano.config import TextEncoderConfig
from swifti2v.training.nano.initialization import (
    NEIGHBOURS,
    initialize_stage2,
    principal_components,
)
from swifti2v.training.nano.material import make_procedural_material
from swifti2v.training.nano.models import NanoSize, make_stage2_transformer, transformer_config
from swifti2v.training.nano.text_encoder import MotionClassifier, make_tokenizer
from swifti2v.training.stages.latents import encode_window

SIZE = NanoSize(num_heads=2, num_layers=2)
TEXT_WIDTH = 32
MATERIAL = make_procedural_material(height=64, width=64, num_frames=17, num_clips=2, seed=0)


@pytest.fixture(scope="module", params=[192, pytest.param(768, marks=pytest.mark.slow)])
def references(request: pytest.FixtureRequest) -> list[Tensor]:
    """Windows of latents of noise, so that they vary in every direction, or their first channels."""
    codec: BlockCodec = fit_codec(MATERIAL.clips)
    generator = torch.Generator().manual_seed(0)
    windows = []
    for _ in range(3):
        video = torch.rand(2, 3, 9, 32, 64, generator=generator) * 2 - 1
        windows.append(encode_window(codec, video)[:, : request.param])
    return windows


def make_model(references: list[Tensor], size: NanoSize = SIZE) -> Any:
    torch.manual_seed(0)
    channels = references[0].shape[1]
    model: Any = make_stage2_transformer(size, TEXT_WIDTH)
    if channels < model.config["out_channels"]:
        model = SegmentTransformer3DModel(
            **transformer_config(size, TEXT_WIDTH), in_channels=2 * channels, out_channels=channels
        )
        nn.init.zeros_(model.proj_out.weight)
        nn.init.zeros_(model.proj_out.bias)
    initialize_stage2(model, references)
    return model


def draw_input(references: list[Tensor], *size: int) -> Tensor:
    """``[1, 2C, F, h, w]`` noise for a model of these references."""
    return torch.randn(1, 2 * references[0].shape[1], *size)


def test_components_are_uncorrelated_and_in_order(references: list[Tensor]) -> None:
    rows, mean = principal_components(references, 2, 16)
    assert rows.shape == (16, 4 * references[0].shape[1])
    frames = torch.cat([window.transpose(1, 2).flatten(0, 1) for window in references])
    tokens = nn.functional.pixel_unshuffle(frames, 2).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(mean, tokens.mean(dim=0))
    values = (tokens - mean) @ rows.T
    covariance = values.T @ values / len(values)
    deviations = covariance.diagonal()
    assert (deviations.diff() < 1e-3 * deviations[0]).all()
    assert (covariance - torch.diag(deviations)).abs().max() < 1e-2 * deviations[0]
    # Half whitened: the variance of a component is the root of its own.
    plain = rows / rows.norm(dim=1, keepdim=True)
    own = ((tokens - mean) @ plain.T).square().mean(dim=0)
    torch.testing.assert_close(deviations, own.sqrt(), rtol=1e-3, atol=0)


@torch.no_grad()
def test_tokens_start_with_their_reference_and_without_the_noise(references: list[Tensor]) -> None:
    model = make_model(references)
    reference = references[0]
    first, second = (
        model.patch_embedding(torch.cat([torch.randn(reference.shape), reference], dim=1))
        for _ in range(2)
    )
    torch.testing.assert_close(first, second)
    rows, mean = principal_components(references, 2, 128)
    window = nn.functional.pixel_unshuffle(reference.transpose(1, 2), 2)  # [B, F, 4C, h, w]
    expected = torch.einsum("kc,bfchw->bkfhw", rows, window - mean[:, None, None])
    torch.testing.assert_close(first, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_each_head_looks_at_its_neighbour(references: list[Tensor]) -> None:
    number = len(NEIGHBOURS)
    model = make_model(references, NanoSize(num_heads=number, num_layers=1))
    attention, sizes = model.blocks[0].attn1, (3, 5, 6)
    for layer in (attention.to_v, attention.to_out[0]):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    tokens = torch.randn(1, 3 * 5 * 6, 64 * number)
    grid = draw_input(references, 3, 10, 12)
    seen = attention(tokens, None, None, model.rope(grid))
    places = torch.cartesian_prod(*map(torch.arange, sizes))
    for head, (frames, rows, columns) in enumerate(NEIGHBOURS):
        part = slice(64 * head, 64 * head + 64)
        found = (seen[0, :, part] @ tokens[0, :, part].T).argmax(dim=1)
        offset = torch.tensor([frames or 0, rows, columns])
        wanted = places + offset
        there = ((wanted >= 0) & (wanted < torch.tensor(sizes))).all(dim=1)
        is_right = places[found] == wanted
        if frames is None:  # any frame will do
            is_right = is_right[:, 1:]
        assert is_right.all(dim=1)[there].float().mean() > 0.9


def test_a_prompt_does_not_change_stage2(references: list[Tensor]) -> None:
    model = make_model(references)
    nn.init.normal_(model.proj_out.weight)
    hidden_states = draw_input(references, 3, 4, 4)
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


def test_it_begins_with_the_reference_as_it_is(references: list[Tensor]) -> None:
    model = make_model(references)
    hidden_states = draw_input(references, 3, 4, 4)
    with torch.no_grad():
        output = model(hidden_states, torch.full((1, 3), 0.5), torch.zeros(1, 1, TEXT_WIDTH))
    assert not output.any()
