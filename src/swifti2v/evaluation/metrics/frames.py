"""Frames as the metrics take them: whole clips or pieces of clips, one frame in memory at a time."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from swifti2v.errors import ShapeError

Frames: TypeAlias = npt.NDArray[Any] | Tensor
"""``[T, H, W, 3]``: uint8, or float in [0, 1]."""
FramePieces: TypeAlias = Frames | Iterable[Frames]
"""A whole clip, or its pieces ``[t, H, W, 3]`` in temporal order; an iterator is used up."""

LUMA_BT709 = (0.2126, 0.7152, 0.0722)
"""Weights of red, green and blue in luma (ITU-R BT.709-6, item 3.2)."""
FLOAT_TOLERANCE = 1e-3
"""Distance by which a float frame may leave [0, 1]: rounding, never a wrong range."""


def iterate_frames(frames: FramePieces) -> Iterator[Frames]:
    """Yield the frames ``[H, W, 3]`` of a clip one by one, in their own type.

    Raises:
        ShapeError: A piece is not ``[t, H, W, 3]``.
    """
    pieces = [frames] if isinstance(frames, np.ndarray | Tensor) else frames
    for piece in pieces:
        if piece.ndim != 4 or piece.shape[-1] != 3:
            raise ShapeError(
                f"frames of shape {tuple(piece.shape)} do not fit: give [T, H, W, 3], colour last"
            )
        yield from piece


def iterate_pairs(output: FramePieces, truth: FramePieces) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the frames of two clips side by side, as ``to_unit_range`` gives them.

    Raises:
        ShapeError: The clips differ in length or in frame size.
    """
    first, second = iterate_frames(output), iterate_frames(truth)
    index = 0
    while True:
        a, b = next(first, None), next(second, None)
        if a is None and b is None:
            return
        if a is None or b is None:
            shorter = "output" if a is None else "truth"
            raise ShapeError(f"{shorter} ends after {index} frames, the other clip goes on")
        if a.shape != b.shape:
            raise ShapeError(
                f"frame {index}: output is {tuple(a.shape)}, truth is {tuple(b.shape)}; "
                "resize one of them first"
            )
        yield to_unit_range(a), to_unit_range(b)
        index += 1


def to_unit_range(frame: Frames) -> Tensor:
    """Turn one frame ``[H, W, 3]``, uint8 or float, into a float32 tensor in [0, 1].

    Raises:
        ShapeError: A float frame leaves [0, 1], e.g. because it is still in [-1, 1].
    """
    tensor = frame if isinstance(frame, Tensor) else torch.from_numpy(np.array(frame))
    if tensor.dtype == torch.uint8:
        return tensor.to(torch.float32) / 255
    tensor = tensor.to(torch.float32)
    low, high = tensor.aminmax()
    if not (low >= -FLOAT_TOLERANCE and high <= 1 + FLOAT_TOLERANCE):
        raise ShapeError(
            f"float frames must lie in [0, 1], these lie in [{low:.3g}, {high:.3g}]; "
            "give uint8 frames, or (video + 1) / 2 for a video in [-1, 1]"
        )
    return tensor.clamp(0, 1)


def to_uint8(frame: Frames) -> npt.NDArray[np.uint8]:
    """Turn one frame ``[H, W, 3]``, uint8 or float in [0, 1], into a uint8 array."""
    if isinstance(frame, np.ndarray) and frame.dtype == np.uint8:
        return frame
    array: npt.NDArray[np.uint8] = (
        (to_unit_range(frame) * 255).round().to(torch.uint8).cpu().numpy()
    )
    return array


def luma(frame: Tensor) -> Tensor:
    """Luma ``[H, W]`` of a frame ``[H, W, 3]`` (BT.709)."""
    return frame @ frame.new_tensor(LUMA_BT709)
