"""Start of nano's Stage II: its tokens hold what the reference shows, and see those around them.

A latent cell of ``BlockCodec`` is a block of cosine coefficients, so most of what a token shows lies
in few directions: the embedding begins with them. Wan's attention begins blind to places; here each
head begins with a neighbour to look at.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS: tuple[tuple[int | None, int, int], ...] = (
    (None, 0, 0), (0, 0, -1), (0, 0, 1), (0, -1, 0), (0, 1, 0), (-1, 0, 0), (1, 0, 0),
)  # fmt: skip
"""Frames, rows and columns from a token to those that a head looks at, one for each head in turn;
None is all frames."""
WHITENING = 0.5
"""0 keeps the deviations of the principal components, 1 makes them all 1."""
SHARPNESS = 3.0
"""Scale of queries and keys: how little a head sees of other places."""
FREQUENCIES = (1.0, 0.8, 0.5)
"""Weights of the three fastest rotary frequencies of an axis in a head that looks at a place."""


@torch.no_grad()
def initialize_stage2(transformer: WanTransformer3DModel, references: Iterable[Tensor]) -> None:
    """Write the start into a transformer whose output layer is 0.

    Noisy latents and prompts do not enter at first: at the highest noise level, the only one that
    nano samples at, the noise says nothing.

    Args:
        transformer: 2C input channels, the reference's last; changed.
        references: Latents ``[B, C, F, h, w]`` of reference windows, at least a thousand tokens.
    """
    model: Any = transformer
    patch, channels = model.config["patch_size"][1], model.config["out_channels"]
    width = model.patch_embedding.out_channels
    rows, mean = principal_components(references, patch, width)
    weight = model.patch_embedding.weight
    weight.zero_()
    weight[:, channels:] = rows.view(width, channels, 1, patch, patch).to(weight)
    model.patch_embedding.bias.copy_(-rows @ mean)
    embedder = model.condition_embedder
    embedder.text_embedder.linear_1.weight.zero_()
    embedder.time_proj.weight.mul_(0.05)
    embedder.time_proj.bias.zero_()
    for block in model.blocks:
        block.scale_shift_table.normal_(std=0.01)
        block.scale_shift_table[:, [2, 5]] += 0.5  # gates of attention and feed-forward layer
        block.attn2.to_out[0].weight.mul_(0.05)
        block.ffn.net[2].weight.mul_(0.3)
        _look_at_neighbours(block.attn1, model.rope)


def principal_components(
    references: Iterable[Tensor], patch: int, number: int
) -> tuple[Tensor, Tensor]:
    """Principal components of the tokens of references.

    Args:
        references: ``[B, C, F, h, w]`` each.
        patch: Cells along a token's side.
        number: Components.

    Returns:
        Rows ``[number, C * patch**2]`` that make components of a token, with deviations between
        their own and 1; and the mean token ``[C * patch**2]``.
    """
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    for reference in references:
        frames = F.pixel_unshuffle(reference.transpose(1, 2).flatten(0, 1), patch)
        tokens = frames.flatten(2).transpose(1, 2).flatten(0, 1)
        count, total = count + len(tokens), total + tokens.sum(dim=0)
        products = products + tokens.T @ tokens
    mean = total / count
    values, vectors = torch.linalg.eigh(products / count - mean[:, None] * mean)
    values, vectors = values[-number:].flip(0), vectors[:, -number:].flip(1)
    return (vectors / values.clamp(min=1e-6) ** (WHITENING / 2)).T, mean


def _look_at_neighbours(attention: Any, rope: Any) -> None:
    """Queries and keys hardly depend on content: their biases find the neighbour of each head."""
    for layer in (attention.to_q, attention.to_k):
        layer.weight.normal_(std=0.002)
    for layer in (attention.to_v, attention.to_out[0]):
        layer.weight.normal_(std=0.02)
        layer.bias.zero_()
    head_dim = rope.t_dim + rope.h_dim + rope.w_dim
    for head in range(attention.heads):
        query, key = _neighbour(rope, NEIGHBOURS[head % len(NEIGHBOURS)])
        part = slice(head * head_dim, (head + 1) * head_dim)
        attention.to_q.bias[part] = query.to(attention.to_q.bias)
        attention.to_k.bias[part] = key.to(attention.to_k.bias)
    attention.norm_q.weight.fill_(SHARPNESS)
    attention.norm_k.weight.fill_(SHARPNESS)


def _neighbour(rope: Any, offset: tuple[int | None, int, int]) -> tuple[Tensor, Tensor]:
    """Query and key whose product, once rotated, peaks where the key is at ``offset``."""
    sizes = (rope.t_dim, rope.h_dim, rope.w_dim)
    query, key = torch.zeros(sum(sizes)), torch.zeros(sum(sizes))
    for axis, (size, distance) in enumerate(zip(sizes, offset, strict=True)):
        if distance is None:
            continue
        for index, value in enumerate(FREQUENCIES):
            place = sum(sizes[:axis]) + 2 * index
            angle = distance * 10000.0 ** (-2 * index / size)
            key[place] = value
            query[place], query[place + 1] = value * math.cos(angle), value * math.sin(angle)
    return query, key
