"""Degradations that take the fine detail out of latents, so that a model learns to restore it."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from swifti2v.config import settings
from swifti2v.errors import ConfigError, ShapeError


@settings
class DegradationConfig:
    """Settings of a degradation of latents."""

    kind: Literal["down_up", "blur", "noise"] = "down_up"
    """Resized down and back up; blurred; or with noise added."""
    factor: float = 2.0
    """Factor of ``down_up`` along height and width."""
    blur: float = 1.0
    """Standard deviation of the Gaussian of ``blur``, in latent cells."""
    noise: float = 0.1
    """Standard deviation of ``noise``, of latents of unit variance."""

    def __post_init__(self) -> None:
        for name, value, low in (
            ("factor", self.factor, 1.0),
            ("blur", self.blur, 0.0),
            ("noise", self.noise, 0.0),
        ):
            if not low < value < math.inf:
                raise ConfigError(f"degradation.{name} is {value:g}; it must be above {low:g}")


def degrade_latents(
    latents: Tensor, config: DegradationConfig, generator: torch.Generator | None = None
) -> Tensor:
    """Take detail out of every frame by itself.

    Args:
        latents: ``[B, C, F, h, w]``; not changed.
        config: Settings.
        generator: Generator of ``noise``, on the CPU; the global one if not given. The other kinds
            draw nothing.

    Returns:
        ``[B, C, F, h, w]``.

    Raises:
        ShapeError: A frame is too small for the factor.

    Source:
        ``down_up`` as in ViBe, arXiv:2603.23326: trilinear, by 2.
    """
    if config.kind == "down_up":
        return _down_up(latents, config.factor)
    if config.kind == "blur":
        return _blur(latents, config.blur)
    noise = torch.randn(latents.shape, generator=generator, dtype=torch.float32)
    return latents + config.noise * noise.to(latents)


def _down_up(latents: Tensor, factor: float) -> Tensor:
    if min(latents.shape[-2:]) < factor:
        raise ShapeError(
            f"latents {latents.shape[-2]}x{latents.shape[-1]} cannot be made {factor:g} times "
            "smaller; take larger images, or a smaller degradation.factor"
        )
    small = F.interpolate(
        latents, scale_factor=(1.0, 1 / factor, 1 / factor), mode="trilinear", align_corners=False
    )
    return F.interpolate(small, size=latents.shape[2:], mode="trilinear", align_corners=False)


def _blur(latents: Tensor, deviation: float) -> Tensor:
    """Gaussian over height and width, the border repeated."""
    radius = math.ceil(3 * deviation)
    places = torch.arange(-radius, radius + 1, dtype=torch.float32, device=latents.device)
    kernel = torch.exp(-0.5 * (places / deviation).square())
    kernel = (kernel / kernel.sum()).to(latents.dtype)
    frames = latents.flatten(0, 2)[:, None]  # [B * C * F, 1, h, w]
    frames = F.pad(frames, (radius,) * 4, mode="replicate")
    frames = F.conv2d(F.conv2d(frames, kernel[None, None, None]), kernel[None, None, :, None])
    return frames.view(latents.shape)
