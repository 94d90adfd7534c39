"""Distance of a clip from a known truth, and of its first frame from the photo."""

import math

import torch
from torch import Tensor

from swifti2v.errors import ShapeError
from swifti2v.evaluation.metrics.frames import (
    FramePieces,
    Frames,
    iterate_frames,
    iterate_pairs,
    to_unit_range,
)
from swifti2v.evaluation.metrics.similarity import frame_ms_ssim, frame_ssim

MS_SSIM_MIN_SIDE = 161
"""Four halvings have to leave more than the 10 pixels that the window needs: 10 * 2**4 + 1."""
SSIM_MIN_SIDE = 6
"""The 11-pixel window is mirrored by 5 pixels at each edge."""


def _frame_psnr(output: Tensor, truth: Tensor) -> Tensor:
    error = (output - truth).square().mean(dtype=torch.float64)
    return (-10 * error.log10()).float()


def _stack(scores: list[Tensor]) -> Tensor:
    if not scores:
        raise ShapeError("the clips hold no frame: give at least one")
    return torch.stack(scores)


def psnr(output: FramePieces, truth: FramePieces) -> Tensor:
    """Peak signal-to-noise ratio of every frame, in dB.

    Returns:
        ``[T]`` float32, data range 1; infinity where the frames are equal.

    Raises:
        ShapeError: No frames, or the clips differ in shape or length.
    """
    return _stack([_frame_psnr(a, b) for a, b in iterate_pairs(output, truth)])


def clip_psnr(output: FramePieces, truth: FramePieces) -> float:
    """PSNR in dB of all frames together (from their mean squared error).

    One frame that is equal to the truth does not make the mean infinite. Arguments and errors
    as in ``psnr``.
    """
    errors = torch.pow(10.0, -psnr(output, truth).double() / 10)
    mean = float(errors.mean())
    return -10 * math.log10(mean) if mean > 0 else math.inf


def _require_side(frame: Tensor, smallest: int, name: str) -> None:
    if min(frame.shape[:2]) < smallest:
        raise ShapeError(
            f"{name} needs frames of at least {smallest} x {smallest} pixels, "
            f"these are {frame.shape[0]} x {frame.shape[1]}"
        )


def ssim(output: FramePieces, truth: FramePieces) -> Tensor:
    """Structural similarity of every frame (arguments and errors as in ``psnr``).

    Returns:
        ``[T]`` float32; 1 where the frames are equal. Sides of at least 6 pixels are needed.

    Source:
        Wang et al., "Image quality assessment", IEEE TIP 13(4), 2004; Gaussian window of 1.5.
    """
    scores = []
    for a, b in iterate_pairs(output, truth):
        _require_side(a, SSIM_MIN_SIDE, "SSIM")
        scores.append(torch.tensor(frame_ssim(a.cpu().numpy(), b.cpu().numpy())))
    return _stack(scores)


def ms_ssim(output: FramePieces, truth: FramePieces) -> Tensor:
    """Multi-scale structural similarity of every frame (arguments and errors as in ``psnr``).

    Returns:
        ``[T]`` float32; 1 where the frames are equal. Sides of at least 161 pixels are needed.

    Source:
        Wang et al., "Multi-scale structural similarity", Asilomar 2003; five scales.
    """
    scores = []
    for a, b in iterate_pairs(output, truth):
        _require_side(a, MS_SSIM_MIN_SIDE, "MS-SSIM")
        scores.append(torch.tensor(frame_ms_ssim(a.cpu().numpy(), b.cpu().numpy())))
    return _stack(scores)


def first_frame_psnr(frames: FramePieces, photo: Frames) -> float:
    """PSNR in dB between frame 0 and the photo ``[H, W, 3]`` it has to keep.

    Only the first frame is read.

    Raises:
        ShapeError: No frames, or the photo has another size.
    """
    first = next(iterate_frames(frames), None)
    if first is None:
        raise ShapeError("the clip holds no frame: give at least one")
    return float(psnr(first[None], photo[None])[0])


def first_frame_ssim(frames: FramePieces, photo: Frames) -> float:
    """Structural similarity of frame 0 and the photo; arguments and errors as in the PSNR."""
    first = next(iterate_frames(frames), None)
    if first is None:
        raise ShapeError("the clip holds no frame: give at least one")
    return float(ssim(first[None], photo[None])[0])


def colour_jump(frames: FramePieces) -> float:
    """Measure the jump of the colours right after the photo; the first two frames are read.

    Returns:
        Mean over red, green and blue of the absolute difference between the channel means of
        frames 0 and 1; 0 is no jump, 1 is black to white. Subtract the same number of the
        VAE's round trip of the photo's still clip to isolate the model's part.

    Raises:
        ShapeError: Fewer than two frames.
    """
    iterator = iterate_frames(frames)
    first, second = next(iterator, None), next(iterator, None)
    if first is None or second is None:
        raise ShapeError("the colour jump compares frames 0 and 1: give at least two frames")
    means = [to_unit_range(frame).mean(dim=(0, 1)) for frame in (first, second)]
    return float((means[0] - means[1]).abs().mean())
