"""Prediction of a training's memory on each rank, from sizes alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from swifti2v.errors import InputError
from swifti2v.training.engine.optimizers import BLOCK_8BIT, OptimizerConfig


class ParameterCount(NamedTuple):
    """Parameters of a model."""

    total: int
    """All."""
    trainable: int
    """Parameters that require a gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationSizes:
    """The sizes of a Wan transformer that decide what its activations take."""

    width: int
    """D, channels of a token."""
    ffn_dim: int
    """Channels inside the feed-forward network."""
    num_layers: int
    """Blocks."""
    num_attention_heads: int
    """Heads of an attention."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ActivationSizes":
        """Sizes of a diffusers configuration of ``WanTransformer3DModel``."""
        heads = config["num_attention_heads"]
        return cls(
            width=heads * config["attention_head_dim"],
            ffn_dim=config["ffn_dim"],
            num_layers=config["num_layers"],
            num_attention_heads=heads,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationMemory:
    """Bytes that the forward pass leaves for the backward pass."""

    kept: int
    """Bytes kept from the forward pass on: the inputs of the blocks with checkpointing, else all
    activations."""
    recomputed: int
    """Bytes of the block that is run again, with checkpointing; else 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPrediction:
    """Bytes on one rank."""

    weights: int
    """Trained and frozen."""
    trained: int
    """Trained alone."""
    gradients: int
    """Bytes of the gradients of the trained weights."""
    optimizer: int
    """Both moments."""
    ema: int
    """Averaged weights in float32."""
    activations: int
    """Bytes of the kept and recomputed activations of one micro-batch."""

    @property
    def checkpoint(self) -> int:
        """Bytes that a checkpoint holds of this rank: as much host memory while it is written."""
        return self.trained + self.optimizer + self.ema

    @property
    def total(self) -> int:
        """The sum.

        Not in it: the blocks that FSDP gathers (about two in the compute dtype), the workspace of
        kernels, the VAE and the text encoder, and what the allocator wastes.
        """
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations


def predict_memory(
    num_parameters: int,
    num_trainable: int,
    optimizer: OptimizerConfig,
    *,
    has_ema: bool,
    num_shards: int = 1,
    bytes_per_frozen: int = 2,
    keeps_whole_gradients: bool = False,
    activations: ActivationMemory | None = None,
) -> MemoryPrediction:
    """Predict the bytes of a training on each rank.

    The average of the trained weights is float32. Shards share the states, not the activations, and
    not gradients that wait whole, in float32, for the last micro-batch.
    8-bit moments are counted for every tensor, though small ones keep theirs in more, and shards as
    if all tensors divided evenly; for a large model both are below a percent.

    Raises:
        InputError: A count is not possible.
    """
    if not 0 <= num_trainable <= num_parameters or num_shards < 1:
        raise InputError(
            f"{num_trainable} trained of {num_parameters} parameters in {num_shards} shards is "
            "not possible; train at most all of them, in at least one shard"
        )
    size = 4 if optimizer.weights == "float32" else 2
    mine = math.ceil(num_trainable / num_shards)
    frozen = math.ceil((num_parameters - num_trainable) / num_shards)
    moments = 2 * size * mine
    if optimizer.kind == "adamw_8bit":
        moments = 2 * (mine + 4 * math.ceil(mine / BLOCK_8BIT))
    return MemoryPrediction(
        weights=size * mine + bytes_per_frozen * frozen,
        trained=size * mine,
        gradients=size * mine + (4 * num_trainable if keeps_whole_gradients else 0),
        optimizer=moments,
        ema=4 * mine if has_ema else 0,
        activations=0 if activations is None else activations.kept + activations.recomputed,
    )


def predict_activations(
    size: ActivationSizes,
    num_tokens: int,
    *,
    num_text_tokens: int = 512,
    is_checkpointed: bool = True,
    compute: Literal["bfloat16", "float32"] = "bfloat16",
) -> ActivationMemory:
    """Predict what the blocks of a Wan transformer keep for the backward pass.

    A token keeps in a block 22 D-wide tensors (9 around the norms, 4 around modulation and gates, 5
    inputs of linear layers, 4 of the attentions' queries, keys, values and outputs), of which the
    first 13 are float32 even in bfloat16; 2 tensors of ``ffn_dim``; and a few single numbers. A text
    token keeps 5 D-wide tensors, 2 of them float32. Counted from the tensors that autograd saves in
    ``SegmentTransformerBlock`` with flash attention; diffusers' own block differs by 3%.
    """
    item = 2 if compute == "bfloat16" else 4
    wide = (13 * 4 + 9 * item) * size.width + 2 * item * size.ffn_dim
    single = 4 * (2 * size.num_attention_heads + 9)
    text = (2 * 4 + 3 * item) * size.width + 4
    block = num_tokens * (wide + single) + num_text_tokens * text
    if not is_checkpointed:
        return ActivationMemory(kept=size.num_layers * block, recomputed=0)
    return ActivationMemory(kept=size.num_layers * num_tokens * size.width * item, recomputed=block)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Parameters of a model; a sharded one counts whole, a shared one once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return ParameterCount(sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained))
