"""Training of the nano model's byte-level text encoder: to tell camera moves apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from swifti2v.models.text import tokenize_prompts
from swifti2v.pipelines.camera_moves import FAST, SLOW
from swifti2v.training.data.motion_prompts import (
    AXES,
    MotionPrompt,
    draw_prompt,
    known_phrases,
)
from swifti2v.training.engine.draws import Draw
from swifti2v.training.engine.session import Session, save_trained, train_task
from swifti2v.training.nano.config import TextEncoderConfig

VOCABULARY = 384
"""256 bytes, three special tokens, and spare ones as in ByT5."""


SPEEDS = (SLOW, 1.0, FAST)
QUESTIONS = (*(3 for _ in AXES), len(SPEEDS), 2, 2)
"""Answers to choose from: each axis backwards, not, forwards; the speed; a hand's sway or none; whether
anything is said of the camera."""


def label_prompt(prompt: MotionPrompt) -> tuple[int, ...]:
    """Answers to ``QUESTIONS``, by number."""
    ways = [getattr(prompt.move, axis) for axis in AXES]
    speed = max(map(abs, ways)) or 1.0
    signs = (1 + (way > 0) - (way < 0) for way in ways)
    return (*signs, SPEEDS.index(speed), int(prompt.move.sway > 0), int(prompt.asks))


class MotionClassifier(nn.Module):
    """A text encoder and a linear layer on the mean of its tokens."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        known: Any = {"camera_motions": known_phrases()}  # see swifti2v.models.text.doubt_prompt
        self.encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=VOCABULARY,
                d_model=config.width,
                d_kv=32,
                d_ff=2 * config.width,
                num_layers=config.num_layers,
                num_heads=config.width // 32,
                relative_attention_max_distance=64,
                dropout_rate=0.0,
                is_encoder_decoder=False,
                use_cache=False,
                **known,
            )
        )
        self.head = nn.Linear(config.width, sum(QUESTIONS))

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Scores ``[B, sum(QUESTIONS)]`` of all answers, from ``[B, L]`` token ids and their mask."""
        tokens = self.encoder(input_ids=token_ids, attention_mask=mask).last_hidden_state
        is_token = mask[:, :, None].to(tokens)
        mean = (tokens * is_token).sum(dim=1) / is_token.sum(dim=1)
        scores: Tensor = self.head(mean)
        return scores


def make_tokenizer() -> ByT5Tokenizer:
    """Bytes as tokens: byte + 3, 1 ends a text, 0 fills it up."""
    return ByT5Tokenizer(extra_ids=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch:
    """Prompts and what they ask for."""

    ids: tuple[str, ...]
    """The prompts."""
    num_replaced: int
    """0: none can fail."""
    labels: Tensor
    """``[b, len(QUESTIONS)]`` right answers."""


class TextTask:
    """The text encoder as the trainer sees it: with a classifier that is thrown away."""

    def __init__(self, config: TextEncoderConfig, device: torch.device) -> None:
        self.config, self.tokenizer = config, make_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            self.model = MotionClassifier(config).to(device)

    def enter_phase(self, phase: int) -> None:
        """All phases have the same prompts."""

    def load_batch(self, draw: Draw) -> PromptBatch:
        """Random prompts."""
        prompts = [draw_prompt(rng) for rng in draw.samples()]
        return PromptBatch(
            ids=tuple(prompt.text for prompt in prompts),
            num_replaced=0,
            labels=torch.tensor([label_prompt(prompt) for prompt in prompts]),
        )

    def loss(self, batch: PromptBatch, draw: Draw) -> Tensor:  # noqa: ARG002 - as in Task
        """``[b]`` cross entropy."""
        ids, mask = tokenize_prompts(
            self.tokenizer, batch.ids, self.config.max_tokens, truncate=True
        )
        device = self.model.head.weight.device
        scores = self.model(ids.to(device), mask.to(device))
        labels = batch.labels.to(device)
        return torch.stack(
            [
                F.cross_entropy(answers, labels[:, question], reduction="none")
                for question, answers in enumerate(torch.split(scores, list(QUESTIONS), dim=1))
            ]
        ).sum(dim=0)

    def validate(self, directory: Path) -> Mapping[str, float]:  # noqa: ARG002 - as in Task
        """The loss tells all."""
        return {}


def train_text_encoder(config: TextEncoderConfig, session: Session) -> Path:
    """Train the encoder on its own; returns its directory, in the layout of ``transformers``."""
    task = TextTask(config, session.ranks.device)
    train_task(task, config.run, config.phases, session)
    return save_trained(UMT5EncoderModel, task.model.encoder, "text_encoder", session)
