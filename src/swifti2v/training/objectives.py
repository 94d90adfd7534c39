"""Training losses as pure functions: tensors in, one number for each sample out."""

from collections.abc import Callable
from typing import Literal

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from swifti2v.sampling import Parameterization, to_velocity
from swifti2v.segments import Segment

Model = Callable[[Tensor, Tensor], Tensor]
"""``(hidden_states [B, ..., N, h, w], sigma [B, N]) -> output [B, C, N, h, w]``."""


def segment_flow_loss(
    model: Model,
    latents: Tensor,
    reference: Tensor,
    segment: Segment,
    sigma: Tensor,
    noise: Tensor,
    *,
    parameterization: Parameterization = "velocity",
    channel_weight: Tensor | None = None,
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
        parameterization: What the model predicts.
        channel_weight: ``[C]`` weight of each channel; 1 if not given.

    Returns:
        ``[B]``, mean squared error of the velocity.

    Source:
        SwiftI2V, arXiv:2605.06356, section 3.2 (training with CSG and teacher forcing).
    """
    window = list(segment.window)
    clean, condition, drawn = latents[:, :, window], reference[:, :, window], noise[:, :, window]
    is_target = torch.zeros(len(window), dtype=torch.bool, device=latents.device)
    is_target[-len(segment.target) :] = True
    sigma_per_frame = sigma[:, None] * is_target  # [B, N]
    level = sigma_per_frame[:, None, :, None, None]
    noisy = torch.where(level > 0, (1 - level) * clean + level * drawn, clean)
    output = model(torch.cat([noisy, condition], dim=1), sigma_per_frame)
    velocity = to_velocity(output, noisy, condition, sigma_per_frame, parameterization)
    error = (velocity - (drawn - clean))[:, :, is_target].float().square()
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
        parameterization: What the model predicts.
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
    error = error.square()
    if channel_weight is not None:
        error = error * channel_weight[:, None, None, None]
    return error.flatten(1).mean(dim=1)


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
        posterior: Of the latents.
        error: Of a pixel.
        kl_weight: Of the divergence from a standard normal, per latent value.
        gradient_weight: Of the error of differences between neighbouring pixels.

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
