"""Training of the nano model's byte-level text encoder: to tell camera motions apart."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from swifti2v.models.text import tokenize_prompts
from swifti2v.training.camera_motion import CAMERA_MOTIONS, draw_prompt
from swifti2v.training.nano_config import TextEncoderConfig
from swifti2v.training.optimization import OnStep, Randomness, optimize

VOCABULARY = 384
"""256 bytes, three special tokens, and room as ByT5 has it."""


class MotionClassifier(nn.Module):
    """A text encoder and a linear layer on the mean of its tokens.

    Args:
        config: Size of the encoder.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
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
            )
        )
        self.head = nn.Linear(config.width, len(CAMERA_MOTIONS))

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Scores ``[B, 7]`` of the motions, from ``[B, L]`` token ids and their mask."""
        tokens = self.encoder(input_ids=token_ids, attention_mask=mask).last_hidden_state
        is_token = mask[:, :, None].to(tokens)
        mean = (tokens * is_token).sum(dim=1) / is_token.sum(dim=1)
        scores: Tensor = self.head(mean)
        return scores


def make_tokenizer() -> ByT5Tokenizer:
    """Bytes as tokens: byte + 3, 1 ends a text, 0 fills it up."""
    return ByT5Tokenizer(extra_ids=0)


def train_text_encoder(
    config: TextEncoderConfig,
    directory: Path,
    device: torch.device,
    on_step: OnStep | None = None,
) -> UMT5EncoderModel:
    """Train the encoder (and a classifier that is thrown away) on random prompts.

    Args:
        config: Settings.
        directory: For checkpoint and metrics, see ``optimize``; a checkpoint is continued.
        device: Where to train.
        on_step: Called after each step.

    Returns:
        The encoder, in eval mode, without gradients.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        classifier = MotionClassifier(config).to(device)
    tokenizer, randomness = make_tokenizer(), Randomness(config.seed)

    def loss() -> Tensor:
        labels = randomness.numpy.integers(len(CAMERA_MOTIONS), size=config.batch_size)
        prompts = [draw_prompt(CAMERA_MOTIONS[label], randomness.numpy) for label in labels]
        ids, mask = tokenize_prompts(tokenizer, prompts, config.max_tokens, truncate=True)
        scores = classifier(ids.to(device), mask.to(device))
        return F.cross_entropy(scores, torch.from_numpy(labels).to(device))

    optimize(classifier, loss, config.optimization, randomness, directory, on_step)
    encoder = classifier.encoder
    encoder.requires_grad_(False)
    return encoder
