"""Self-attention of a part of the tokens, and that of ViBe: fine nearby, coarse everywhere."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformerBlock,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from swifti2v.config import AttentionConfig
from swifti2v.errors import ShapeError

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines ``[1, L, 1, head_dim]``, each value twice, as diffusers lays them out."""


class TokenGrid(NamedTuple):
    """Tokens of a window of frames; they are ordered frame by frame, row by row."""

    frames: int
    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        """L of the attention."""
        return self.frames * self.rows * self.columns


def use_attention(
    transformer: nn.Module, config: AttentionConfig, rows: int, columns: int, num_given: int = 0
) -> None:
    """Let the self-attention of a Wan transformer work as ``config`` says, from the next call on.

    Weights are not touched, and asking twice for the same changes nothing.

    Args:
        transformer: ``WanTransformer3DModel`` or ``SegmentTransformer3DModel``, bare or wrapped.
        config: Settings.
        rows: Tokens along the height of a frame.
        columns: Tokens along its width.
        num_given: Clean frames at the start of the window.

    Raises:
        ShapeError: A side is not a multiple of ``config.pool``.
    """
    wanted: GclfAttention | ReadOnlyAttention | None = None
    if config.kind == "gclf":
        wanted = GclfAttention(config, rows, columns)
    elif config.context == "read_only":
        wanted = ReadOnlyAttention(num_given * rows * columns)
    for block in transformer.modules():
        if not isinstance(block, WanTransformerBlock):
            continue
        attention: Any = block.attn1
        if wanted is not None and attention.processor != wanted:
            attention.set_processor(wanted)
        elif wanted is None and isinstance(attention.processor, GclfAttention | ReadOnlyAttention):
            attention.set_processor(WanAttnProcessor())  # type: ignore[no-untyped-call]


def attend_from(attention: Any, hidden: Tensor, rotary: Rotary, first: int) -> Tensor:
    """Self-attention of a Wan block over all tokens, for those from ``first`` on.

    Args:
        attention: diffusers' ``WanAttention``.
        hidden: ``[B, L, D]``.
        rotary: Rotary embedding of the L tokens.
        first: Earlier tokens are keys and values only.

    Returns:
        ``[B, L - first, D]``.
    """
    if first == 0 or not isinstance(attention.processor, WanAttnProcessor):
        attended: Tensor = attention(hidden, None, None, rotary)
        return attended[:, first:]
    query, key, value = _project(attention, hidden, first)
    later = (rotary[0][:, first:], rotary[1][:, first:])
    query, key = rotate(query, later), rotate(key, rotary)
    parallel: Any = attention.processor._parallel_config  # the processes that share the tokens
    output = dispatch_attention_fn(query, key, value, parallel_config=parallel)
    return _project_back(attention, output, hidden)


@dataclass(frozen=True, slots=True)
class ReadOnlyAttention:
    """Attention in which given tokens attend to each other alone, and all others to all tokens.

    What the given frames become in a block then does not depend on the target, so that a model of
    this kind could keep it from segment to segment.

    Attributes:
        num_given: Tokens at the start of the window.
    """

    num_given: int

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """Attend; ``[B, L, D]`` in and out, as in ``WanAttnProcessor``."""
        assert encoder_hidden_states is None, "this is self-attention"
        assert attention_mask is None, "the parts are taken apart here"
        assert rotary_emb is not None, "Wan rotates queries and keys"
        query, key, value = _project(attn, hidden_states)
        query, key = rotate(query, rotary_emb), rotate(key, rotary_emb)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        given = self.num_given
        parts = ((query[:, :, :given], given), (query[:, :, given:], key.shape[2]))
        attended = torch.cat(
            [
                F.scaled_dot_product_attention(part, key[:, :, :seen], value[:, :, :seen])
                for part, seen in parts
                if part.shape[2]
            ],
            dim=2,
        )  # [B, H, L, D]
        return _project_back(attn, attended.transpose(1, 2), hidden_states)


@dataclass(frozen=True, slots=True)
class GclfAttention:
    """Global coarse, local fine: the attention processor of diffusers' ``WanAttention``.

    A token attends to the tokens of all frames in a spatial window around it, and to the means of
    all ``pool`` x ``pool`` squares of all frames. With a window over the whole frame and no pool it
    is plain attention. One instance serves all blocks, any batch and any number of frames.

    Attributes:
        config: Settings.
        rows: Tokens along the height of a frame.
        columns: Tokens along its width.
        backend: ``flex`` skips masked keys, on a GPU; ``dense`` runs everywhere, a row of
            queries at a time; ``auto`` takes the first that runs.

    Raises:
        ShapeError: A side is not a multiple of ``config.pool``.

    Source:
        ViBe, arXiv:2603.23326, and its public code; the window's rule is rebuilt from prose.
    """

    config: AttentionConfig
    rows: int
    columns: int
    backend: Literal["auto", "flex", "dense"] = "auto"

    def __post_init__(self) -> None:
        pool = self.config.pool or 1
        if self.rows % pool or self.columns % pool:
            raise ShapeError(
                f"{self.rows}x{self.columns} tokens do not divide into {pool}x{pool} squares; choose "
                f"an output size of which a token's side times {pool} is a factor, or another "
                "stage2.attention.pool"
            )

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns a token sees at full resolution: as asked for, at most the frame."""
        return min(self.config.window[0], self.rows), min(self.config.window[1], self.columns)

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """Attend; ``[B, L, D]`` in and out, as in ``WanAttnProcessor``."""
        assert encoder_hidden_states is None, "this is self-attention"
        assert attention_mask is None, "the mask is made here"
        assert rotary_emb is not None, "Wan rotates queries and keys"
        frames, rest = divmod(hidden_states.shape[1], self.rows * self.columns)
        if rest:
            raise ShapeError(
                f"{hidden_states.shape[1]} tokens do not fill frames of {self.rows}x{self.columns}"
            )
        grid = TokenGrid(frames, self.rows, self.columns)
        query, key, value = _project(attn, hidden_states)
        rotated = rotate(key, rotary_emb)
        coarse = self._coarse(key, rotated, value, rotary_emb, grid)
        attended = self.attend(rotate(query, rotary_emb), rotated, value, coarse, grid)
        return _project_back(attn, attended, hidden_states)

    def _coarse(
        self, key: Tensor, rotated: Tensor, value: Tensor, rotary: Rotary, grid: TokenGrid
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, L', H, D]`` of the squares; L' is 0 without a pool."""
        pool = self.config.pool
        if pool is None:
            return rotated[:, :0], value[:, :0]
        if self.config.pooled_keys == "after_rope":
            pooled = pool_tokens(rotated, grid, pool)
        else:
            pooled = rotate(pool_tokens(key, grid, pool), pool_rotary(rotary, grid, pool))
        return pooled, pool_tokens(value, grid, pool)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        coarse: tuple[Tensor, Tensor],
        grid: TokenGrid,
    ) -> Tensor:
        """Attention of rotated queries over the fine keys of their window and all coarse keys.

        Args:
            query: ``[B, L, H, D]``.
            key: ``[B, L, H, D]``.
            value: ``[B, L, H, D]``.
            coarse: Keys and values ``[B, L', H, D]``.
            grid: Grid of the L tokens.

        Returns:
            ``[B, L, H, D]``.
        """
        flex = query.is_cuda and find_spec("triton") is not None
        if self.backend == "flex" or (self.backend == "auto" and flex):
            return _attend_flex(query, key, value, coarse, grid, self.window)
        return _attend_dense(query, key, value, coarse, grid, self.window)


def _project(attention: Any, hidden: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the tokens from ``first`` on, keys and values of all: ``[B, L, H, D]``."""
    heads = (attention.heads, -1)
    query = attention.norm_q(attention.to_q(hidden[:, first:])).unflatten(2, heads)
    key = attention.norm_k(attention.to_k(hidden)).unflatten(2, heads)
    return query, key, attention.to_v(hidden).unflatten(2, heads)


def _project_back(attention: Any, attended: Tensor, hidden: Tensor) -> Tensor:
    """Output layer over ``[B, L, H, D]``, in the type of ``hidden``."""
    output: Tensor = attention.to_out[0](attended.flatten(2).type_as(hidden))
    return attention.to_out[1](output)  # type: ignore[no-any-return]


def rotate(tokens: Tensor, rotary: Rotary) -> Tensor:
    """Apply a rotary embedding to ``[B, L, H, D]``, neighbouring values as pairs."""
    cosine, sine = rotary[0][..., 0::2], rotary[1][..., 1::2]
    first, second = torch.unflatten(tokens, -1, (-1, 2)).unbind(-1)
    pairs = (first * cosine - second * sine, first * sine + second * cosine)
    return torch.stack(pairs, dim=-1).flatten(-2).type_as(tokens)


def pool_tokens(tokens: Tensor, grid: TokenGrid, pool: int) -> Tensor:
    """Means ``[B, L / pool**2, ...]`` of the ``pool`` x ``pool`` squares of ``[B, L, ...]``."""
    frames, rows, columns = grid
    sides = (frames, rows // pool, pool, columns // pool, pool)
    return torch.unflatten(tokens, 1, sides).mean(dim=(3, 5)).flatten(1, 3)


def pool_rotary(rotary: Rotary, grid: TokenGrid, pool: int) -> Rotary:
    """Rotary embedding of the middles of the squares.

    The mean of the unit vectors at equal steps points to their middle; the angles of a square
    span less than a full turn, so it is never zero and never points the other way.
    """
    cosine, sine = (pool_tokens(table, grid, pool) for table in rotary)
    length = (cosine.square() + sine.square()).sqrt()
    return cosine / length, sine / length


def window_start(place: Any, window: int, size: int) -> Any:
    """First row (or column) that the token at ``place`` sees; ints or tensors of them."""
    if isinstance(place, Tensor):
        return (place - window // 2).clamp(0, size - window)
    return min(max(place - window // 2, 0), size - window)


def _attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coarse: tuple[Tensor, Tensor],
    grid: TokenGrid,
    window: tuple[int, int],
) -> Tensor:
    """A row of queries of all frames at a time: its keys are cut out, only columns are masked."""
    frames, rows, columns = grid
    heads = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [B, H, L, D]
    query, key, value = (torch.unflatten(tensor, 2, grid) for tensor in heads)
    coarse_key, coarse_value = (tensor.transpose(1, 2) for tensor in coarse)
    mask = _row_mask(grid, window, coarse_key.shape[2], query.device)

    def attend_rows() -> Iterator[Tensor]:
        for row in range(rows):
            start = window_start(row, window[0], rows)
            seen = slice(start, start + window[0])
            attended = F.scaled_dot_product_attention(
                query[:, :, :, row].flatten(2, 3),
                torch.cat([key[:, :, :, seen].flatten(2, 4), coarse_key], dim=2),
                torch.cat([value[:, :, :, seen].flatten(2, 4), coarse_value], dim=2),
                attn_mask=mask,
            )
            yield torch.unflatten(attended, 2, (frames, columns))

    return torch.stack(list(attend_rows()), dim=3).flatten(2, 4).transpose(1, 2)


def _row_mask(
    grid: TokenGrid, window: tuple[int, int], num_coarse: int, device: torch.device
) -> Tensor | None:
    """Mask of the keys that a row of queries sees, the same for every row; None for all columns.

    Returns:
        ``[F * columns, F * window rows * columns + L']`` bool.
    """
    frames, _, columns = grid
    if window[1] == columns:
        return None
    places = torch.arange(columns, device=device)
    starts = window_start(places, window[1], columns)[:, None]
    near = (places >= starts) & (places < starts + window[1])  # [query column, key column]
    fine = near.repeat(frames, frames * window[0])
    return F.pad(fine, (0, num_coarse), value=True)


def _attend_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coarse: tuple[Tensor, Tensor],
    grid: TokenGrid,
    window: tuple[int, int],
) -> Tensor:
    mask = _block_mask(grid, window, coarse[0].shape[1], query.device)
    keys, values = torch.cat([key, coarse[0]], dim=1), torch.cat([value, coarse[1]], dim=1)
    attend: Any = _compiled_flex_attention() if query.is_cuda else flex_attention
    heads = (tensor.transpose(1, 2) for tensor in (query, keys, values))
    attended: Tensor = attend(*heads, block_mask=mask)
    return attended.transpose(1, 2)


@lru_cache(maxsize=4)  # one size has few window lengths: first, inner and last segment
def _block_mask(
    grid: TokenGrid, window: tuple[int, int], num_coarse: int, device: torch.device
) -> BlockMask:
    num_fine, (_, rows, columns) = grid.num_tokens, grid

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        row = (key // columns) % rows - window_start((query // columns) % rows, window[0], rows)
        column = key % columns - window_start(query % columns, window[1], columns)
        is_near = (row >= 0) & (row < window[0]) & (column >= 0) & (column < window[1])
        seen: Tensor = is_near | (key >= num_fine)
        return seen

    # Compiled, the mask is made block by block; else all L x (L + L') of it are held at once.
    is_cuda = device.type == "cuda"
    return create_block_mask(
        sees, None, None, num_fine, num_fine + num_coarse, device, _compile=is_cuda
    )


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=False)
