"""Share of the photo that a clip still shows as time goes on."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from swifti2v.errors import ShapeError
from swifti2v.evaluation.metrics.flow import shrink
from swifti2v.evaluation.metrics.frames import FramePieces, Frames, iterate_frames
from swifti2v.media.flow import chain, optical_flow, visible, warp

MIN_VISIBLE = 0.01
"""Below this part of the frame there is too little of the photo left to judge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FidelityCurve:
    """The photo, moved along the clip's motion, against every frame."""

    psnr_db: Tensor
    """``[T]`` float64, over the pixels that still show the photo; infinity where they are equal,
    NaN where less than 1 % of the frame is left of it."""
    visible: Tensor
    """``[T]`` float64, part of the frame that shows the photo."""


def fidelity_over_time(frames: FramePieces, photo: Frames) -> FidelityCurve:
    """Follow the photo ``[H, W, 3]`` of the clip's size through a clip and compare.

    Flow is chained from frame to frame and refined against the photo itself, so that errors do not
    add up; both directions have to agree where the photo counts as visible. All happens on frames
    of at most 640 pixels, two in memory at a time: at full size, flow's own error of a fraction of
    a pixel would decide. Fine detail is left to ``hf_energy_ratio``.

    Raises:
        ShapeError: No frames, sides below 16 pixels, or the photo has another size.
    """
    target = previous = shrink(photo)
    to_photo = np.zeros((*target.shape[:2], 2), np.float32)
    from_photo = to_photo
    scores, shares = [], []
    for frame in iterate_frames(frames):
        if frame.shape != photo.shape:
            raise ShapeError(
                f"a frame is {tuple(frame.shape)}, the photo {tuple(photo.shape)}; "
                "resize the photo first"
            )
        small = shrink(frame)
        to_photo = chain(optical_flow(small, previous), to_photo)
        from_photo = chain(from_photo, optical_flow(previous, small))
        to_photo = optical_flow(small, target, start=to_photo)
        from_photo = optical_flow(target, small, start=from_photo)
        seen = visible(to_photo, from_photo)
        difference = warp(target.astype(np.float32), to_photo)[seen] - small[seen]
        shares.append(float(seen.mean()))
        scores.append(_psnr(difference / 255) if shares[-1] >= MIN_VISIBLE else math.nan)
        previous = small
    if not scores:
        raise ShapeError("the clip holds no frame: give at least one")
    return FidelityCurve(
        psnr_db=torch.tensor(scores, dtype=torch.float64),
        visible=torch.tensor(shares, dtype=torch.float64),
    )


def _psnr(difference: np.ndarray) -> float:
    error = float(np.square(difference).mean(dtype=np.float64))
    return -10 * math.log10(error) if error > 0 else math.inf
