"""Is the fine detail of a clip the true one? Correlation with the truth at high frequencies."""

from functools import lru_cache

import torch
from torch import Tensor

from swifti2v.errors import ConfigError, ShapeError
from swifti2v.evaluation.metrics.frames import (
    FramePieces,
    Frames,
    iterate_frames,
    iterate_pairs,
    luma,
    to_unit_range,
)

FLAT_AMPLITUDE = 1e-6
"""Detail below this root mean square (range 1) is rounding: 1/4000 of an 8-bit step."""


@lru_cache(maxsize=4)
def _window_and_weights(height: int, width: int, cutoff: float) -> tuple[Tensor, Tensor]:
    """Hann window ``[H, W]`` and weights ``[H, W // 2 + 1]`` of the rfft2 bins above cutoff.

    A bin counts twice where rfft2 leaves out its mirror image (all columns but 0 and, for an
    even width, the last), so that weighted sums equal sums over the full spectrum.
    """
    window = torch.outer(torch.hann_window(height), torch.hann_window(width))
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    weights = (radius > cutoff).float() * 2
    weights[:, 0] /= 2
    if width % 2 == 0:
        weights[:, -1] /= 2
    return window, weights


def _high_frequencies(frame: Tensor, cutoff: float) -> Tensor:
    """Spectrum of a frame's luma, ``[H, W // 2 + 1]`` complex64, scaled by square-root weights.

    Plain sums of products of two such spectra are then the sums above ``cutoff``.
    """
    image = luma(frame)
    window, weights = _window_and_weights(*image.shape, cutoff)
    spectrum: Tensor = torch.fft.rfft2(
        (image - image.mean()) * window.to(image.device), norm="ortho"
    )
    return spectrum * weights.to(image.device).sqrt()


def _require_cutoff(cutoff: float) -> None:
    if not 0 <= cutoff < 0.5:
        raise ConfigError(f"cutoff is {cutoff} cycles per pixel; it must lie in [0, 0.5)")


def _energy(spectrum: Tensor) -> Tensor:
    return torch.view_as_real(spectrum).double().square().sum()


def _is_flat(energy: Tensor, frame: Tensor) -> bool:
    return float(energy) <= frame.shape[0] * frame.shape[1] * FLAT_AMPLITUDE**2


def detail_coherence_per_frame(
    output: FramePieces, truth: FramePieces, cutoff: float = 0.15
) -> Tensor:
    """Normalised correlation of output and truth in luma above ``cutoff``, frame by frame.

    Args:
        output: ``[T, H, W, 3]`` uint8 or float in [0, 1], or its pieces in temporal order.
        truth: The same for the true clip.
        cutoff: Lowest frequency left out of consideration, cycles per pixel, radial. With a
            low-resolution clip ``n`` times smaller take a little more than ``0.5 / n``: what
            is above it cannot come from that clip.

    Returns:
        ``[T]`` float64 in [-1, 1]: 1 for the true detail up to contrast, 0 for unrelated or
        missing detail, NaN where the truth has no detail.

    Raises:
        ShapeError: The clips differ in shape or length.
        ConfigError: ``cutoff`` is outside [0, 0.5).
    """
    _require_cutoff(cutoff)
    scores = []
    for a, b in iterate_pairs(output, truth):
        spectrum_a, spectrum_b = _high_frequencies(a, cutoff), _high_frequencies(b, cutoff)
        energy_a, energy_b = _energy(spectrum_a), _energy(spectrum_b)
        if _is_flat(energy_b, b):
            scores.append(float("nan"))
        elif _is_flat(energy_a, a):
            scores.append(0.0)
        else:
            product = torch.view_as_real(spectrum_a) * torch.view_as_real(spectrum_b)
            scores.append(float(product.double().sum() / (energy_a * energy_b).sqrt()))
    return torch.tensor(scores, dtype=torch.float64)


def detail_coherence(output: FramePieces, truth: FramePieces, cutoff: float = 0.15) -> float:
    """Mean of ``detail_coherence_per_frame`` over frames 1 to T-1.

    Frame 0 is the photo and does not count, nor do frames whose truth has no detail; NaN if
    nothing is left of the truth. Arguments and errors as there.

    Raises:
        ShapeError: Fewer than two frames.
    """
    scores = detail_coherence_per_frame(output, truth, cutoff)
    if len(scores) < 2:
        raise ShapeError(f"detail coherence leaves out frame 0: {len(scores)} frames are too few")
    return float(scores[1:].nanmean())


def hf_energy_ratio(frames: FramePieces, reference: Frames, cutoff: float = 0.25) -> Tensor:
    """Energy of luma above ``cutoff`` in each frame, relative to a reference.

    It measures how much detail there is, not whether it is right: noise raises it.

    Args:
        frames: ``[T, H, W, 3]`` uint8 or float in [0, 1], or its pieces in temporal order.
        reference: A photo ``[H, W, 3]`` that every frame is compared with, or a clip
            ``[T, H, W, 3]`` compared frame by frame.
        cutoff: Radial frequency in cycles per pixel.

    Returns:
        ``[T]`` float64: 1 as much detail, below 1 softer, NaN where the reference has none.

    Raises:
        ShapeError: Sizes differ, or a reference clip differs in length.
        ConfigError: ``cutoff`` is outside [0, 0.5).
    """
    _require_cutoff(cutoff)
    if reference.ndim == 4:
        pairs = iterate_pairs(frames, reference)
        return _stack_ratios([_ratio(a, _detail_energy(b, cutoff), cutoff) for a, b in pairs])
    photo = to_unit_range(reference)
    energy = _detail_energy(photo, cutoff)
    ratios = []
    for frame in iterate_frames(frames):
        if frame.shape != photo.shape:
            raise ShapeError(
                f"a frame is {tuple(frame.shape)}, the photo {tuple(photo.shape)}; "
                "resize the photo first"
            )
        ratios.append(_ratio(to_unit_range(frame), energy, cutoff))
    return _stack_ratios(ratios)


def _detail_energy(reference: Tensor, cutoff: float) -> float:
    """Energy above the cutoff; NaN if the reference has no energy there."""
    energy = _energy(_high_frequencies(reference, cutoff))
    return float("nan") if _is_flat(energy, reference) else float(energy)


def _ratio(frame: Tensor, reference_energy: float, cutoff: float) -> float:
    return float(_energy(_high_frequencies(frame, cutoff))) / reference_energy


def _stack_ratios(ratios: list[float]) -> Tensor:
    return torch.tensor(ratios, dtype=torch.float64)
