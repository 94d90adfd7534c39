"""Structural similarity of two frames by separable filters: fast and small enough for 2K."""

import math
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

Plane: TypeAlias = npt.NDArray[Any]
"""``[H, W]`` float32, range 1."""

WINDOW, SIGMA = 11, 1.5
"""Gaussian window of both measures, pixels."""
STABILISERS = (0.01**2, 0.03**2)
"""C1 and C2 of the paper at a range of 1."""
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the scales, fine to coarse (Wang et al. 2003, section 3.2)."""


def frame_ssim(first: Plane, second: Plane) -> float:
    """Structural similarity of two frames ``[H, W, 3]``, sides at least 6 pixels.

    Mean over the colours and all pixels; frames are mirrored at their edges.

    Source:
        Wang et al., "Image quality assessment", IEEE TIP 13(4), 2004.
    """
    planes = zip(np.moveaxis(first, -1, 0), np.moveaxis(second, -1, 0), strict=True)
    means = [_similarity(a, b)[0].mean(dtype=np.float64) for a, b in planes]
    return float(np.mean(means))


def frame_ms_ssim(first: Plane, second: Plane) -> float:
    """Multi-scale structural similarity of two frames ``[H, W, 3]``, sides at least 161 pixels.

    Contrast counts where the window lies inside the frame. A negative factor, which has no
    power, counts as 0.

    Source:
        Wang et al., "Multi-scale structural similarity", Asilomar 2003.
    """
    factors = []
    for _ in range(len(SCALE_WEIGHTS) - 1):
        factors.append(_contrast(first, second))
        first, second = _halve(first), _halve(second)
    factors.append(frame_ssim(first, second))
    powers = zip(factors, SCALE_WEIGHTS, strict=True)
    return math.prod(float(max(factor, 0.0) ** weight) for factor, weight in powers)


def _contrast(first: Plane, second: Plane) -> float:
    edge = WINDOW // 2
    planes = zip(np.moveaxis(first, -1, 0), np.moveaxis(second, -1, 0), strict=True)
    maps = (_similarity(a, b)[1][edge:-edge, edge:-edge] for a, b in planes)
    return float(np.mean([inner.mean(dtype=np.float64) for inner in maps]))


def _similarity(first: Plane, second: Plane) -> tuple[Plane, Plane]:
    """The similarity of every pixel, and its contrast and structure part alone."""
    c1, c2 = STABILISERS
    mean_a, mean_b = _smooth(first), _smooth(second)
    variances = _variance(first, mean_a) + _variance(second, mean_b)
    covariance = _smooth(first * second) - mean_a * mean_b
    contrast = (2 * covariance + c2) / (variances + c2)
    return contrast * ((2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)), contrast


def _variance(plane: Plane, mean: Plane) -> Plane:
    variance: Plane = np.maximum(_smooth(plane * plane) - mean**2, 0)
    return variance


def _smooth(plane: Plane) -> Plane:
    smooth: Plane = cv2.GaussianBlur(plane, (WINDOW, WINDOW), SIGMA)
    return smooth


def _halve(frame: Plane) -> Plane:
    """Means over 2 x 2 pixels; an odd last row or column is left out."""
    height, width = frame.shape[0] // 2, frame.shape[1] // 2
    halved: Plane = cv2.resize(
        frame[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA
    )
    return halved
