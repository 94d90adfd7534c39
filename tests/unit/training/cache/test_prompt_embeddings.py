"""Prompts from a cache instead of a text encoder."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from swifti2v.errors import InputError
from swifti2v.models.loading.components import Components
from swifti2v.models.text import encode_prompt
from swifti2v.pipelines.conditions import ConditionEncoder
from swifti2v.training.cache.prompt_embeddings import CachedPrompts, embed_prompts
from tests.helpers.tiny import tiny_components

PROMPTS = ["zoom in", "", "a prompt that is longer than the encoder takes"]


def fill(directory: Path) -> Components:
    parts = tiny_components()
    prompts = CachedPrompts(directory, parts)
    with prompts.cache:
        assert [prompts.add(parts, text) for text in (*PROMPTS, PROMPTS[0])] == [True] * 3 + [False]
    return parts


def test_embeddings_come_back_bit_by_bit(tmp_path):
    parts = fill(tmp_path)
    prompts = CachedPrompts(tmp_path, parts)
    torch.nn.Module.to(parts.text_encoder, "meta")  # it is not needed any more
    again = tiny_components()
    expected = encode_prompt(
        again.text_encoder, again.tokenizer, PROMPTS, again.max_text_length, truncate=True
    )
    assert torch.equal(prompts(PROMPTS), expected)
    assert torch.equal(embed_prompts(again, PROMPTS), expected)
    assert torch.equal(prompts(PROMPTS[1:2]), expected[1:2])


def test_only_what_a_prompt_says_is_kept(tmp_path):
    prompts = CachedPrompts(tmp_path, fill(tmp_path))
    (shard,) = (tmp_path / "prompts").glob("*.safetensors")
    tokens = len("zoom in") + 1 + 1 + prompts.max_length  # each with its end token, one cut off
    assert shard.stat().st_size < tokens * 16 * 4 + 1200


def test_autocast_does_not_round_embeddings():
    parts = tiny_components()
    with torch.autocast("cpu", torch.bfloat16):
        embeds = embed_prompts(parts, PROMPTS)
    assert embeds.dtype == torch.float32
    assert torch.equal(embeds, embed_prompts(parts, PROMPTS))


def test_a_pipeline_takes_its_prompts_from_it(tmp_path):
    parts = fill(tmp_path)
    image = Image.new("RGB", (8, 8))
    expected = ConditionEncoder(parts, truncate_prompt=True)(image, PROMPTS[0], PROMPTS[1])
    encoder = ConditionEncoder(parts, CachedPrompts(tmp_path, parts))
    torch.nn.Module.to(parts.text_encoder, "meta")
    found = encoder(image, PROMPTS[0], PROMPTS[1])
    assert torch.equal(found.prompt_embeds, expected.prompt_embeds)
    assert found.negative_prompt_embeds is not None
    assert expected.negative_prompt_embeds is not None
    assert torch.equal(found.negative_prompt_embeds, expected.negative_prompt_embeds)


def test_a_missing_prompt_and_another_encoder_are_refused(tmp_path):
    prompts = CachedPrompts(tmp_path, fill(tmp_path))
    with pytest.raises(InputError, match="does not hold the prompt 'pan left'; run `swifti2v data"):
        prompts(["zoom in", "pan left"])
    with pytest.raises(InputError, match="lacks 2 prompts, such as 'pan left'; run `swifti2v data"):
        prompts.require_all(["tilt", "zoom in", "pan left", "tilt"])
    prompts.require_all(PROMPTS)
    with pytest.raises(InputError, match=r"text_encoder is .* there and .* now"):
        CachedPrompts(tmp_path, tiny_components(seed=1))
