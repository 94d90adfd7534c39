"""Procedural clips for the tests of metrics: known motion, known defects."""

from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

Frames: TypeAlias = npt.NDArray[Any]


def texture(height: int, width: int, seed: int = 0) -> Frames:
    """A colour picture with structure at many scales, uint8 [H, W, 3]."""
    random = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for blur, weight in ((1.0, 0.4), (3.0, 1.0), (9.0, 1.0)):
        noise = cv2.GaussianBlur(random.standard_normal((height, width, 3)), (0, 0), blur)
        picture += weight * noise / noise.std()
    return (127 + 35 * picture).clip(0, 255).astype(np.uint8)


def panning_clip(num_frames: int = 25, step: int = 1, height: int = 96, width: int = 160) -> Frames:
    """A texture that moves left by whole pixels a frame."""
    picture = texture(height, width + num_frames * step)
    return np.stack([picture[:, t * step : t * step + width] for t in range(num_frames)])


def to_frames(values: Frames) -> Frames:
    """Round to uint8."""
    return np.rint(values).clip(0, 255).astype(np.uint8)


def blurred(clip: Frames, sigma: float) -> Frames:
    """All frames but the first, blurred."""
    rest = [cv2.GaussianBlur(frame, (0, 0), sigma) for frame in clip[1:]]
    return np.stack([clip[0], *rest])


def flickering(clip: Frames, amplitude: float) -> Frames:
    """Every second frame brighter."""
    values = clip.astype(float)
    values[1::2] += amplitude
    return to_frames(values)


def colour_shifted(clip: Frames, red: float) -> Frames:
    """All frames but the first with more red."""
    values = clip.astype(float)
    values[1:, ..., 0] += red
    return to_frames(values)


def with_seam(clip: Frames, frame: int, amplitude: float) -> Frames:
    """Brighter from a frame on."""
    values = clip.astype(float)
    values[frame:] += amplitude
    return to_frames(values)


def noisy(clip: Frames, sigma: float, seed: int = 0) -> Frames:
    """All frames but the first with noise of their own, the same in all colours."""
    noise = np.random.default_rng(seed).normal(0, sigma, (*clip.shape[:3], 1))
    noise[0] = 0
    return to_frames(clip + noise)
