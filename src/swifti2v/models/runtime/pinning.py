"""Weights in pinned host memory, without what PyTorch adds to every pinned tensor.

PyTorch rounds each piece of pinned memory up to a power of two: the 53 GB of the 2K system would take 80.
Here many weights share pieces that are powers of two already.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

PIECE_BYTES = 2**30
"""Largest piece, unless one weight is larger."""
ALIGNMENT = 512
"""Bytes; copies to the device start at such places."""


class Slot(NamedTuple):
    """Place of a weight."""

    piece: int
    offset: int
    """Bytes from the start of the piece."""


def plan_pieces(
    sizes: Sequence[int], piece_bytes: int = PIECE_BYTES
) -> tuple[list[Slot], list[int]]:
    """Share out pieces: the largest weights first, each into the first piece with room.

    Args:
        sizes: Bytes of each weight.
        piece_bytes: Most of a piece, a power of two.

    Returns:
        The slot of each weight, and the bytes of each piece, powers of two.
    """
    slots: dict[int, Slot] = {}
    used: list[int] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = -(-sizes[index] // ALIGNMENT) * ALIGNMENT
        piece = next((p for p, most in enumerate(room) if used[p] + size <= most), len(used))
        if piece == len(used):
            used.append(0)
            room.append(max(piece_bytes, power_of_two(size)))
        slots[index] = Slot(piece, used[piece])
        used[piece] += size
    return [slots[index] for index in range(len(sizes))], [power_of_two(size) for size in used]


def power_of_two(size: int) -> int:
    """The least one that is not below ``size``; 0 for 0."""
    return 1 << (size - 1).bit_length() if size else 0


def pinned_bytes(model: nn.Module) -> int:
    """Host memory that ``pin_weights`` would take; weights on the meta device count, too."""
    return sum(plan_pieces([tensor.nbytes for tensor in _weights(model)])[1])


def allocate_pinned(size: int) -> Tensor:
    """``[size]`` bytes that a GPU can fetch by itself."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def pin_weights(model: nn.Module, allocate: Callable[[int], Tensor] = allocate_pinned) -> None:
    """Move the weights of a model in host memory to pinned memory, one after the other.

    Tensors of subclasses, as of 8-bit layers, stay where they are.

    Args:
        model: Its parameters and buffers keep shapes and values.
        allocate: Gives so many bytes, ``uint8``; a CPU alone cannot pin.
    """
    tensors = [tensor for tensor in _weights(model) if tensor.is_contiguous()]
    slots, pieces = plan_pieces([tensor.nbytes for tensor in tensors])
    memory: dict[int, Tensor] = {}
    for tensor, slot in sorted(zip(tensors, slots, strict=True), key=lambda pair: pair[1]):
        if slot.piece not in memory:  # not before, so that what it replaces is freed meanwhile
            memory[slot.piece] = allocate(pieces[slot.piece])
        pinned = memory[slot.piece][slot.offset : slot.offset + tensor.nbytes]
        pinned = pinned.view(tensor.dtype).view(tensor.shape)
        tensor.data = pinned.copy_(tensor.data)


def _weights(model: nn.Module) -> Iterator[Tensor]:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return (t for t in tensors.values() if type(t.data) is Tensor and t.nbytes)
