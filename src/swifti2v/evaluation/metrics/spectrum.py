"""Spread of a picture's energy over frequencies, for plots."""

import numpy as np
import torch
from torch import Tensor

from swifti2v.evaluation.metrics.frames import Frames, luma, to_unit_range

NUM_BINS = 64
"""Rings between 0 and half a cycle per pixel."""


def radial_spectrum(frame: Frames, num_bins: int = NUM_BINS) -> Tensor:
    """Mean energy of luma on rings of equal frequency.

    Args:
        frame: ``[H, W, 3]`` uint8 or float in [0, 1].
        num_bins: Rings of equal width between 0 and 0.5 cycles per pixel.

    Returns:
        ``[num_bins]`` float64 energy per pixel and frequency, Hann window, mean removed; NaN
        for a ring without a frequency (in tiny frames).
    """
    image = luma(to_unit_range(frame))
    height, width = image.shape
    window = torch.outer(torch.hann_window(height), torch.hann_window(width)).to(image.device)
    spectrum = torch.fft.fft2((image - image.mean()) * window, norm="ortho")
    energy = torch.view_as_real(spectrum).square().sum(-1) / window.square().mean()
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])
    ring = (radius * 2 * num_bins).long().flatten().numpy()
    inside = ring < num_bins
    sums = np.bincount(ring[inside], energy.cpu().flatten().numpy()[inside], num_bins)
    counts = np.bincount(ring[inside], minlength=num_bins)
    means = np.divide(sums, counts, out=np.full(num_bins, np.nan), where=counts > 0)
    return torch.from_numpy(means)
