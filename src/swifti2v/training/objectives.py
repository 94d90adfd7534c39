"""Training losses as pure functions: tensors in, one number for each sample out."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.nn import functional as F

from swifti2v.sampling import Parameterization, to_velocity
from swifti2v.schedules import plan_sigmas
from swifti2v.segments import Segment

Model = Callable[[Tensor, Tensor], Tensor]
"""``(hidden_states [B, ..., N, h, w], sigma [B, N]) -> output [B, C, N', h, w]`` of the last N' frames,
at least of those whose error counts."""


@dataclass(frozen=True, slots=True)
class ErrorMeasure:
    """Weighting that makes one number of the errors of a window's latents."""

    channel_weight: Tensor | None = None
    """``[C]`` weight of each channel; None weighs all alike."""
    kind: Literal["squared", "root"] = "squared"
    """Mean of the squares; or mean over the cells of the root of each one's mean square."""
    frames: Literal["target", "window"] = "target"
    """Frames that count. For comparison it may be all of a window: then the velocity of those that
    are given clean is wanted as if they were noise alone."""

    def __call__(self, squares: Tensor) -> Tensor:
        """``[B]`` of ``[B, C, N, h, w]`` squared errors."""
        if self.kind == "squared":
            return _weighted_mean(squares, self.channel_weight)
        if self.channel_weight is not None:
            squares = squares * self.channel_weight[:, None, None, None]
        return (squares.mean(dim=1) + _LEAST_SQUARE).sqrt().flatten(1).mean(dim=1)


_LEAST_SQUARE = 1e-5  # below it the root of a cell's error is as good as squared


def segment_flow_loss(
    model: Model,
    latents: Tensor,
    reference: Tensor,
    segment: Segment,
    sigma: Tensor,
    noise: Tensor,
    *,
    parameterization: Parameterization = "velocity",
    measure: ErrorMeasure | None = None,
) -> Tensor:
    """Flow-matching loss on the target frames of one segment, with teacher forcing.

    Anchor and context reach the model exactly as in ``latents``, with sigma 0, and take no part
    in the loss.

    Args:
        model: The transformer with everything but latents and noise level bound.
        latents: ``[B, C, F, h, w]`` ground-truth latents.
        reference: ``[B, C, F, h, w]`` latents of the hybrid reference.
        segment: The window to train on.
        sigma: ``[B]`` noise level of the target frames, in (0, 1].
        noise: ``[B, C, F, h, w]`` standard normal.
        parameterization: Quantity that the model predicts.
        measure: Weighting of errors; by default the mean of their squares on the target frames.

    Returns:
        ``[B]``, error of the velocity.

    Source:
        SwiftI2V, arXiv:2605.06356, section 3.2 (training with CSG and teacher forcing).
    """
    window = list(segment.window)
    clean, condition, drawn = latents[:, :, window], reference[:, :, window], noise[:, :, window]
    is_target = torch.zeros(len(window), dtype=torch.bool, device=latents.device)
    is_target[-len(segment.target) :] = True
    level = torch.where(is_target, sigma[:, None], 1.0)  # [B, N]
    states = (1 - level[:, None, :, None, None]) * clean + level[:, None, :, None, None] * drawn
    shown = torch.where(is_target[:, None, None], states, clean)
    output = model(torch.cat([shown, condition], dim=1), level * is_target)
    velocity = to_velocity(output, states, condition, level, parameterization)
    squares = (velocity - (drawn - clean)[:, :, -velocity.shape[2] :]).float().square()
    measure = measure or ErrorMeasure()
    return measure(squares[:, :, -len(segment.target) :] if measure.frames == "target" else squares)


def _weighted_mean(error: Tensor, channel_weight: Tensor | None) -> Tensor:
    """``[B]`` means of ``[B, C, ...]``."""
    if channel_weight is not None:
        error = error * channel_weight[:, None, None, None]
    return error.flatten(1).mean(dim=1)


def flow_loss(
    model: Model,
    latents: Tensor,
    reference: Tensor,
    sigma: Tensor,
    noise: Tensor,
    *,
    parameterization: Parameterization = "velocity",
    error_of: Literal["velocity", "clean"] = "velocity",
    channel_weight: Tensor | None = None,
) -> Tensor:
    """Flow-matching loss on whole clips at one noise level each, as Stage I is trained.

    Args:
        model: The transformer with everything but latents and noise level bound; it is given
            ``latents [B, C, F, h, w]`` and ``sigma [B, F]``.
        latents: ``[B, C, F, h, w]`` ground-truth latents.
        reference: ``[B, C, F, h, w]``, what ``reference_residual`` adds to.
        sigma: ``[B]`` noise levels in (0, 1].
        noise: ``[B, C, F, h, w]`` standard normal.
        parameterization: Quantity that the model predicts.
        error_of: The velocity, or the clean latents, which counts all noise levels alike.
        channel_weight: ``[C]`` weight of each channel; 1 if not given.

    Returns:
        ``[B]``, mean squared error.

    Source:
        Flow matching as in Wan 2.1, arXiv:2503.20314, section 4.2.
    """
    sigma_per_frame = sigma[:, None].expand(-1, latents.shape[2])
    level = sigma[:, None, None, None, None]
    noisy = (1 - level) * latents + level * noise
    output = model(noisy, sigma_per_frame)
    velocity = to_velocity(output, noisy, reference, sigma_per_frame, parameterization)
    error = (velocity - (noise - latents)).float()
    if error_of == "clean":
        error = error * level
    return _weighted_mean(error.square(), channel_weight)


FRAME_SIDE = 124.0
"""Pixels of a frame's side (the root of its area) in which a displacement's error is measured: 160x96."""
SLOPE_WEIGHT = 2.0
"""Weight of the error of the displacement's slope: neighbours that err differently bend straight
lines and jerk."""


def displacement_loss(displacement: Tensor, truth: Tensor) -> Tensor:
    """Error of a displacement field: squared where it is small, absolute where large.

    It is counted in pixels of a frame of 160x96, whatever the size of the clip. The error of the slope is
    added, the difference between neighbouring frames and cells.

    Args:
        displacement: ``[B, 2, T, h, w]`` at the centres of cells, in pixels; the first frame's does
            not count.
        truth: ``[B, 2, T, H, W]`` of the pixels; H and W are multiples of h and w.

    Returns:
        ``[B]``.
    """
    height, width = truth.shape[-2:]
    kernel = (height // displacement.shape[-2], width // displacement.shape[-1])
    error = (displacement - F.avg_pool3d(truth, (1, *kernel)))[:, :, 1:]
    error = error * (FRAME_SIDE / math.sqrt(height * width))
    loss = _displacement_penalty(error, beta=0.4)
    for axis in (-3, -2, -1):
        loss = loss + SLOPE_WEIGHT * _displacement_penalty(error.diff(dim=axis), beta=0.1)
    return loss


def _displacement_penalty(error: Tensor, beta: float) -> Tensor:
    """``[B]``: mean of ``error**2 / (2 beta)``, or of ``|error| - beta / 2`` above beta."""
    zero = torch.zeros_like(error)
    return F.smooth_l1_loss(error, zero, beta=beta, reduction="none").flatten(1).mean(dim=1)


PHOTOMETRIC_SCALE = 4.0
"""A moved photo off by a tenth of the range counts about as a displacement off by half a pixel."""


def photometric_loss(moved: Tensor, video: Tensor) -> Tensor:
    """Error of a displacement whose truth is not known: of the photo that it moved.

    Colours and their differences between neighbouring pixels, in absolute values: what comes into
    view cannot be told, and should not outweigh the rest.

    Args:
        moved: ``[B, 3, T, H, W]`` in [-1, 1], the photo at each frame.
        video: ``[B, 3, T, H, W]``, the clip; its first frame is the photo and does not count.

    Returns:
        ``[B]``.
    """
    error = (moved - video)[:, :, 1:]
    parts = (error, error.diff(dim=-2), error.diff(dim=-1))
    means = torch.stack([part.abs().flatten(1).mean(dim=1) for part in parts])
    return PHOTOMETRIC_SCALE * means.sum(dim=0)


def reconstruction_loss(
    decoded: Tensor,
    video: Tensor,
    posterior: DiagonalGaussianDistribution,
    *,
    error: Literal["squared", "absolute"] = "squared",
    kl_weight: float = 1e-6,
    gradient_weight: float = 0.0,
) -> Tensor:
    """Loss of a video VAE.

    Args:
        decoded: ``[B, 3, T, H, W]``.
        video: ``[B, 3, T, H, W]``, the truth.
        posterior: Posterior of the latents.
        error: Error of a pixel.
        kl_weight: Weight of the divergence from a standard normal, per latent value.
        gradient_weight: Weight of the error of differences between neighbouring pixels.

    Returns:
        ``[B]``.
    """
    difference = decoded.float() - video.float()
    loss = _penalize(difference, error)
    if gradient_weight > 0:
        rows, columns = difference.diff(dim=-2), difference.diff(dim=-1)
        loss = loss + gradient_weight * (_penalize(rows, error) + _penalize(columns, error))
    num_values = posterior.mean[0].numel()
    return loss + kl_weight * posterior.kl().flatten(1).sum(dim=1) / num_values


def _penalize(difference: Tensor, error: Literal["squared", "absolute"]) -> Tensor:
    values = difference.square() if error == "squared" else difference.abs()
    return values.flatten(1).mean(dim=1)


def hfato_loss(
    model: Model,
    latents: Tensor,
    degraded: Tensor,
    sigma: Tensor,
    noise: Tensor,
    *,
    channel_weight: Tensor | None = None,
) -> Tensor:
    """Loss that asks for the fine detail which noised, degraded latents have lost.

    The model sees ``(1 - sigma) * degraded + sigma * noise`` and has to predict the velocity that
    leads to the latents before the degradation. The error is that of the clean latents, so it
    equals ``w * sigma**2`` times the squared error of the velocity, where the wanted velocity is
    ``noise - degraded + (degraded - latents) / sigma``.

    Args:
        model: The transformer with everything but latents and noise level bound, predicting the
            velocity; it is given ``[B, C, F, h, w]`` and ``sigma [B, F]``.
        latents: ``[B, C, F, h, w]`` ground truth; F is 1 for images.
        degraded: ``[B, C, F, h, w]``, see ``swifti2v.training.relay.degradations``.
        sigma: ``[B]`` noise levels in (0, 1].
        noise: ``[B, C, F, h, w]`` standard normal.
        channel_weight: ``[C]`` weight of each channel; 1 if not given.

    Returns:
        ``[B]`` float32, mean squared error of the clean latents times ``w(sigma)``, see
        ``bell_weight``.

    Source:
        ViBe, arXiv:2603.23326 (high-frequency-awareness training objective).
    """
    level = sigma[:, None, None, None, None]
    noisy = (1 - level) * degraded + level * noise
    velocity = model(noisy, sigma[:, None].expand(-1, latents.shape[2]))
    clean = noisy.float() - level.float() * velocity.float()
    error = _weighted_mean((clean - latents.float()).square(), channel_weight)
    return bell_weight(sigma) * error


def bell_weight(sigma: Tensor) -> Tensor:
    """Weight of a noise level: highest in the middle of the 1000 timesteps, 0 at both ends.

    ``exp(-2 ((t - 500) / 1000) ** 2)`` with ``t = 1000 sigma``, less its least value, scaled so
    that its mean over the 1000 levels of the schedule with shift 5 is 1.

    Args:
        sigma: Noise levels in [0, 1], of any shape.

    Returns:
        Of the same shape, float32.

    Source:
        ViBe's public code (arXiv:2603.23326).
    """
    least, mean = _bell_scale()
    return (_bell(sigma.float()) - least) / mean


@cache
def _bell_scale() -> tuple[float, float]:
    """Least value of the bell over the schedule, and its mean above that."""
    values = _bell(torch.tensor(plan_sigmas(1000, shift=5.0)[:-1], dtype=torch.float64))
    least = float(values.min())
    return least, float(values.mean()) - least


def _bell(sigma: Tensor) -> Tensor:
    return torch.exp(-2 * (sigma - 0.5).square())
