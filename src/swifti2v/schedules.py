"""Noise levels of a sampling run, without any tensor."""

from collections.abc import Sequence
from itertools import pairwise

from swifti2v.errors import ConfigError


def shift_sigma(sigma: float, shift: float) -> float:
    """Move a noise level towards 1: ``shift * s / (1 + (shift - 1) * s)``."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def plan_sigmas(num_inference_steps: int, shift: float = 5.0, strength: float = 1.0) -> list[float]:
    """Noise levels of a run, from the first one down to 0.

    The unshifted levels are ``1, 1 - 1/S, ..., 1/S``: with S = 4 the grid of the step-distilled
    LoRAs (1, .9375, .8333, .625 at shift 5), with 20 to 50 steps the plain shifted schedule.

    Args:
        num_inference_steps: S, model calls.
        shift: Flow shift; 5 for Wan at 480P with a few-step LoRA, 1 means none.
        strength: Part of the unshifted schedule to run, in (0, 1]: below 1 the run starts from a
            noised reference, at the level ``shift_sigma(strength, shift)``, and all S steps are
            spread over that part.

    Returns:
        ``S + 1`` falling levels, the last one 0; no unit.

    Raises:
        ConfigError: A value is out of range.

    Source:
        ViBe's public code (scheduler of its second pass) for a strength below 1.
    """
    if num_inference_steps < 1:
        raise ConfigError(f"num_inference_steps is {num_inference_steps}; it must be at least 1")
    if shift <= 0:
        raise ConfigError(f"shift is {shift}; it must be above 0")
    if not 0 < strength <= 1:
        raise ConfigError(f"strength is {strength}; it must be in (0, 1]")
    steps = num_inference_steps
    grid = [strength * (1 - step / steps) for step in range(steps)]
    return [*(shift_sigma(level, shift) for level in grid), 0.0]


def select_sigmas(ladder: Sequence[float], strength: float = 1.0) -> list[float]:
    """Noise levels of a run on the levels that weights were distilled for, down to 0.

    Such weights know no level between: a strength below 1 leaves out the levels above it, and the
    run starts from a reference noised to the first level that is left.

    Args:
        ladder: Falling levels in (0, 1], one for each model call; 1, .757, .522 for FastWan.
        strength: Highest level that runs, in (0, 1].

    Returns:
        The levels that run, and 0.

    Raises:
        ConfigError: The levels do not fall or are out of range, or the strength is below them all.

    Source:
        FastVideo's refinement of a clip (``docs/design/apple_silicon_fast_mode.md``): 757, 522 or
        522 alone of 1000, 757, 522.
    """
    text = ", ".join(f"{level:g}" for level in ladder)
    if not ladder:
        raise ConfigError("sigmas is empty; list a noise level for each step, or leave it out")
    for level in ladder:
        if not 0 < level <= 1:
            end = "; the final 0 is understood, leave it out" if level == 0 else ""
            raise ConfigError(f"sigmas is {text}; each must be above 0 and at most 1{end}")
    if any(after >= before for before, after in pairwise(ladder)):
        raise ConfigError(f"sigmas is {text}; each must be below the one before it")
    chosen = [level for level in ladder if level <= strength]
    if not chosen:
        raise ConfigError(
            f"strength is {strength:g}, below all of sigmas ({text}), so no step would run; "
            f"take one of these as strength"
        )
    return [*chosen, 0.0]
