"""Prompt and photo to the embeddings that both stages attend to."""

from collections.abc import Sequence
from typing import Protocol

from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from swifti2v.models.image_encoder import encode_image
from swifti2v.models.loading.components import Components
from swifti2v.models.runtime.placement import require_loaded
from swifti2v.models.text import encode_prompt
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
    """

    def __init__(
        self,
        components: Components,
        cache: PromptSource | None = None,
        truncate_prompt: bool = False,
    ) -> None:
        self.components = components
        self.cache = cache
        self.truncate_prompt = truncate_prompt

    def __call__(
        self, image: Image.Image, prompt: str, negative_prompt: str | None = None
    ) -> Conditions:
        """Embed a run's inputs.

        Args:
            image: The photo, RGB.
            prompt: May be empty.
            negative_prompt: Only for guidance; None leaves it out.

        Raises:
            PromptError: A prompt is over the limit and may not be cut.
            ConfigError: The text encoder is asked, and was released or never loaded.
        """
        parts = self.components
        texts = [prompt] if negative_prompt is None else [prompt, negative_prompt]
        if self.cache is None:
            require_loaded(parts, "text_encoder")
        encode = encode_prompt if self.cache is None else self.cache.encode
        embeds = encode(
            parts.text_encoder,
            parts.tokenizer,
            texts,
            parts.max_text_length,
            truncate=self.truncate_prompt,
        ).to(parts.device)
        image_embeds = None
        if parts.image_encoder is not None and parts.image_processor is not None:
            image_embeds = encode_image(parts.image_encoder, parts.image_processor, image)
        return Conditions(
            prompt_embeds=embeds[:1],
            negative_prompt_embeds=None if negative_prompt is None else embeds[1:],
            image_embeds=None if image_embeds is None else image_embeds.to(parts.device),
        )
