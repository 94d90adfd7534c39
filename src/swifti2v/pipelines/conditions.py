"""Prompt and photo to the embeddings that both stages attend to."""

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from swifti2v.models.image_encoder import encode_image
from swifti2v.models.loading.components import Components
from swifti2v.models.runtime.placement import require_loaded
from swifti2v.models.runtime.roles import IMAGE, TEXT
from swifti2v.models.runtime.staging import Staging
from swifti2v.models.text import encode_prompt
from swifti2v.pipelines.progress import Stopwatch
from swifti2v.pipelines.stage1 import Conditions


class PromptSource(Protocol):
    """Gives what ``encode_prompt`` would, such as ``PromptCache``."""

    def encode(
        self,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        max_length: int,
        truncate: bool = False,
    ) -> Tensor:
        """``[B, L, D]``; the text encoder may stay unused."""


class ConditionEncoder:
    """Text encoder and, where Stage I wants it, CLIP image encoder.

    Args:
        components: The loaded models.
        cache: Prompt embeddings already computed; the text encoder is not run for those.
        truncate_prompt: Cut a prompt over the token limit instead of refusing it.
        staging: Loads each encoder while it is needed.
    """

    def __init__(
        self,
        components: Components,
        cache: PromptSource | None = None,
        truncate_prompt: bool = False,
        staging: Staging | None = None,
    ) -> None:
        self.components = components
        self.cache = cache
        self.truncate_prompt = truncate_prompt
        self.staging = staging or Staging(components)

    def __call__(
        self,
        image: Image.Image,
        prompt: str,
        negative_prompt: str | None = None,
        stopwatch: Stopwatch | None = None,
        later_prompts: Sequence[tuple[int, str]] = (),
    ) -> Conditions:
        """Embed a run's inputs, one encoder after the other.

        Args:
            image: The photo, RGB.
            prompt: May be empty.
            negative_prompt: Only for guidance; None leaves it out.
            stopwatch: Takes the seconds of ``text``, without those of loading.
            later_prompts: Prompts that take over, each with the frame from which it holds.

        Raises:
            PromptError: A prompt is over the limit and may not be cut.
            ConfigError: The text encoder is asked, and was never loaded.
        """
        stopwatch = stopwatch or Stopwatch()
        with self.staging.hold(*TEXT), stopwatch.measure("text"):
            others = [] if negative_prompt is None else [negative_prompt]
            embeds = self._encode_texts([prompt, *others])
            later = None
            if later_prompts:
                later = torch.cat([self._encode_texts([text]) for _, text in later_prompts])
        image_embeds = None
        if self.components.image_encoder is not None:
            with self.staging.hold(*IMAGE), stopwatch.measure("text"):
                image_embeds = self._encode_image(image)
        return Conditions(
            prompt_embeds=embeds[:1],
            negative_prompt_embeds=None if negative_prompt is None else embeds[1:],
            image_embeds=image_embeds,
            later_starts=None if later is None else torch.tensor([at for at, _ in later_prompts]),
            later_prompt_embeds=later,
        )

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        parts = self.components
        if self.cache is None:
            require_loaded(parts, "text_encoder")
        encode = encode_prompt if self.cache is None else self.cache.encode
        return encode(
            parts.text_encoder,
            parts.tokenizer,
            texts,
            parts.max_text_length,
            truncate=self.truncate_prompt,
        ).to(parts.device)

    def _encode_image(self, image: Image.Image) -> Tensor:
        parts = self.components
        assert parts.image_encoder is not None
        assert parts.image_processor is not None
        return encode_image(parts.image_encoder, parts.image_processor, image).to(parts.device)
