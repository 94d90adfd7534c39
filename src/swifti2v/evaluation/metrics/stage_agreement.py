"""Does the high-resolution clip keep the motion and structure of Stage I?"""

import cv2
import numpy as np
import torch
from torch import Tensor

from swifti2v.errors import ShapeError
from swifti2v.evaluation.metrics.fidelity import psnr
from swifti2v.evaluation.metrics.frames import FramePieces, iterate_frames, to_unit_range


def stage_agreement(frames: FramePieces, motion_reference: FramePieces) -> Tensor:
    """PSNR of a clip, brought down to Stage I's size by area means, against Stage I's clip.

    Returns:
        ``[T]`` float32 dB; infinity where they are equal.

    Raises:
        ShapeError: The clips differ in length, or the motion reference is larger.
    """
    low = iterate_frames(motion_reference)
    scores = []
    index = 0
    for index, frame in enumerate(iterate_frames(frames), start=1):
        small = next(low, None)
        if small is None:
            raise ShapeError(
                f"the motion reference ends after {index - 1} frames, the clip goes on"
            )
        height, width = small.shape[:2]
        if height > frame.shape[0] or width > frame.shape[1]:
            raise ShapeError(
                f"the motion reference is {width}x{height}, the clip only "
                f"{frame.shape[1]}x{frame.shape[0]}; give Stage I's clip"
            )
        pixels = to_unit_range(frame).cpu().numpy()
        down = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
        scores.append(psnr(torch.from_numpy(down)[None], small[None])[0])
    if next(low, None) is not None:
        raise ShapeError(f"the clip ends after {index} frames, the motion reference goes on")
    if not scores:
        raise ShapeError("the clips hold no frame: give at least one")
    return torch.stack(scores)
