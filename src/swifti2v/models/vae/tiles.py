"""Exact spatial tiles: the samples that a part of a frame depends on, layer by layer.

A tile takes in a halo around itself and loses it on the way, so that it gives what the whole frame
would give there. Nothing is blended.
"""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING, NamedTuple, Protocol

from swifti2v.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class Layer(Protocol):
    """A step of a network over frames whose outputs depend on a bounded neighbourhood."""

    grows: int
    """Samples along a side after the layer for each one before, or 1."""
    shrinks: int
    """Samples along a side before the layer for each one after, or 1."""

    def reach(self, start: int, stop: int) -> tuple[int, int] | None:
        """Samples along a side that the outputs ``start`` to ``stop`` depend on, past the frame too.

        The first one is a multiple of ``shrinks``. None: they depend on the whole frame.
        """


class Tile(NamedTuple):
    """A part of the frame on its way through some layers."""

    rows: tuple[slice, ...]
    """Rows needed before each layer, then the rows that the tile gives."""
    columns: tuple[slice, ...]


def count_tiles(length: int, tile: int | None) -> int:
    """Tiles along a side of ``length`` cells that are at most ``tile`` long; None for one."""
    return 1 if tile is None else -(-length // tile)


def plan_tiles(
    size: tuple[int, int], tile: int | None, layers: Sequence[Layer], samples: int
) -> list[Tile]:
    """Divide a frame into tiles as equal as can be, row by row.

    Args:
        size: Height and width of the frame in latent cells.
        tile: Longest side of a tile in latent cells, without the halo; None gives one tile.
        layers: Layers that the tiles go through.
        samples: Outputs of the last layer along a cell.

    Returns:
        Tiles whose outputs cover the frame once.

    Raises:
        ConfigError: There is more than one tile, and a layer depends on the whole frame.
    """
    rows, columns = (_plan_side(length, tile, layers, samples) for length in size)
    return [Tile(*windows) for windows in product(rows, columns)]


def _plan_side(
    cells: int, tile: int | None, layers: Sequence[Layer], samples: int
) -> list[tuple[slice, ...]]:
    count = count_tiles(cells, tile)
    edges = [index * cells // count * samples for index in range(count + 1)]
    sides = []
    for start, stop in pairwise(edges):
        length, windows = cells * samples, [slice(start, stop)]
        for layer in reversed(layers):
            length = length * layer.shrinks // layer.grows
            if count == 1:
                window = slice(0, length)
            else:
                needed = layer.reach(windows[-1].start, windows[-1].stop)
                if needed is None:
                    raise ConfigError(
                        f"tile is {tile}, but this VAE attends to whole frames in its large layers: "
                        "leave the tile out"
                    )
                window = slice(max(needed[0], 0), min(needed[1], length))
            windows.append(window)
        sides.append(tuple(reversed(windows)))
    return sides


def crop_output(output: "Tensor", layer: Layer, tile: Tile, index: int) -> "Tensor":
    """Cut a tile's output of layer ``index`` to the part that the next layers need; a view."""
    places = []
    for windows in (tile.rows, tile.columns):
        begin = windows[index].start * layer.grows // layer.shrinks
        after = windows[index + 1]
        places.append(slice(after.start - begin, after.stop - begin))
    return output[..., places[0], places[1]]
