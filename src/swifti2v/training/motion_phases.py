"""Camera motion as rotary phases: the structured start of the nano model's Stage I.

A rotary embedding turns a query by an angle for each step it stands from the origin. A query that
is turned further, by the angles of a displacement, therefore meets the key of the place that lies
so far away. These angles' cosines and sines are the phases. Block 0 learns to write the phases of
the motion that a prompt asks for into token features; block 1 starts as attention that takes them
for queries and fetches the photo's content from the displaced place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from swifti2v.errors import ConfigError
from swifti2v.models.codec import count_channels
from swifti2v.training.camera_motion import SHIFT, ZOOM, CameraMotion
from swifti2v.training.initialization import (
    HEAD_DIM,
    SAME_PLACE,
    randomize_attention,
    require_structured,
    silence_output,
)
from swifti2v.training.nano_codec import mean_channels
from swifti2v.training.nano_models import STAGE1_SCALE

NUM_PHASES = 12
"""Cosine and sine for three frequencies, of rows and then of columns."""
NUM_LUMA, NUM_CHROMA = 16, 4
"""Coefficients of the photo that a token holds, of luma and of each of Cb and Cr: all of a cell
of 4x4 pixels that do not change in time."""
NUM_CHANNELS = count_channels(STAGE1_SCALE.space)
"""Channels of Stage I's latents."""
FIRST_CONDITION = NUM_CHANNELS + 4
"""Input channel where the condition starts: latents and four mask channels come first."""
_ROTARY_BASE = 10000.0  # diffusers' ``WanRotaryPosEmbed``
_AXIS_DIM = 2 * (HEAD_DIM // 6)  # features of a head that turn with the row, and with the column
_CONSTANT = 5.0
_SHARPNESS = 2.3  # of queries and keys of the displaced place
_SAME_PLACE_SHARPNESS = 4.5


@dataclass(frozen=True, slots=True)
class FeatureLayout:
    """What the features of a Stage I token mean at the start."""

    width: int
    """All features; at least 128."""
    num_content = NUM_LUMA + 2 * NUM_CHROMA
    """Coefficients that a token holds of its own condition."""

    @property
    def moved(self) -> slice:
        """Photo content of the displaced place; the token's own comes before."""
        return slice(self.num_content, 2 * self.num_content)

    @property
    def still(self) -> slice:
        """Photo content of the same place."""
        return slice(2 * self.num_content, 3 * self.num_content)

    @property
    def phases(self) -> slice:
        """Where block 0 writes the phases."""
        return slice(3 * self.num_content, 3 * self.num_content + NUM_PHASES)

    @property
    def chart(self) -> slice:
        """Column, row and time."""
        return slice(self.phases.stop, self.phases.stop + 3)

    @property
    def constants(self) -> slice:
        """One and its negative, then whether the frame is the photo and its negative.

        The pairs leave the mean of a token at zero, which the layer norms subtract.
        """
        return slice(self.width - 4, self.width)

    @property
    def channels(self) -> list[int]:
        """Latent channels of the content: the spatial frequencies that do not change in time."""
        _, cb, cr = mean_channels(NUM_CHANNELS)
        luma, chroma = range(NUM_LUMA), range(NUM_CHROMA)
        return [*luma, *(cb + c for c in chroma), *(cr + c for c in chroma)]


def measure_displacement(motion: CameraMotion, time: float, grid: tuple[int, int]) -> Tensor:
    """How far away the content that a place shows now was at the start of a clip.

    Args:
        motion: As ``render_motion`` does it.
        time: Part of the clip that has passed, in [0, 1].
        grid: Rows and columns of tokens.

    Returns:
        ``[2, rows, columns]`` in tokens, downwards and to the right.
    """
    rows, columns = grid
    row, column = torch.meshgrid(
        torch.arange(rows) + 0.5 - rows / 2,
        torch.arange(columns) + 0.5 - columns / 2,
        indexing="ij",
    )  # from the centre
    down = {"tilt up": -SHIFT, "tilt down": SHIFT}.get(motion, 0.0) * time * rows
    right = {"pan left": -SHIFT, "pan right": SHIFT}.get(motion, 0.0) * time * columns
    growth = {"zoom in": ZOOM**time, "zoom out": ZOOM**-time}.get(motion, 1.0) - 1
    return torch.stack([down + growth * row, right + growth * column])


def make_phases(motion: CameraMotion, times: Sequence[float], grid: tuple[int, int]) -> Tensor:
    """Phases of every token of a clip.

    Args:
        motion: What the camera does.
        times: Of F latent frames, see ``measure_displacement``.
        grid: Rows and columns of tokens.

    Returns:
        ``[F * rows * columns, 12]``: of the rows' displacement, then of the columns'; for each from
        the fastest frequency the cosine and the sine.
    """
    frequencies = _ROTARY_BASE ** (-2 * torch.arange(len(SAME_PLACE)) / _AXIS_DIM)
    away = torch.stack([measure_displacement(motion, time, grid) for time in times])
    angles = away.movedim(1, -1)[..., None] * frequencies  # [F, rows, columns, 2, 3]
    return torch.stack([angles.cos(), angles.sin()], dim=-1).reshape(-1, NUM_PHASES)


@torch.no_grad()
def initialize_stage1(transformer: WanTransformer3DModel) -> FeatureLayout:
    """Start of Stage I: block 1 fetches the photo's content of the displaced and the same place.

    Half of its heads look where the phases tell, the others at their own place; the phases
    themselves are zero until block 0 has learnt them. Other layers start random and weak.

    Args:
        transformer: 96 latent channels, 4 mask channels, 96 condition channels, patches of one
            cell, at least two blocks; changed.

    Raises:
        ConfigError: See ``require_structured``; or the patches or blocks are others.
    """
    layout = FeatureLayout(require_structured(transformer))
    model: Any = transformer
    if tuple(model.config["patch_size"]) != (1, 1, 1) or len(model.blocks) < 2:
        raise ConfigError(
            f"Stage I with patches {tuple(model.config['patch_size'])} and {len(model.blocks)} "
            "blocks has no structured start; use patches (1, 1, 1) and at least 2 blocks"
        )
    silence_output(model)
    _embed_condition(model.patch_embedding, layout)
    for index, block in enumerate(model.blocks):
        randomize_attention(block.attn1)
        block.scale_shift_table.normal_(std=0.01)
        block.scale_shift_table[:, 2] += 1.0 if index == 1 else 0.3  # gate of the attention
        # gate of the feed-forward layer
        block.scale_shift_table[:, 5] += 1.0 if index == 0 else 0.3
        if index == 0:
            block.attn1.to_out[0].weight.mul_(0.05)  # its work is done by text and feed-forward
        else:
            share = 0.2 if index == 1 else 0.02  # later blocks start almost silent
            block.ffn.net[2].weight.mul_(share)
            block.attn2.to_out[0].weight.mul_(share)
    _look_along_phases(model.blocks[1].attn1, model.rope, layout)
    return layout


def _embed_condition(embedding: Any, layout: FeatureLayout) -> None:
    """Photo or chart, constants and the photo's flag; the noisy latents do not enter."""
    weight, bias = embedding.weight, embedding.bias
    weight.zero_()
    bias.zero_()
    for feature, channel in enumerate(layout.channels):
        weight[feature, FIRST_CONDITION + channel] = 0.7
    for offset, (channel, gain) in enumerate(
        zip(mean_channels(NUM_CHANNELS), (0.5, 0.3, 0.3), strict=True)
    ):
        weight[layout.chart.start + offset, FIRST_CONDITION + channel] = gain
    one, minus_one, photo, minus_photo = range(*layout.constants.indices(layout.width))
    bias[one], bias[minus_one] = _CONSTANT, -_CONSTANT
    for feature, sign in ((photo, 1), (minus_photo, -1)):
        weight[feature, FIRST_CONDITION - 4 : FIRST_CONDITION] = sign * _CONSTANT / 2  # four of 1
        bias[feature] = -sign * _CONSTANT


def _look_along_phases(attention: Any, rope: Any, layout: FeatureLayout) -> None:
    """The first half of the heads looks where the phases tell, the other half at its own place."""
    for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        layer.weight.mul_(0.02)
    query, key = attention.to_q.weight, attention.to_k.weight
    one, photo = layout.constants.start, layout.constants.start + 2
    num_heads = layout.width // HEAD_DIM
    num_moving = num_heads // 2
    slow = rope.t_dim - 2  # the slowest rotary frequency of time hardly turns
    for head in range(num_heads):
        first = head * HEAD_DIM
        for axis, start in enumerate((rope.t_dim, rope.t_dim + rope.h_dim)):
            for index, amplitude in enumerate(SAME_PLACE):
                row = first + start + 2 * index
                key[row, one] += amplitude / _CONSTANT
                if head < num_moving:
                    phase = layout.phases.start + 2 * (len(SAME_PLACE) * axis + index)
                    query[row, phase] += amplitude
                    query[row + 1, phase + 1] += amplitude
                else:
                    query[row, one] += amplitude / _CONSTANT
        query[first + slow, one] += 1.2 / _CONSTANT
        key[first + slow, photo] += 1.2 / _CONSTANT
    middle = num_moving * HEAD_DIM
    attention.norm_k.weight.fill_(_SHARPNESS)
    attention.norm_q.weight[:middle] = _SHARPNESS
    attention.norm_q.weight[middle:] = _SAME_PLACE_SHARPNESS**2 / _SHARPNESS
    content = torch.arange(layout.num_content)
    for offset, fetched in ((0, layout.moved), (middle, layout.still)):
        attention.to_v.weight[offset + content, content] += 1
        attention.to_out[0].weight[fetched.start + content, offset + content] += 1
