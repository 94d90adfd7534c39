"""Prompts to embeddings in training, from a cache once they are in it."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from swifti2v.errors import InputError
from swifti2v.models.fingerprints import fingerprint_encoder
from swifti2v.models.loading.components import Components
from swifti2v.models.text import encode_prompt, tokenize_prompts
from swifti2v.training.cache.fingerprints import make_key
from swifti2v.training.cache.tensor_cache import TensorCache

CODE = 1
"""Raised when the same prompt and encoder give something else than before."""
REMEDY = "run `swifti2v data cache` with this configuration and this directory"
"""Advice in messages about missing entries."""
NAME_LENGTH = 40
"""Characters of a prompt in messages."""


@torch.no_grad()
def embed_prompts(parts: Components, prompts: Sequence[str]) -> Tensor:
    """Embeddings ``[b, L, D]``, each as if it came alone and in the encoder's own precision."""
    with torch.autocast(parts.text_encoder.device.type, enabled=False):
        embeds = [
            encode_prompt(
                parts.text_encoder, parts.tokenizer, [prompt], parts.max_text_length, truncate=True
            )
            for prompt in prompts
        ]
    return torch.cat(embeds)


class CachedPrompts:
    """Embeddings of prompts from a directory; a text encoder is only needed to fill it.

    It can take the place of a ``PromptCache``. The embeddings lie in ``prompts/``, below the
    directory of all caches of a training.

    Raises:
        InputError: The directory is of another text encoder.
    """

    def __init__(self, directory: Path, parts: Components) -> None:
        self.max_length = parts.max_text_length
        self.cache = TensorCache(
            directory / "prompts",
            {
                "kind": "prompts",
                "text_encoder": fingerprint_encoder(parts.text_encoder),
                "tokenizer": type(parts.tokenizer).__name__,
                "max_length": self.max_length,
                "code": CODE,
            },
        )

    def add(self, parts: Components, prompt: str) -> bool:
        """Encode a prompt unless it is there; whether it had to be."""
        if (key := make_key(prompt)) in self.cache:
            return False
        _, mask = tokenize_prompts(parts.tokenizer, [prompt], self.max_length, truncate=True)
        embeds = embed_prompts(parts, [prompt])
        self.cache.put(key, {"prompt_embeds": embeds[0, : int(mask.sum())]})
        return True

    def require_all(self, prompts: Iterable[str]) -> None:
        """Refuse prompts that are not there.

        Raises:
            InputError: Prompts are missing; the message has their number.
        """
        missing = sorted({prompt for prompt in prompts if make_key(prompt) not in self.cache})
        if missing:
            raise InputError(
                f"cache {self.cache.directory} lacks {len(missing)} prompts, such as "
                f"{missing[0][:NAME_LENGTH]!r}; {REMEDY}"
            )

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """``[b, L, D]`` on the CPU.

        Raises:
            InputError: A prompt is not there.
        """
        rows = []
        for prompt in prompts:
            name = f"the prompt {prompt[:NAME_LENGTH]!r}"
            entry = self.cache.require(make_key(prompt), name, {}, REMEDY)
            embeds = entry.tensors["prompt_embeds"]
            rows.append(F.pad(embeds, (0, 0, 0, self.max_length - len(embeds))))
        return torch.stack(rows)

    def encode(
        self,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        max_length: int,
        truncate: bool = False,
    ) -> Tensor:
        """Return the embeddings of ``prompts``; the other arguments are ignored."""
        del text_encoder, tokenizer, max_length, truncate
        return self(prompts)
