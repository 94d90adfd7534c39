"""Training losses as pure functions: tensors in, one number for each sample out."""

from collections.abc import Callable

import torch
from torch import Tensor

from swifti2v.sampling import Parameterization, to_velocity
from swifti2v.segments import Segment

Model = Callable[[Tensor, Tensor], Tensor]
"""``(hidden_states [B, 2C, N, h, w], sigma [B, N]) -> output [B, C, N, h, w]``."""


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
