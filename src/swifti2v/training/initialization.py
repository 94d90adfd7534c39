"""Structured starts of the nano model's transformers: what is known need not be learned.

A latent cell of ``BlockCodec`` is a block of cosine coefficients, so the photo's (or reference's)
content of a place can be copied by an attention head that looks at the same place. The start of
Stage II writes such heads into block 0 and leaves random weights elsewhere.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor
from torch.nn import functional as F

from swifti2v.errors import ConfigError

LOW_CHANNELS = (0, 1, 8, 9, 2, 16, 256, 257, 260, 320)
"""Latent channels of the lowest spatial frequencies at temporal frequency 0: luma, Cb, Cr."""
MIN_WIDTH = 128
HEAD_DIM = 64
SAME_PLACE = (1.0, 0.8, 0.5)
"""Weights of the three fastest rotary frequencies of an axis in a head that looks at a place."""
_PATCH = 2


@dataclass(frozen=True, slots=True)
class FitSample:
    """A batch to fit an output layer to."""

    forward: Callable[[], object]
    """Runs the transformer."""
    residual: Tensor
    """``[B, C, k, h, w]``, what it should return for the last k frames."""


def require_structured(transformer: WanTransformer3DModel) -> int:
    """Refuse a transformer that the structured starts do not fit.

    Returns:
        Its width.

    Raises:
        ConfigError: Heads are not 64 wide, or the width is not a multiple of 64 from 128 on.
    """
    head_dim = int(transformer.config["attention_head_dim"])
    width = head_dim * int(transformer.config["num_attention_heads"])
    if head_dim != HEAD_DIM or width < MIN_WIDTH:
        raise ConfigError(
            f"a width of {width} in heads of {head_dim} has no structured start; use heads of "
            f"{HEAD_DIM} and at least {MIN_WIDTH} in all"
        )
    return width


@torch.no_grad()
def initialize_stage2(
    transformer: WanTransformer3DModel, residual_energy: Tensor, sigmas: Tensor
) -> None:
    """Start of Stage II: block 0 fetches the same place of the clean frames.

    Token features, of width D: 40 of the token's own reference, 40 for what is fetched of the
    clean frames' low frequencies, up to D - 4 high frequencies (own reference, then fetched), and
    in the last whether the frame is clean. Text does not enter: a prompt acts as no prompt.

    Args:
        transformer: 384 latent and 384 reference channels; changed.
        residual_energy: ``[384]`` from ``measure_residual``: high frequencies with the most are kept.
        sigmas: Noise levels of target frames in training.

    Raises:
        ConfigError: See ``require_structured``.
    """
    width = require_structured(transformer)
    model: Any = transformer
    num_low = _PATCH**2 * len(LOW_CHANNELS)
    first_high, end = 2 * num_low, width - 4
    num_high = (end - first_high) // _PATCH**2
    by_energy = residual_energy[:64].argsort(descending=True).tolist()
    high = [channel for channel in by_energy if channel not in (0, 1, 8)][:num_high]
    silence_output(model)
    weight = _randomize_embedding(model)
    weight[end:] = 0
    weight[num_low:first_high] = 0
    for patch in range(_PATCH**2):
        place = (0, patch // _PATCH, patch % _PATCH)
        for start, channels, gain in ((0, LOW_CHANNELS, 0.7), (first_high, high, 2.0)):
            for index, channel in enumerate(channels):
                row = start + patch * len(channels) + index
                weight[row] = 0
                weight[(row, 384 + channel, *place)] = gain
    model.condition_embedder.text_embedder.linear_1.weight.zero_()
    _flag_clean_frames(model, sigmas)
    value, output = torch.zeros(width, width), torch.zeros(width, width)
    value[:num_low, :num_low] = torch.eye(num_low)
    output[num_low:first_high, :num_low] = torch.eye(num_low)
    for matrix in (value, output):
        matrix[first_high:end, first_high:end] = torch.eye(end - first_high)
    for index, block in enumerate(model.blocks):
        _start_block(block, is_first=index == 0)
        block.attn2.to_out[0].weight.mul_(0.05)
        block.ffn.net[2].weight.mul_(0.3)
        if index == 0:
            _look_at_same_place(block.attn1, model.rope, qk_scale=0.1)
            block.attn1.to_v.weight.mul_(0.3).add_(value.to(weight))
            block.attn1.to_out[0].weight.mul_(0.3).add_(output.to(weight))
        else:
            pattern = 0.5 * _same_place(model.rope).to(weight)
            heads = len(block.attn1.to_q.bias) // HEAD_DIM
            block.attn1.to_q.bias.copy_(pattern.repeat(heads))
            block.attn1.to_k.bias.copy_(pattern.repeat(heads))
            block.attn1.norm_q.weight.fill_(2.0)
            block.attn1.norm_k.weight.fill_(2.0)


@torch.no_grad()
def fit_output_layer(
    transformer: WanTransformer3DModel, samples: Iterable[FitSample], damping: float = 1e-3
) -> None:
    """Solve ``proj_out`` by ridge regression from the features that the other layers make.

    Args:
        transformer: Only its ``proj_out`` is changed.
        samples: Runs of it with what it should return.
        damping: Added to the diagonal of the normal equations, relative to its mean.
    """
    layer: Any = transformer.proj_out
    width, patch = layer.in_features, int(transformer.config["patch_size"][1])
    device = layer.weight.device
    gram = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
    target = torch.zeros(width + 1, layer.out_features, dtype=torch.float64, device=device)
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    try:
        for sample in samples:
            sample.forward()
            batch, channels, num_frames, height, columns = sample.residual.shape
            num_tokens = num_frames * (height // patch) * (columns // patch)
            features = seen.pop().reshape(batch, -1, width)[:, -num_tokens:].flatten(0, 1)
            ones = torch.ones(len(features), 1, device=device)
            features = torch.cat([features, ones], dim=1).double()
            cells = (height // patch, patch, columns // patch, patch)
            tokens = sample.residual.reshape(batch, channels, num_frames, *cells)
            wanted = tokens.permute(0, 2, 3, 5, 4, 6, 1).reshape(-1, channels * patch**2)
            gram += features.T @ features
            target += features.T @ wanted.double()
    finally:
        hook.remove()
    eye = torch.eye(width + 1, dtype=torch.float64, device=device)
    solution = torch.linalg.solve(gram + damping * gram.diagonal().mean() * eye, target)
    layer.weight.copy_(solution[:-1].T)
    layer.bias.copy_(solution[-1])


def silence_output(model: Any) -> None:
    """Make a transformer return zero."""
    model.proj_out.weight.zero_()
    model.proj_out.bias.zero_()


def randomize_attention(attention: Any) -> None:
    """Give a layer of attention small random weights without biases."""
    for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        layer.weight.normal_(std=0.02)
        layer.bias.zero_()


def _randomize_embedding(model: Any) -> Tensor:
    weight: Tensor = model.patch_embedding.weight
    weight.normal_(std=0.01)
    weight[:, :384].normal_(std=0.002)  # the noisy latents
    model.patch_embedding.bias.zero_()
    return weight


def _flag_clean_frames(model: Any, sigmas: Tensor) -> None:
    """Make the last attention shift of block input +3 at noise level 0 and -3 at the others."""
    embedder = model.condition_embedder
    levels = torch.cat([torch.zeros(1), sigmas.cpu()]).to(embedder.time_proj.weight)
    features = F.silu(embedder.time_embedder(embedder.timesteps_proj(levels * 1000)))
    features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
    wanted = torch.full_like(features[:, :1], -3.0)
    wanted[0] = 3.0
    # On the CPU: other devices solve systems of full rank only.
    solution = torch.linalg.lstsq(features.cpu(), wanted.cpu()).solution[:, 0].to(features)
    row = embedder.time_proj.out_features // 6 - 1  # the shift comes first of six
    embedder.time_proj.weight.mul_(0.05)
    embedder.time_proj.bias.zero_()
    embedder.time_proj.weight[row] = solution[:-1]
    embedder.time_proj.bias[row] = solution[-1]


def _start_block(block: Any, *, is_first: bool) -> None:
    """Small random attention, open gates."""
    block.scale_shift_table.normal_(std=0.01)
    block.scale_shift_table[:, 2] += 1.0 if is_first else 0.5  # gate of the attention
    block.scale_shift_table[:, 5] += 0.5  # gate of the feed-forward layer
    randomize_attention(block.attn1)


def _same_place(rope: Any) -> Tensor:
    """``[64]`` query and key whose product, once rotated, peaks where both places are the same."""
    pattern = torch.zeros(HEAD_DIM)
    for start in (rope.t_dim, rope.t_dim + rope.h_dim):
        for index, value in enumerate(SAME_PLACE):
            pattern[start + 2 * index] = value
    return pattern


def _look_at_same_place(attention: Any, rope: Any, qk_scale: float) -> None:
    """All heads look at their own place, in the frames that the last feature marks."""
    pattern = _same_place(rope).to(attention.to_q.bias)
    heads = attention.to_q.out_features // HEAD_DIM
    slow = rope.t_dim - 2  # the slowest rotary frequency of time hardly turns
    attention.to_q.weight.mul_(qk_scale)
    attention.to_k.weight.mul_(qk_scale)
    attention.to_q.bias.copy_(pattern.repeat(heads))
    attention.to_k.bias.copy_(pattern.repeat(heads))
    attention.to_q.bias[slow::HEAD_DIM] = 1.2
    attention.to_k.weight[slow::HEAD_DIM, -1] = 0.4
    attention.norm_q.weight.fill_(4.5)
    attention.norm_k.weight.fill_(4.5)
