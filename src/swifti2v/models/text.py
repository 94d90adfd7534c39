"""Prompts to embeddings, as Wan takes them, and a cache of them on disk."""

import hashlib
import html
import json
import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ftfy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from swifti2v.errors import NumericalError, PromptError
from swifti2v.models.fingerprints import MOTIONS_KEY, fingerprint_encoder, to_bytes

logger = logging.getLogger(__name__)

CACHE_FORMAT = "1"
"""Part of every key: raise it when the meaning of an entry changes."""


def clean_prompt(prompt: str) -> str:
    """Repair mis-decoded text, undo HTML escapes and collapse white space.

    Source:
        Wan 2.1 (``whitespace_clean(basic_clean(text))``), as in diffusers' Wan pipelines.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def quote_prompt(prompt: str) -> str:
    """Quote the beginning of a prompt, as errors do."""
    return repr(clean_prompt(prompt)[:40])


def doubt_prompt(text_encoder: PreTrainedModel, prompt: str) -> str | None:
    """Warning for a prompt that the encoder was not trained to understand; None for other prompts.

    The prompt must hold the words of one of its phrases, in their order; case, punctuation and
    words between them do not count. The encoder's own certainty does not help: a small
    one is certain of everything.

    Args:
        text_encoder: Its config is read, not its weights.
        prompt: Text that says what happens in the video; may be empty.
    """
    known: dict[str, list[str]] = getattr(text_encoder.config, MOTIONS_KEY, None) or {}
    phrases = (phrase for asked in known.values() for phrase in asked)
    if not known or any(_holds(prompt, phrase) for phrase in phrases):
        return None
    return (
        "this model knows camera motions only, and the prompt asks for none in words that it learned: "
        f"say {', '.join(known)}; else the clip may stand still or move in any way"
    )


def _holds(prompt: str, phrase: str) -> bool:
    words = iter(_words(prompt))
    return all(word in words for word in _words(phrase))  # "in" goes on where it stopped


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", clean_prompt(text).lower())


def require_text(prompts: Sequence[str]) -> None:
    """Refuse prompts that hold bytes in another encoding, as a terminal may hand them over.

    Raises:
        PromptError: A prompt holds such bytes.
    """
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise PromptError(
                f"the prompt {prompt[:40]!r} is not UTF-8: type it in a UTF-8 terminal"
            ) from None


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_length: int,
    truncate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Clean and tokenize prompts.

    Args:
        tokenizer: Any tokenizer that ends a text with its own end token.
        prompts: Texts; an empty one is allowed (the unconditional prompt).
        max_length: Most tokens of a prompt, the end token included.
        truncate: Cut a longer prompt instead of refusing it.

    Returns:
        Token ids and attention mask, both ``[B, max_length]`` int64.

    Raises:
        PromptError: No prompt, one that is not Unicode, or over the limit without ``truncate``.
    """
    if isinstance(prompts, str) or not prompts:
        raise PromptError(f"prompts must be a list of at least one text, got {prompts!r}")
    require_text(prompts)
    texts = [clean_prompt(prompt) for prompt in prompts]
    if not truncate:
        for text in texts:
            num_tokens = len(tokenizer(text, add_special_tokens=True, verbose=False).input_ids)
            if num_tokens > max_length:
                raise PromptError(
                    f"the prompt {quote_prompt(text)}... has {num_tokens} tokens, the limit is "
                    f"{max_length}: shorten it, or cut it with --truncate-prompt"
                )
    inputs = tokenizer(
        texts,
        padding="max_length",
        max_length=max_length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return inputs.input_ids, inputs.attention_mask


@torch.no_grad()
def _encode_tokens(text_encoder: PreTrainedModel, token_ids: Tensor, mask: Tensor) -> Tensor:
    """Embeddings ``[B, L, D]`` on the encoder's device, zero where the mask is."""
    device = text_encoder.device
    if device.type != "meta":  # weights offloaded piecewise: hooks move the inputs
        token_ids, mask = token_ids.to(device), mask.to(device)
    embeds: Tensor = text_encoder(input_ids=token_ids, attention_mask=mask).last_hidden_state
    is_token = mask.to(embeds.device).bool()[:, :, None]
    embeds = embeds.masked_fill(~is_token, 0)
    if not embeds.isfinite().all():
        raise NumericalError(
            f"the text encoder returned NaN or infinity in {embeds.dtype}; "
            "UMT5 overflows in float16: load it in bfloat16 or float32"
        )
    return embeds


def encode_prompt(
    text_encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_length: int,
    truncate: bool = False,
) -> Tensor:
    """Encode prompts the way Wan was trained on them.

    Args:
        text_encoder: A UMT5 encoder; it stays as it is.
        tokenizer: Its tokenizer: T5's for UMT5, ``ByT5Tokenizer`` for the nano model.
        prompts: B texts; an empty one is allowed (the unconditional prompt).
        max_length: L, tokens the transformer sees; shorter prompts are padded.
        truncate: Cut a longer prompt instead of refusing it.

    Returns:
        ``[B, L, D]`` in the encoder's dtype and on its device; zeros after a prompt's end.

    Raises:
        PromptError: No prompt, or one over the limit without ``truncate``.
        NumericalError: The encoder overflowed.

    Source:
        Wan 2.1; diffusers ``WanImageToVideoPipeline._get_t5_prompt_embeds``.
    """
    token_ids, mask = tokenize_prompts(tokenizer, prompts, max_length, truncate)
    return _encode_tokens(text_encoder, token_ids, mask)


class PromptCache:
    """Prompt embeddings on disk, found by content.

    An entry's name is the hash of the encoder's fingerprint, the tokenizer's class, the cleaned
    prompt, its tokens and ``max_length``, so another encoder never finds it. Entries are written
    under another name and then renamed: many processes may share a directory. A damaged entry
    is computed again. One file holds one prompt without its padding.
    """

    def __init__(self, directory: Path) -> None:
        """Use ``directory``, which is made with the first entry."""
        self.directory = directory

    def encode(
        self,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        max_length: int,
        truncate: bool = False,
        fingerprint: str | None = None,
    ) -> Tensor:
        """Encode prompts as ``encode_prompt`` does, reading known ones from disk.

        Unknown prompts are encoded one at a time, so that a result does not depend on its
        neighbours in a batch. ``fingerprint`` spares hashing the encoder again
        (``fingerprint_encoder``). Result and errors as in ``encode_prompt``; a directory that
        cannot be written costs a warning only.
        """
        token_ids, mask = tokenize_prompts(tokenizer, prompts, max_length, truncate)
        fingerprint = fingerprint or fingerprint_encoder(text_encoder)
        rows = []
        for prompt, ids, row_mask in zip(prompts, token_ids, mask, strict=True):
            num_tokens = int(row_mask.sum())
            key = _entry_key(fingerprint, tokenizer, prompt, ids[:num_tokens], max_length)
            embeds = self._read(key, num_tokens)
            if embeds is None:
                embeds = _encode_tokens(text_encoder, ids[None], row_mask[None])[0, :num_tokens]
                self._write(key, embeds)
            padding = (0, 0, 0, max_length - num_tokens)
            rows.append(torch.nn.functional.pad(embeds.to(_result_device(text_encoder)), padding))
        return torch.stack(rows)

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.safetensors"

    def _read(self, key: str, num_tokens: int) -> Tensor | None:
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as entry:
                embeds: Tensor = entry.get_tensor("prompt_embeds")
                checksum = (entry.metadata() or {}).get("sha256")
        except (SafetensorError, OSError) as error:
            logger.warning("prompt cache entry %s is damaged (%s): encoding again", path, error)
            return None
        is_whole = hashlib.sha256(to_bytes(embeds)).hexdigest() == checksum
        if not is_whole or embeds.ndim != 2 or len(embeds) != num_tokens:
            logger.warning("prompt cache entry %s is damaged: encoding again", path)
            return None
        return embeds

    def _write(self, key: str, embeds: Tensor) -> None:
        embeds = embeds.cpu().contiguous()
        metadata = {"sha256": hashlib.sha256(to_bytes(embeds)).hexdigest()}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.directory, prefix=".writing-") as folder:
                path = Path(folder) / "entry.safetensors"
                save_file({"prompt_embeds": embeds}, path, metadata)
                path.replace(self._path(key))
        except (SafetensorError, OSError) as error:
            logger.warning("cannot write the prompt cache in %s: %s", self.directory, error)


def _result_device(text_encoder: PreTrainedModel) -> torch.device:
    device = text_encoder.device
    return torch.device("cpu") if device.type == "meta" else device


def _entry_key(
    fingerprint: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    token_ids: Tensor,
    max_length: int,
) -> str:
    content = [
        CACHE_FORMAT,
        fingerprint,
        type(tokenizer).__name__,
        clean_prompt(prompt),
        token_ids.tolist(),
        max_length,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
