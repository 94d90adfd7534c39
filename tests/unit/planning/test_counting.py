from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from swifti2v.models.vae.frame_codec import fetch_history, store_history
from swifti2v.planning.costs import Count, extrapolate
from swifti2v.planning.counting import META, count

few = settings(max_examples=20, deadline=None)
sizes = st.integers(1, 9)


def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device=META)


def traffic(cost: Count) -> float:
    return cost.kernel_bytes + cost.other_bytes


def flops_of_torch(run: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@given(batch=sizes, rows=sizes, inner=sizes, columns=sizes)
@few
def test_products_count_as_torch_counts_them(batch, rows, inner, columns):
    left, right = empty(batch, rows, inner), empty(batch, inner, columns)
    weight, bias = empty(columns, inner), empty(columns)
    for run in (
        lambda: F.linear(left, weight, bias),
        lambda: left @ right,
        lambda: torch.einsum("bri,bic->brc", left, right),
        lambda: torch.addmm(bias, left[0], weight.T),
        lambda: torch.baddbmm(left @ right, left, right),
    ):
        cost = count(run)
        assert cost.flops == cost.linear == flops_of_torch(run)


@given(channels=sizes, out=sizes, frames=st.integers(3, 6), side=st.integers(3, 8))
@few
def test_convolutions_count_as_torch_counts_them(channels, out, frames, side):
    video, weight = empty(1, channels, frames, side, side), empty(out, channels, 3, 3, 3)
    transposed = empty(channels, out, 2, 2)
    for run in (
        lambda: F.conv3d(video, weight, padding=(0, 1, 1)),
        lambda: F.conv_transpose2d(video[:, :, 0], transposed, stride=2),
    ):
        cost = count(run)
        assert cost.flops == cost.convolution == flops_of_torch(run)


@given(queries=sizes, keys=sizes, heads=sizes)
@few
def test_attention_is_one_kernel(queries, keys, heads):
    query, key, value = (
        empty(1, heads, queries, 8),
        empty(1, heads, keys, 8),
        empty(1, heads, keys, 4),
    )

    cost = count(lambda: F.scaled_dot_product_attention(query, key, value))

    assert cost.flops == cost.attention == 2 * heads * queries * keys * (8 + 4)
    assert cost.kernel_bytes == 4 * heads * (queries * 8 + keys * 12 + queries * 4)
    assert cost.peak_bytes == 4 * heads * queries * 4  # the scores are never in memory


@given(channels=sizes, height=sizes, width=sizes)
@few
def test_sampling_a_grid_is_one_kernel_of_the_true_shape(channels, height, width):
    image, grid = torch.rand(2, channels, 3, 5), torch.rand(2, height, width, 2) * 2 - 1
    for mode in ("bilinear", "bicubic"):
        true = F.grid_sample(image, grid, mode=mode, align_corners=False)
        seen: list[torch.Tensor] = []

        def run(mode: str = mode, seen: list[torch.Tensor] = seen) -> None:
            inputs = image.to(META), grid.to(META)
            seen.append(F.grid_sample(*inputs, mode=mode, align_corners=False))

        with torch.inference_mode():
            cost = count(run)
        assert seen[0].shape == true.shape
        assert cost.other_bytes == image.nbytes + grid.nbytes + true.nbytes
        assert cost.transfer_bytes == image.nbytes + grid.nbytes


def test_traffic_is_what_eager_execution_reads_and_writes():
    values, row = empty(64, 32), empty(32)
    num_bytes = values.nbytes

    assert count(lambda: values + row).other_bytes == 2 * num_bytes + row.nbytes
    assert count(lambda: values.T[:3].flatten(0)).other_bytes == 2 * 3 * 64 * 4
    assert traffic(count(lambda: values.view(32, 64)[1:])) == 0
    assert traffic(count(lambda: row.expand(64, 32))) == 0
    assert count(lambda: values.to(torch.bfloat16)).other_bytes == num_bytes * 3 // 2
    assert count(lambda: values.add_(1)).other_bytes == 2 * num_bytes
    assert traffic(count(lambda: empty(3, 3))) == 0
    linear = count(lambda: F.linear(values, empty(8, 32)))
    assert linear.kernel_bytes == 4 * (64 * 32 + 8 * 32 + 64 * 8)


def test_memory_is_what_is_alive_at_one_time():
    values = empty(1000)

    def run() -> torch.Tensor:
        first = values + 1
        second = first + 1
        del first
        return second[:10]  # a view keeps all of it

    cost = count(run)

    assert cost.peak_bytes == 2 * values.nbytes
    assert cost.kept_bytes == values.nbytes
    assert count(lambda: (run(), None)[1]).kept_bytes == 0


def test_what_waits_in_host_memory_is_not_on_the_device():
    values = empty(1000)

    def run() -> list[torch.Tensor | None]:
        cache: list[torch.Tensor | None] = [values + 1, None]
        store_history(cache)
        big = values.repeat(10)
        del big
        fetch_history(cache, META)
        return cache

    cost = count(run)

    assert cost.peak_bytes == 10 * values.nbytes
    assert cost.kept_bytes == values.nbytes
    assert cost.transfer_bytes == 2 * values.nbytes


def test_distinct_values_are_as_many_as_said():
    sigma = empty(1, 5)
    levels, index = torch.empty(0), torch.empty(0)

    def run() -> None:
        nonlocal levels, index
        levels, index = torch.unique(sigma, return_inverse=True)

    count(run, num_levels=3)

    assert levels.shape == (3,)
    assert index.shape == sigma.shape


@given(times=st.integers(0, 50))
@few
def test_equal_layers_are_extrapolated_exactly(times):
    tokens, weight = empty(6, 8), empty(8, 8)

    def run(num_layers: int) -> list[torch.Tensor]:
        kept = [tokens]
        for _ in range(num_layers):
            kept.append(F.silu(F.linear(kept[-1], weight)))
        return kept

    first, second = count(lambda: run(1)), count(lambda: run(2))

    assert extrapolate(first, second, times) == count(lambda: run(1 + times))


def test_sums_add_work_and_take_the_larger_memory():
    small = Count(linear=1, other_bytes=3, peak_bytes=5, kept_bytes=2)
    large = Count(linear=10, convolution=4, peak_bytes=7, kept_bytes=1)

    assert small + large == Count(
        linear=11, convolution=4, other_bytes=3, peak_bytes=7, kept_bytes=2
    )
    assert small * 3 == Count(linear=3, other_bytes=9, peak_bytes=5, kept_bytes=2)
    assert (small + large).flops == pytest.approx(15)
