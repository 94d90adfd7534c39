"""Noise levels to train at: a pure map from uniform numbers, strata over a global batch."""

import math
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from swifti2v.config import settings
from swifti2v.errors import ConfigError, InputError
from swifti2v.schedules import plan_sigmas, shift_sigma
from swifti2v.training.engine.draws import Draw


@settings
class NoiseLevelConfig:
    """Noise levels at which a model is trained."""

    distribution: Literal["uniform", "logit_normal", "inference"] = "uniform"
    """Even over (0, 1]; the logistic function of a normal number; or only the levels that a run of
    ``num_inference_steps`` visits, each as often."""
    mean: float = 0.0
    """Mean of the normal number of ``logit_normal``; above 0 prefers high noise."""
    std: float = 1.0
    """Standard deviation of the normal number of ``logit_normal``."""
    shift: float = 5.0
    """Flow shift of every draw and of the inference levels, as in sampling; 1 means none."""
    inference_share: float = 0.0
    """Part of the draws that are inference levels instead, in [0, 1]: a few-step sampler asks the
    model at these levels and no others."""
    num_inference_steps: int = 4
    """Steps of the runs whose levels are the inference levels."""
    stratified: bool = True
    """Spread a global batch evenly over the distribution, see ``stratify``."""

    def __post_init__(self) -> None:
        if not -10 <= self.mean <= 10 or not 0 < self.std <= 5:
            raise ConfigError(
                f"mean {self.mean} and std {self.std} must be in [-10, 10] and (0, 5]"
            )
        if not 0.01 <= self.shift <= 100:
            raise ConfigError(f"shift is {self.shift}; it must be in [0.01, 100], 1 means none")
        if not 0 <= self.inference_share <= 1:
            raise ConfigError(f"inference_share is {self.inference_share}; it must be in [0, 1]")
        if self.inference_share > 0 and self.distribution == "inference":
            raise ConfigError(
                f"inference_share is {self.inference_share}, but distribution 'inference' draws "
                "nothing else; leave it 0"
            )
        if not 1 <= self.num_inference_steps <= 1000:
            raise ConfigError(
                f"num_inference_steps is {self.num_inference_steps}; it must be in [1, 1000]"
            )


def draw_sigmas(config: NoiseLevelConfig, uniforms: Tensor) -> Tensor:
    """Turn uniform numbers into noise levels; the same number always gives the same level.

    A rising number takes first the inference levels of ``inference_share``, then the rest of the
    distribution, each from high noise to low; strata of the numbers are strata of the levels.

    Args:
        config: Settings.
        uniforms: ``[B]`` in [0, 1), on any device.

    Returns:
        ``[B]`` float32 noise levels in (0, 1], on the CPU; no unit. Inference levels are exactly
        those of ``plan_sigmas``.

    Raises:
        InputError: A number is outside [0, 1).
    """
    numbers = uniforms.detach().double().cpu()
    if numbers.ndim != 1 or not ((numbers >= 0) & (numbers < 1)).all():
        raise InputError(
            f"noise levels need uniform numbers [B] in [0, 1), not {list(numbers.shape)} up to "
            f"{numbers.max() if numbers.numel() else 'nothing'}"
        )
    return torch.tensor([_level(config, u) for u in numbers.tolist()], dtype=torch.float32)


def draw_step_sigmas(config: NoiseLevelConfig, draw: Draw) -> Tensor:
    """Noise levels of a micro-batch, ``[b]`` float32 in (0, 1] on the CPU.

    They are a function of the seed, the step and the samples alone, however a step is divided.
    """
    uniforms = draw.uniforms()
    if config.stratified:
        uniforms = stratify(uniforms, torch.tensor(draw.indices), draw.batch_size, draw.step)
    return draw_sigmas(config, uniforms)


def stratify(uniforms: Tensor, indices: Tensor, num_strata: int, seed: int) -> Tensor:
    """Move the draws of a global batch into strata of their own.

    The b-th of B draws falls into one of the B intervals ``[k / B, (k + 1) / B)``, no two into the
    same one; which one is a permutation drawn from ``seed``, so that no rank keeps the low levels.
    Ranks and accumulation steps that pass the global indices of their own draws share one
    stratification without talking to each other.

    Args:
        uniforms: ``[b]`` in [0, 1), this rank's numbers; float32 or float64.
        indices: ``[b]`` integers, their places in the global batch.
        num_strata: B, size of the global batch.
        seed: Seed of the permutation; the same on all ranks, another one each step.

    Returns:
        ``[b]`` float64 in [0, 1), on the CPU.

    Raises:
        InputError: The shapes differ, or an index is not in the global batch.
    """
    indices = indices.cpu()
    if indices.shape != uniforms.shape or indices.ndim != 1:
        raise InputError(
            f"{list(uniforms.shape)} uniform numbers and {list(indices.shape)} indices; give [b] each"
        )
    if indices.numel() and not ((indices >= 0) & (indices < num_strata)).all():
        raise InputError(
            f"index {indices.min()} to {indices.max()} in a global batch of {num_strata}; indices "
            "run from 0"
        )
    strata = torch.randperm(num_strata, generator=torch.Generator().manual_seed(seed))[indices]
    numbers = (strata + uniforms.detach().double().cpu()) / num_strata
    return numbers.clamp(max=math.nextafter(1.0, 0.0))  # the sum may round up to the next stratum


def _level(config: NoiseLevelConfig, number: float) -> float:
    share = 1.0 if config.distribution == "inference" else config.inference_share
    if number < share:
        levels = plan_sigmas(config.num_inference_steps, config.shift)[:-1]
        return levels[min(int(number / share * len(levels)), len(levels) - 1)]
    rest = max(1 - (number - share) / (1 - share), 2**-53)  # in (0, 1], also once rounded
    if config.distribution == "logit_normal" and rest < 1:  # 1 is the limit of a normal number, too
        normal = NormalDist(config.mean, config.std).inv_cdf(rest)
        rest = 1 / (1 + math.exp(-normal))
    return shift_sigma(rest, config.shift)
