import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from safetensors.torch import load_file, save_file
from transformers import (
    ByT5Tokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from swifti2v.errors import LoadingError, NumericalError, PromptError
from swifti2v.models.fingerprints import fingerprint_encoder
from swifti2v.models.text import (
    PromptCache,
    clean_prompt,
    doubt_prompt,
    encode_prompt,
    tokenize_prompts,
)

PROMPTS = ["a cat   walks", "", "fish &amp; chips \u201chot\u201d\n"]


def make_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    if kind == "byt5":
        return ByT5Tokenizer(extra_ids=0)
    letters = [(letter, -3.0) for letter in 'abcdefghijklmnopqrstuvwxyz&\u2581"']
    words = [("\u2581cat", -1.0), ("\u2581fish", -1.0), ("\u2581walks", -1.5)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters, *words]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def make_encoder(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> UMT5EncoderModel:
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=300, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.1
    )
    encoder: UMT5EncoderModel = UMT5EncoderModel(config)
    module: torch.nn.Module = encoder.train(False)
    module.to(device, dtype)
    return encoder


class CountingEncoder(UMT5EncoderModel):  # type: ignore[no-untyped-call]
    """A real encoder that counts its calls."""

    calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return super().forward(*args, **kwargs)


def make_counting_encoder(seed: int = 0) -> CountingEncoder:
    plain = make_encoder(seed)
    encoder = CountingEncoder(plain.config)
    encoder.train(False)
    encoder.load_state_dict(plain.state_dict())
    return encoder


def encode(
    cache: PromptCache,
    encoder: PreTrainedModel,
    prompts: list[str],
    max_length: int = 32,
    truncate: bool = False,
) -> torch.Tensor:
    return cache.encode(encoder, make_tokenizer("byt5"), prompts, max_length, truncate)


@pytest.mark.parametrize("kind", ["byt5", "t5"])
def test_embeddings_equal_those_of_diffusers(kind):
    encoder, tokenizer = make_encoder(), make_tokenizer(kind)
    make_pipeline: Any = WanImageToVideoPipeline
    pipeline = make_pipeline(tokenizer=tokenizer, text_encoder=encoder, vae=None, scheduler=None)
    with torch.no_grad():
        expected = pipeline._get_t5_prompt_embeds(PROMPTS, max_sequence_length=40)
    got = encode_prompt(encoder, tokenizer, PROMPTS, max_length=40)
    assert torch.equal(got, expected)
    assert got.shape == (3, 40, 16)


@pytest.mark.parametrize("kind", ["byt5", "t5"])
def test_only_the_prompt_s_own_tokens_are_non_zero(kind):
    tokenizer = make_tokenizer(kind)
    embeds = encode_prompt(make_encoder(), tokenizer, PROMPTS, max_length=40)
    used = embeds.abs().sum(dim=-1) > 0
    for prompt, row in zip(PROMPTS, used, strict=True):
        num_tokens = len(tokenizer(clean_prompt(prompt)).input_ids)
        assert row[:num_tokens].all()
        assert not row[num_tokens:].any()
    assert used[1].sum() == 1  # an empty prompt is its end token


def test_embeddings_do_not_depend_on_padding_or_neighbours():
    encoder, tokenizer = make_encoder(), make_tokenizer("byt5")
    alone = encode_prompt(encoder, tokenizer, PROMPTS[:1], max_length=20)
    together = encode_prompt(encoder, tokenizer, PROMPTS, max_length=40)
    torch.testing.assert_close(together[:1, :20], alone)
    assert not alone.requires_grad


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("  two \n\t words ", "two words"),
        ("a &amp;amp; b", "a & b"),
        ("\u201cquoted\u201d", '"quoted"'),
        ("cafÃ©", "café"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned_as_wan_does(dirty, clean):
    assert clean_prompt(dirty) == clean


@pytest.mark.parametrize("kind", ["byt5", "t5"])
def test_token_limit_counts_the_end_token(kind):
    tokenizer = make_tokenizer(kind)
    prompt = "zebra"
    limit = len(tokenizer(prompt).input_ids)
    ids, mask = tokenize_prompts(tokenizer, [prompt], limit)
    assert int(mask.sum()) == limit
    assert int(ids[0, -1]) == tokenizer.eos_token_id
    with pytest.raises(PromptError, match=f"has {limit} tokens, the limit is {limit - 1}"):
        tokenize_prompts(tokenizer, ["", prompt], limit - 1)
    ids, _ = tokenize_prompts(tokenizer, [prompt], limit - 1, truncate=True)
    assert ids.shape == (1, limit - 1)


def test_a_bare_string_and_no_prompt_are_refused():
    tokenizer = make_tokenizer("byt5")
    no_lists: tuple[Any, ...] = ("a cat", [])
    for prompts in no_lists:
        with pytest.raises(PromptError, match="list of at least one text"):
            encode_prompt(make_encoder(), tokenizer, prompts, max_length=8)


def test_overflow_in_the_encoder_is_reported():
    encoder = make_encoder()
    encoder.encoder.final_layer_norm.weight.data.fill_(float("inf"))
    with pytest.raises(NumericalError, match="bfloat16"):
        encode_prompt(encoder, make_tokenizer("byt5"), ["a"], max_length=8)


# Cache


def test_cache_gives_what_encode_prompt_gives_and_encodes_once(tmp_path):
    cache, encoder = PromptCache(tmp_path / "prompts"), make_counting_encoder()
    expected = encode_prompt(make_encoder(), make_tokenizer("byt5"), PROMPTS, 32)
    first = encode(cache, encoder, PROMPTS)
    assert encoder.calls == 3
    second = encode(cache, encoder, PROMPTS)
    assert encoder.calls == 3
    torch.testing.assert_close(first, expected)
    assert torch.equal(second, first)
    files = sorted(path.name for path in cache.directory.iterdir())
    assert len(files) == 3  # nothing unfinished is left behind
    assert all(name.endswith(".safetensors") for name in files)


def test_cache_hits_across_processes_and_white_space(tmp_path):
    encoder = make_counting_encoder()
    encode(PromptCache(tmp_path), make_encoder(), ["a cat"])
    encode(PromptCache(tmp_path), encoder, [" a  cat "])
    # Same weights in another class and another folder: the same encoder.
    assert encoder.calls == 0


def test_cache_keeps_the_dtype(tmp_path):
    encoder = make_encoder(dtype=torch.bfloat16)
    first = encode(PromptCache(tmp_path), encoder, ["a cat"])
    second = encode(PromptCache(tmp_path), encoder, ["a cat"])
    assert second.dtype == torch.bfloat16
    assert torch.equal(first, second)


def test_another_encoder_length_or_tokenizer_never_hits(tmp_path):
    cache, encoder = PromptCache(tmp_path), make_counting_encoder()
    encode(cache, encoder, ["cat"])
    other = make_counting_encoder(seed=1)
    assert torch.equal(
        encode(cache, other, ["cat"]),
        encode_prompt(other, make_tokenizer("byt5"), ["cat"], 32),
    )
    assert other.calls == 2
    encode(cache, encoder, ["cat"], max_length=16)
    assert encoder.calls == 2
    cache.encode(encoder, make_tokenizer("t5"), ["cat"], 32)
    assert encoder.calls == 3


def test_a_cached_cut_prompt_does_not_get_past_the_limit(tmp_path):
    cache, encoder = PromptCache(tmp_path), make_encoder()
    encode(cache, encoder, ["a long prompt"], max_length=6, truncate=True)
    with pytest.raises(PromptError, match="has 14 tokens"):
        encode(cache, encoder, ["a long prompt"], max_length=6)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def drop_checksum(path: Path) -> None:
    save_file(load_file(path), path)


def rename_tensor(path: Path) -> None:
    save_file({"other": torch.zeros(2)}, path, {"sha256": "0"})


@pytest.mark.parametrize(
    "damage", [cut_short, flip_a_bit, make_empty, drop_checksum, rename_tensor]
)
def test_damaged_entries_are_computed_again(tmp_path, caplog, damage):
    cache, encoder = PromptCache(tmp_path), make_counting_encoder()
    expected = encode(cache, encoder, ["a cat"])
    (entry,) = tmp_path.iterdir()
    damage(entry)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(encode(cache, encoder, ["a cat"]), expected)
    assert "damaged" in caplog.text
    assert encoder.calls == 2
    encode(cache, encoder, ["a cat"])
    assert encoder.calls == 2  # repaired


def test_a_directory_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    encoder = make_encoder()
    with caplog.at_level(logging.WARNING):
        embeds = encode(PromptCache(blocked), encoder, ["a"])
    assert torch.equal(embeds, encode_prompt(encoder, make_tokenizer("byt5"), ["a"], 32))
    assert "cannot write the prompt cache" in caplog.text


def test_fingerprint_sees_weights_config_and_dtype_but_not_the_folder(tmp_path):
    encoder = make_encoder()
    fingerprint = fingerprint_encoder(encoder)
    encoder.save_pretrained(tmp_path)
    assert fingerprint_encoder(UMT5EncoderModel.from_pretrained(tmp_path)) == fingerprint
    assert fingerprint_encoder(make_encoder(seed=1)) != fingerprint
    changed = make_encoder()
    next(changed.parameters()).data[7, 3] += 1e-3
    assert fingerprint_encoder(changed) != fingerprint
    changed = make_encoder()
    changed.config.layer_norm_epsilon = 1e-3
    assert fingerprint_encoder(changed) != fingerprint
    assert fingerprint_encoder(make_encoder(dtype=torch.bfloat16)) != fingerprint


def test_an_offloaded_encoder_needs_a_given_fingerprint(tmp_path):
    cache, encoder = PromptCache(tmp_path), make_encoder()
    fingerprint = fingerprint_encoder(encoder)
    tokenizer = make_tokenizer("byt5")
    expected = cache.encode(encoder, tokenizer, ["a"], 8, fingerprint=fingerprint)
    offloaded = make_encoder(device="meta")
    with pytest.raises(LoadingError, match="offloaded"):
        cache.encode(offloaded, tokenizer, ["a"], 8)
    got = cache.encode(offloaded, tokenizer, ["a"], 8, fingerprint=fingerprint)
    assert torch.equal(got, expected)


def known_to(motions: dict[str, list[str]] | None) -> UMT5EncoderModel:
    encoder = make_encoder()
    if motions is not None:
        encoder.config.camera_motions = motions
    return encoder


@pytest.mark.parametrize(
    ("prompt", "is_doubted"),
    [
        ("pan left slowly", False),
        ("please zoom in", False),
        ("The camera PANS to the left.", False),
        ("a dog runs, zoom-in", False),
        ("a dog runs", True),
        ("", True),
        ("a company left", True),
        ("zoom  in", False),
        ("zoom inside", True),
        ("pan slowly to the left", False),
        ("left, then pan", True),
    ],
)
def test_a_prompt_without_a_phrase_that_the_encoder_learned_is_doubted(prompt, is_doubted):
    motions = {"pan left": ["pan left", "the camera pans to the left"], "zoom in": ["zoom in"]}
    doubt = doubt_prompt(known_to(motions), prompt)
    assert (doubt is not None) == is_doubted
    assert doubt is None or "pan left, zoom in" in doubt
    assert doubt_prompt(known_to(None), prompt) is None


def test_what_an_encoder_is_known_for_does_not_change_its_fingerprint():
    assert fingerprint_encoder(known_to({"a": ["b"]})) == fingerprint_encoder(known_to(None))
