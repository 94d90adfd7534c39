"""Global coarse, local fine attention: what a token sees, in every backend, in real transformers."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swifti2v.config import AttentionConfig
from swifti2v.errors import ConfigError, ShapeError
from swifti2v.models.attention import (
    GclfAttention,
    ReadOnlyAttention,
    TokenGrid,
    pool_rotary,
    pool_tokens,
    rotate,
    use_attention,
    window_start,
)
from swifti2v.models.transformer import SegmentTransformer3DModel

FULL = AttentionConfig()
GCLF = AttentionConfig(kind="gclf", window=(2, 3), pool=2)
SIZES: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 16, "freq_dim": 16,
    "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip


def wide(**changes: Any) -> AttentionConfig:
    """A window over everything and no coarse keys."""
    values: dict[str, Any] = {"kind": "gclf", "window": (99, 99), "pool": None}
    return AttentionConfig(**(values | changes))


def segment_transformer() -> Any:
    torch.manual_seed(0)
    return SegmentTransformer3DModel(in_channels=8, out_channels=4, **SIZES).eval()


def run(model: Any, seed: int = 1, positions: list[int] | None = None, batch: int = 2) -> Tensor:
    """4 frames of 4x6 tokens."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, 8, 4, 8, 12, generator=generator)
    text = torch.randn(batch, 5, 16, generator=generator)
    sigma = torch.tensor([[0.0, 0.0, 0.7, 0.7]]).expand(batch, -1)
    output: Tensor = model(hidden, sigma, text, temporal_positions=positions)
    return output


def what_is_seen(config: AttentionConfig, grid: TokenGrid, backend: Any) -> Tensor:
    """``[L, L + L']`` weights: values are one-hot, so the output says which keys went into it."""
    attention = GclfAttention(config, grid.rows, grid.columns, backend)
    pool = config.pool
    num_coarse = 0 if pool is None else grid.num_tokens // pool**2
    num_keys = grid.num_tokens + num_coarse
    values = torch.eye(num_keys)[None, :, None]  # [1, L + L', 1, L + L']
    queries = torch.zeros(1, grid.num_tokens, 1, num_keys)
    fine, coarse = values[:, : grid.num_tokens], values[:, grid.num_tokens :]
    zeros = torch.zeros_like(coarse)
    return attention.attend(queries, torch.zeros_like(fine), fine, (zeros, coarse), grid)[0, :, 0]


grids = st.builds(TokenGrid, st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)).map(
    lambda grid: TokenGrid(grid.frames, 2 * grid.rows, 2 * grid.columns)
)
windows = st.tuples(st.integers(1, 7), st.integers(1, 7))


@settings(max_examples=25, deadline=None)
@given(grid=grids, window=windows, pool=st.sampled_from([None, 2]))
def test_the_mask_is_that_of_a_loop_over_all_pairs(
    grid: TokenGrid, window: tuple[int, int], pool: int | None
) -> None:
    found = what_is_seen(AttentionConfig(kind="gclf", window=window, pool=pool), grid, "dense") > 0
    places = [
        (row, column)
        for _ in range(grid.frames)
        for row in range(grid.rows)
        for column in range(grid.columns)
    ]
    for query, (row, column) in enumerate(places):
        for key, (other_row, other_column) in enumerate(places):
            is_near = True
            for place, other, size, side in (
                (row, other_row, window[0], grid.rows),
                (column, other_column, window[1], grid.columns),
            ):
                first = place - size // 2
                while first + size > side:
                    first -= 1
                while first < 0:
                    first += 1
                is_near &= first <= other < first + size
            assert found[query, key] == is_near
    assert found[:, grid.num_tokens :].all()


@settings(max_examples=25, deadline=None)
@given(grid=grids, window=windows)
def test_every_token_sees_as_many_keys_and_itself(grid: TokenGrid, window: tuple[int, int]) -> None:
    weights = what_is_seen(AttentionConfig(kind="gclf", window=window), grid, "dense")
    num_fine = grid.frames * min(window[0], grid.rows) * min(window[1], grid.columns)
    num_keys = num_fine + grid.num_tokens // 4
    assert ((weights > 0).sum(dim=1) == num_keys).all()
    torch.testing.assert_close(weights, (weights > 0) / num_keys)  # equal queries, equal weights
    assert (weights.diagonal() > 0).all()


@given(st.integers(1, 200), st.data())
def test_a_window_holds_its_token_and_is_centred_where_there_is_room(size: int, data: Any) -> None:
    window = data.draw(st.integers(1, size))
    starts = [window_start(place, window, size) for place in range(size)]
    assert torch.equal(window_start(torch.arange(size), window, size), torch.tensor(starts))
    assert all(s <= place < s + window <= size for place, s in enumerate(starts))
    assert (starts[0], starts[-1]) == (0, size - window)
    assert all(0 <= b - a <= 1 for a, b in pairwise(starts))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=10, deadline=None)
@given(grid=grids, window=windows, pool=st.sampled_from([None, 2]), seed=st.integers(0, 99))
def test_backends_agree(
    grid: TokenGrid, window: tuple[int, int], pool: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 2, grid.num_tokens, 3, 16, generator=generator).unbind(0)
    config = AttentionConfig(kind="gclf", window=window, pool=pool)
    coarse = (
        (key[:, :0], value[:, :0])
        if pool is None
        else (pool_tokens(key, grid, pool), pool_tokens(value, grid, pool))
    )
    dense, flex = (
        GclfAttention(config, grid.rows, grid.columns, name).attend(query, key, value, coarse, grid)
        for name in ("dense", "flex")
    )
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, [0, 7, 8, 9]])
def test_a_window_over_everything_without_a_pool_is_full_attention(positions):
    model = segment_transformer()
    full = run(model, positions=positions)
    use_attention(model, wide(), 4, 6)
    torch.testing.assert_close(run(model, positions=positions), full, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_so_it_is_in_a_plain_wan_transformer_of_any_number_of_frames():
    torch.manual_seed(0)
    kind: Any = WanTransformer3DModel
    model = kind(in_channels=4, out_channels=4, **SIZES).eval()
    for frames in (1, 3):
        inputs = torch.randn(1, 4, frames, 8, 12), torch.tensor([500]), torch.randn(1, 5, 16)
        use_attention(model, FULL, 4, 6)
        full = model(*inputs, return_dict=False)[0]
        use_attention(model, wide(), 4, 6)
        torch.testing.assert_close(model(*inputs, return_dict=False)[0], full, atol=1e-5, rtol=1e-4)
        use_attention(model, GCLF, 4, 6)
        assert (model(*inputs, return_dict=False)[0] - full).abs().max() > 1e-4


@torch.no_grad()
def test_it_can_be_taken_back_and_other_processors_are_left_alone():
    model = segment_transformer()
    before = [block.attn1.processor for block in model.blocks]
    full = run(model)
    use_attention(model, FULL, 4, 6)
    assert [block.attn1.processor for block in model.blocks] == before  # not even replaced
    use_attention(model, GCLF, 4, 6)
    processors = [block.attn1.processor for block in model.blocks]
    assert not torch.equal(run(model), full)
    use_attention(model, GCLF, 4, 6)
    pairs = zip(model.blocks, processors, strict=True)
    assert all(block.attn1.processor is processor for block, processor in pairs)
    assert not any(isinstance(block.attn2.processor, GclfAttention) for block in model.blocks)
    use_attention(model, FULL, 4, 6)
    assert torch.equal(run(model), full)


@torch.no_grad()
@pytest.mark.parametrize("pooled_keys", ["after_rope", "before_rope"])
def test_samples_of_a_batch_are_independent(pooled_keys):
    model = segment_transformer()
    use_attention(model, replace(GCLF, pooled_keys=pooled_keys), 4, 6)
    both = run(model)
    hidden = torch.randn(2, 8, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    torch.randn(2, 8, 4, 8, 12, generator=generator)
    text = torch.randn(2, 5, 16, generator=generator)
    sigma = torch.tensor([[0.0, 0.0, 0.7, 0.7]])
    for one in range(2):
        alone = model(hidden[one : one + 1], sigma, text[one : one + 1])
        torch.testing.assert_close(alone, both[one : one + 1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["after_rope", "before_rope"])
def test_only_differences_of_temporal_positions_count(kind):
    model = segment_transformer()
    use_attention(model, replace(GCLF, pooled_keys=kind), 4, 6)
    plain, shifted, spread = (
        run(model, positions=p) for p in ([0, 1, 2, 3], [7, 8, 9, 10], [0, 7, 8, 9])
    )
    torch.testing.assert_close(plain, shifted, atol=1e-5, rtol=1e-4)
    assert (plain - spread).abs().max() > 1e-4


def test_gradients_reach_every_weight_and_pooled_keys_are_not_detached():
    model = segment_transformer().train()
    use_attention(model, GCLF, 4, 6)
    run(model).square().mean().backward()  # type: ignore[no-untyped-call]
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    # A value outside the window of a query still reaches it, through its square's mean.
    grid = TokenGrid(1, 4, 6)
    attention = GclfAttention(replace(GCLF, window=(1, 1)), 4, 6)
    value = torch.zeros(1, 24, 1, 8, requires_grad=True)
    query = torch.zeros(1, 24, 1, 8)
    coarse = pool_tokens(query, grid, 2), pool_tokens(value, grid, 2)
    attention.attend(query, query, value, coarse, grid)[0, 0].sum().backward()  # type: ignore[no-untyped-call]
    assert value.grad is not None
    assert (value.grad > 0).all()


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = segment_transformer().train()
        use_attention(model, GCLF, 4, 6)
        if checkpointing:
            model.enable_gradient_checkpointing()
        run(model).square().mean().backward()  # type: ignore[no-untyped-call]
        gradients.append(model.patch_embedding.weight.grad)
    torch.testing.assert_close(*gradients)


def test_means_are_those_of_squares_of_one_frame():
    grid = TokenGrid(2, 4, 6)
    tokens = torch.arange(48.0)[None, :, None, None]
    squares = pool_tokens(tokens, grid, 2).flatten().tolist()
    assert len(squares) == 12
    assert squares[0] == (0 + 1 + 6 + 7) / 4
    assert squares[5] == (16 + 17 + 22 + 23) / 4
    assert squares[6] == 24 + squares[0]


@pytest.mark.parametrize("pool", [2, 3, 6])
def test_a_key_pooled_before_rotation_stands_in_the_middle_of_its_square(pool):
    """The mean of equal keys is the key itself, rotated by the mean position."""
    model = segment_transformer()
    grid = TokenGrid(2, 6, 12)
    rotary = model._rotary_embedding([0, 1], range(6), 12)
    middle = (pool - 1) / 2
    cosine, sine = (table[..., 0::2] for table in pool_rotary(rotary, grid, pool))
    angle = torch.atan2(sine, cosine)[0, 0, 0]
    rope: Any = model.rope
    pairs = [rope.t_dim // 2, rope.h_dim // 2, rope.w_dim // 2]
    rates = [10000 ** -(torch.arange(count) / count) for count in pairs]
    expected = torch.cat([rates[0] * 0, rates[1] * middle, rates[2] * middle])
    turns = (angle - expected) / (2 * torch.pi)
    torch.testing.assert_close(turns, turns.round(), atol=1e-5, rtol=0)
    torch.testing.assert_close(cosine**2 + sine**2, torch.ones_like(cosine))


def test_rotation_is_that_of_diffusers():
    model = segment_transformer()
    rotary = model._rotary_embedding([0, 3], range(2), 3)
    tokens = torch.randn(2, 12, 2, 24)
    pairs = torch.view_as_complex(torch.unflatten(tokens, -1, (-1, 2)).contiguous())
    turn = torch.complex(rotary[0][..., 0::2], rotary[1][..., 0::2])
    expected = torch.view_as_real(pairs * turn.to(pairs.dtype)).flatten(-2)
    torch.testing.assert_close(rotate(tokens, rotary), expected, atol=1e-5, rtol=1e-5)
    low = rotate(tokens.bfloat16(), rotary)
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize(("rows", "columns"), [(5, 6), (4, 7)])
def test_sizes_that_do_not_divide_are_refused(rows, columns):
    with pytest.raises(ShapeError, match=rf"{rows}x{columns} tokens.*2x2.*attention.pool"):
        use_attention(segment_transformer(), GCLF, rows, columns)
    use_attention(segment_transformer(), replace(GCLF, pool=None), rows, columns)


@torch.no_grad()
def test_another_frame_size_than_announced_is_refused():
    model = segment_transformer()
    use_attention(model, GCLF, 4, 10)
    with pytest.raises(ShapeError, match="96 tokens do not fill frames of 4x10"):
        run(model)


@pytest.mark.parametrize("values", [{"window": (0, 4)}, {"window": (4, 0)}, {"pool": 1}])
def test_impossible_settings_name_the_field(values):
    with pytest.raises(ConfigError, match=r"stage2.attention.(window|pool)"):
        AttentionConfig(**values)


# A read-only context


def read_only(model: Any, num_given: int) -> Any:
    use_attention(model, AttentionConfig(context="read_only"), 4, 6, num_given)
    return model


def hidden_states(model: Any, change: Any) -> list[Tensor]:
    """Tokens ``[2, 4, 24, 48]`` after each block, with the last two frames changed."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 8, 4, 8, 12, generator=generator)
    hidden[:, :, 2:] = change(hidden[:, :, 2:])
    text = torch.randn(2, 5, 16, generator=generator)
    after: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda *arguments: after.append(arguments[2]))
        for block in model.blocks
    ]
    model(hidden, torch.tensor([[0.0, 0.0, 0.7, 0.7]] * 2), text)
    for hook in hooks:
        hook.remove()
    return [torch.unflatten(tokens, 1, (4, 24)) for tokens in after]


@torch.no_grad()
def test_a_read_only_context_does_not_know_the_target_and_the_target_knows_it() -> None:
    model = segment_transformer()
    for is_read_only in (False, True):
        if is_read_only:
            read_only(model, 2)
        plain, other = (hidden_states(model, change) for change in (torch.clone, torch.neg))
        for before, after in zip(plain, other, strict=True):
            assert torch.equal(before[:, :2], after[:, :2]) is is_read_only
            assert not torch.equal(before[:, 2:], after[:, 2:])
    swapped = segment_transformer()
    read_only(swapped, 2)
    hidden = torch.randn(2, 8, 4, 8, 12)
    sigma, text = torch.tensor([[0.0, 0.0, 0.7, 0.7]] * 2), torch.randn(2, 5, 16)
    first = swapped(hidden, sigma, text)
    hidden[:, :, :2] += 1
    assert not torch.allclose(first[:, :, 2:], swapped(hidden, sigma, text)[:, :, 2:])


@torch.no_grad()
def test_with_nothing_given_or_all_a_read_only_context_is_full_attention() -> None:
    model = segment_transformer()
    full = run(model)
    for num_given in (0, 4):
        torch.testing.assert_close(run(read_only(model, num_given)), full)
    assert not torch.allclose(run(read_only(model, 2)), full)
    use_attention(model, FULL, 4, 6)
    assert torch.equal(run(model), full)


def test_a_read_only_context_has_a_gradient_and_goes_with_full_attention_alone() -> None:
    model = read_only(segment_transformer(), 2)
    assert isinstance(model.blocks[0].attn1.processor, ReadOnlyAttention)
    torch.autograd.backward(run(model).square().sum())
    assert all(weight.grad is not None for weight in model.blocks[0].attn1.parameters())
    with pytest.raises(ConfigError, match="read_only with kind gclf"):
        AttentionConfig(kind="gclf", context="read_only")
