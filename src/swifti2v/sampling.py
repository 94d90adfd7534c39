"""Flow-matching sampling: the meaning of a model's output, one denoising loop, noise by frame."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from swifti2v.config import StageName
from swifti2v.errors import ConfigError, NumericalError, ShapeError

Parameterization = Literal["velocity", "reference_residual"]
"""Quantity that a model predicts; ``to_velocity`` turns it into a velocity."""

Velocity = Callable[[Tensor, Tensor], Tensor]
"""``(latents [B, C, N, h, w], sigma [B, N]) -> velocity [B, C, N', h, w]`` of the last N' frames, at
least of those that are denoised."""

Renoise = Callable[[int], Tensor]
"""``step -> noise [B, C, N', h, w]`` with which the target frames are noised again for a step."""

SAMPLING_VERSION = 2
"""Raised when the same settings and the same seed make another clip than before. 1: both stages
began with the same random numbers, and ``strength`` ran its part of the steps only."""


def to_velocity(
    output: Tensor,
    latents: Tensor,
    reference: Tensor,
    sigma: Tensor,
    parameterization: Parameterization,
) -> Tensor:
    """Turn a model's output into the velocity (noise minus data).

    Args:
        output: ``[B, C, N', h, w]``, what the model returned for the last N' of the N frames.
        latents: ``[B, C, N, h, w]``, the noisy latents it was given.
        reference: ``[B, C, N, h, w]``, the reference latents it was given.
        sigma: ``[B, N]`` noise level of each frame; where it is 0 the velocity is 0.
        parameterization: ``velocity``: the output as it is. ``reference_residual``: the clean
            latents are ``reference + output`` and the velocity is ``(latents - clean) / sigma``.

    Returns:
        ``[B, C, N', h, w]``.
    """
    if parameterization == "velocity":
        return output
    if parameterization == "reference_residual":
        first = latents.shape[2] - output.shape[2]
        level = sigma[:, None, first:, None, None].to(latents.dtype)
        inverse = torch.where(level > 0, 1 / level, 0)
        return (latents[:, :, first:] - reference[:, :, first:]).sub_(output).mul_(inverse)
    raise ConfigError(
        f"parameterization is {parameterization!r}; known are 'velocity', 'reference_residual'"
    )


def guide(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor | None,
    guidance_scale: float,
) -> Velocity:
    """Bind the prompt to a model, with classifier-free guidance where it is asked for.

    Args:
        predict: ``(embeds, latents, sigma) -> output``, shapes as in ``Velocity``.
        prompt_embeds: ``[1, L, D]``.
        negative_prompt_embeds: ``[1, L, D]``; needed only where guidance is above 1.
        guidance_scale: 1 or less means one model call without guidance.

    Raises:
        ConfigError: Guidance is asked for without negative prompt embeddings.
    """
    if guidance_scale <= 1:
        return partial(predict, prompt_embeds)
    if negative_prompt_embeds is None:
        raise ConfigError(f"guidance_scale {guidance_scale:g} needs negative prompt embeddings")

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        positive = predict(prompt_embeds, latents, sigma)
        negative = predict(negative_prompt_embeds, latents, sigma)
        return negative + guidance_scale * (positive - negative)

    return velocity


def denoise(
    velocity: Velocity,
    latents: Tensor,
    num_given: int,
    sigmas: Sequence[float],
    on_step: Callable[[int], None] | None = None,
    where: str = "model",
    renoise: Renoise | None = None,
) -> Tensor:
    """Denoise the target frames of a window, its last ones, with flow-matching steps.

    All frames reach the model, but only target frames change: those before them stay exactly as
    given and reach it with sigma 0. A step is Euler's, along the velocity to the next level; or,
    with ``renoise``, it goes to the clean frames that the velocity points at, and noises these
    anew to the next level.

    Args:
        velocity: The model, see ``Velocity``.
        latents: ``[B, C, N, h, w]`` float32; target frames at the level ``sigmas[0]``.
        num_given: Frames before the targets.
        sigmas: ``S + 1`` levels falling to 0, see ``SamplingConfig.plan_sigmas``.
        on_step: Called after each step with its number, from 0; may raise to stop.
        where: Named in the error if the model fails.
        renoise: Noise of the target frames by step, from 1; None takes Euler steps.

    Returns:
        ``[B, C, N, h, w]`` with clean target frames; ``latents`` is not changed.

    Raises:
        ShapeError: The window has no target.
        NumericalError: The model returned NaN or infinity.

    Source:
        SwiftI2V, arXiv:2605.06356, section 3.2 (bidirectional contextual interaction); for
        ``renoise`` distribution matching distillation, DMD2, arXiv:2405.14867.
    """
    batch, _, num_frames, *_ = latents.shape
    if not 0 <= num_given < num_frames:
        raise ShapeError(f"{num_given} of {num_frames} frames are given; one at least is denoised")
    latents = latents.clone()
    target = latents[:, :, num_given:]  # a view
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        sigma_per_frame = torch.full((batch, num_frames), sigma, device=latents.device)
        sigma_per_frame[:, :num_given] = 0
        prediction = velocity(latents, sigma_per_frame)[:, :, -target.shape[2] :].float()
        if not torch.stack(torch.aminmax(prediction)).isfinite().all():
            raise NumericalError(f"{where} returned NaN or infinity at step {step + 1}")
        if renoise is None or sigma_next == 0:
            target.add_(prediction, alpha=sigma_next - sigma)
        else:
            clean = target.sub(prediction, alpha=sigma)
            target.copy_(add_noise(clean, renoise(step + 1), sigma_next))
        if on_step is not None:
            on_step(step)
    return latents


def add_noise(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Latents at a noise level: ``(1 - sigma) * clean + sigma * noise``."""
    return (1 - sigma) * clean + sigma * noise


def draw_noise(
    shape: tuple[int, int, int],
    frames: Sequence[int],
    seed: int,
    device: torch.device | str,
    step: int = 0,
    *,
    stage: StageName,
) -> Tensor:
    """Standard normal noise drawn frame by frame, each from the seed, the stage and its own index.

    A longer clip therefore starts like a shorter one, and neither the segment size nor a resumed
    run changes any value. Drawn on the CPU, so the device does not matter either.

    Args:
        shape: Channels, height and width of one latent frame.
        frames: Latent frame indices.
        seed: Any integer.
        device: Device of the result.
        step: Step before which it is added; each draws other noise, see ``denoise``.
        stage: Stage that denoises it; the stages of a run share the seed and draw different noise.

    Returns:
        ``[1, C, len(frames), h, w]`` float32.
    """
    drawn = []
    for frame in frames:
        # Hashed, as PyTorch reads only 32 bits of a seed: and all of these numbers count.
        name = f"{seed} {stage} {frame}" + (f" {step}" if step else "")
        digest = hashlib.sha256(name.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        drawn.append(torch.randn(shape, generator=generator))
    return torch.stack(drawn).transpose(0, 1)[None].to(device)
