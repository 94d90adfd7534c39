"""FlexAttention's block mask against the dense computation, at sizes where most of it is skipped."""

import pytest
import torch

from swifti2v.config import AttentionConfig
from swifti2v.models.attention import GclfAttention, TokenGrid, pool_tokens

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "grid", [TokenGrid(1, 44, 80), TokenGrid(5, 44, 80), TokenGrid(2, 68, 120)]
)
@pytest.mark.parametrize("pool", [None, 2, 4])
def test_flex_attention_is_the_dense_one(grid, pool):
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (2, grid.num_tokens, 3, 128)
    query, key, value = (
        torch.randn(shape, generator=generator, device="cuda", requires_grad=True) for _ in range(3)
    )
    coarse = (key[:, :0], value[:, :0])
    if pool is not None:
        coarse = pool_tokens(key, grid, pool), pool_tokens(value, grid, pool)
    results = []
    for backend in ("flex", "dense"):
        attention = GclfAttention(
            AttentionConfig(kind="gclf", pool=pool), grid.rows, grid.columns, backend
        )
        output = attention.attend(query, key, value, coarse, grid)
        gradients = torch.autograd.grad(
            output.square().sum(), (query, key, value), retain_graph=True
        )
        results.append((output, *gradients))
    for flex, dense in zip(*results, strict=True):
        # Kernels use TF32 for float32: three decimals, relative to values of about 1.
        torch.testing.assert_close(flex, dense, atol=1e-2, rtol=1e-2)


def test_a_mask_of_a_whole_4k_clip_is_made_without_holding_it():
    grid = TokenGrid(21, 68, 120)
    query = torch.randn(1, grid.num_tokens, 1, 128, device="cuda", dtype=torch.bfloat16)
    coarse = (pool_tokens(query, grid, 4),) * 2
    torch.cuda.reset_peak_memory_stats()
    attention = GclfAttention(AttentionConfig(kind="gclf", pool=4), grid.rows, grid.columns, "flex")
    attention.attend(query, query, query, coarse, grid)
    num_pairs = grid.num_tokens * (grid.num_tokens + coarse[0].shape[1])
    assert torch.cuda.max_memory_allocated() < num_pairs / 8  # not even a bit for each pair
