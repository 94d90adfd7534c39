"""Whether a model stays in memory between clips, or is loaded part after part for each of them."""

from math import isinf
from typing import Literal, NamedTuple

from swifti2v.units import format_bytes

SHARES = {"host": 0.85, "device": 0.6}
"""Share of a memory that weights may take for good: the rest is for what they compute, which on the
device is more. Assumptions, not measured."""


class Room(NamedTuple):
    """Memory in which weights lie."""

    kind: Literal["host", "device"]
    num_bytes: float
    """All of it."""


class Keeping(NamedTuple):
    """The decision."""

    keeps: bool
    why: str
    """Reason in one sentence."""


def decide_keeping(weight_bytes: float, room: Room) -> Keeping:
    """Keep the weights of a model between clips where they leave enough room.

    Args:
        weight_bytes: Memory of all weights.
        room: Where they would lie.
    """
    share = SHARES[room.kind]
    keeps = weight_bytes <= share * room.num_bytes
    whole = "any size" if isinf(room.num_bytes) else format_bytes(room.num_bytes)
    sizes = f"{format_bytes(weight_bytes)} of weights, and {room.kind} memory of {whole}"
    if keeps:
        return Keeping(True, f"kept loaded between clips ({sizes})")
    return Keeping(
        False,
        f"loaded part after part for each clip ({sizes}, of which {share:.0%} may be kept)",
    )
