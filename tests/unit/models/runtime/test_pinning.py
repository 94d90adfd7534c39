"""Weights in shared pieces of pinned memory: nothing overlaps, changes or is wasted."""

from typing import Any

import torch
from diffusers.hooks.group_offloading import apply_group_offloading
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from swifti2v.models.runtime.pinning import (
    ALIGNMENT,
    pin_weights,
    pinned_bytes,
    plan_pieces,
    power_of_two,
)
from swifti2v.models.weights.quantization import quantize
from tests.helpers.tiny import tiny_components

CPU = torch.device("cpu")


class Recorder:
    """Plain memory in place of pinned memory, which needs a GPU."""

    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []

    def __call__(self, size: int) -> torch.Tensor:
        self.pieces.append(torch.full((size,), 255, dtype=torch.uint8))
        return self.pieces[-1]


@given(st.lists(st.integers(1, 5000), max_size=60), st.sampled_from([1024, 4096]))
def test_slots_lie_in_their_pieces_and_apart(sizes, piece_bytes):
    slots, pieces = plan_pieces(sizes, piece_bytes)

    assert len(slots) == len(sizes)
    assert all(power_of_two(piece) == piece for piece in pieces)
    assert all(piece <= max(piece_bytes, power_of_two(max(sizes) + ALIGNMENT)) for piece in pieces)
    ends = [0] * len(pieces)
    for slot, size in sorted(zip(slots, sizes, strict=True)):
        assert slot.offset % ALIGNMENT == 0
        assert slot.offset >= ends[slot.piece]
        ends[slot.piece] = slot.offset + size
    assert all(end <= piece for end, piece in zip(ends, pieces, strict=True))
    assert 0 not in ends  # no piece is empty


@given(st.lists(st.integers(1, 2**12), min_size=1, max_size=200))
def test_no_more_than_one_piece_is_less_than_half_full(sizes):
    _, pieces = plan_pieces(sizes, 2**12)
    used = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    assert sum(pieces) <= 2 * used


def model() -> Any:
    return tiny_components().stage1_transformer


@torch.no_grad()
def run(transformer: Any) -> torch.Tensor:
    torch.manual_seed(1)
    output: torch.Tensor = transformer(
        torch.randn(1, 1540, 2, 4, 4),
        torch.tensor([500.0]),
        torch.randn(1, 5, 16),
        return_dict=False,
    )[0]
    return output


def test_weights_move_and_the_model_computes_the_same():
    plain, moved, memory = model(), model(), Recorder()
    pin_weights(moved, memory)

    assert pinned_bytes(plain) == sum(piece.nbytes for piece in memory.pieces)
    ranges = [(piece.data_ptr(), piece.data_ptr() + piece.nbytes) for piece in memory.pieces]
    for name, parameter in moved.named_parameters():
        assert any(a <= parameter.data_ptr() < b for a, b in ranges), name
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in moved.state_dict().items())
    assert torch.equal(run(moved), run(plain))


def test_streaming_goes_on_from_there():
    plain, moved = model(), model()
    pin_weights(moved, Recorder())
    apply_group_offloading(
        moved, onload_device=CPU, offload_device=CPU, offload_type="block_level",
        num_blocks_per_group=1,
    )  # fmt: skip
    assert torch.equal(run(moved), run(plain))


def test_shared_weights_stay_shared_and_8_bit_layers_whole():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    pin_weights(tied, Recorder())
    assert tied[0].weight is tied[1].weight

    plain, moved = model(), model()
    for one in (plain, moved):
        quantize(one, "int8", CPU)
    pin_weights(moved, Recorder())
    assert torch.equal(run(moved), run(plain))


def test_a_model_without_memory_is_counted():
    with torch.device("meta"):
        linear = nn.Linear(1000, 1000, bias=False)
    assert pinned_bytes(linear) == 2**22
