"""Training times of nano's parts: one budget for all of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from swifti2v.training.engine.run_config import PhaseConfig
from swifti2v.training.nano.config import NanoConfig

AnyPhase = TypeVar("AnyPhase", bound=PhaseConfig)
NanoPart = Literal["text", "stage1", "stage2"]
"""Parts that are trained one after the other."""
MINUTES_SHARE: dict[NanoPart, float] = {"text": 0.06, "stage1": 0.44, "stage2": 0.5}
"""Shares by which ``limit_minutes`` divides a budget."""
REDRAWN_PER_MINUTE = 0.56
"""Stage-transition clips for a minute of a budget, where a phase asks for any."""


def limit_minutes(config: NanoConfig, minutes: float) -> NanoConfig:
    """Same settings with so many minutes of training in all, divided by ``MINUTES_SHARE``.

    Stage-transition clips are fewer in proportion. Reading the clips, the fits at the start of the
    stages and those clips come on top: a few minutes.
    """

    def limit(part: NanoPart, phases: Sequence[AnyPhase]) -> tuple[AnyPhase, ...]:
        own = minutes * MINUTES_SHARE[part] / len(phases)
        return tuple(replace(phase, minutes=own, steps=None) for phase in phases)

    redraw = config.stage2.redraw
    num_clips = min(redraw.num_clips, max(1, round(minutes * REDRAWN_PER_MINUTE)))
    stage2 = replace(config.stage2, redraw=replace(redraw, num_clips=num_clips))
    return _with_budgets(replace(config, stage2=stage2), limit)


def limit_steps(config: NanoConfig, steps: int) -> NanoConfig:
    """Same settings with so many steps for each part's phases."""

    def limit(_: NanoPart, phases: Sequence[AnyPhase]) -> tuple[AnyPhase, ...]:
        return tuple(replace(phase, minutes=None, steps=steps) for phase in phases)

    return _with_budgets(config, limit)


def _with_budgets(
    config: NanoConfig, limit: Callable[[NanoPart, Sequence[Any]], tuple[Any, ...]]
) -> NanoConfig:
    text, stage1, stage2 = config.text, config.stage1, config.stage2
    return replace(
        config,
        text=replace(text, phases=limit("text", text.phases)),
        stage1=replace(stage1, phases=limit("stage1", stage1.phases)),
        stage2=replace(stage2, phases=limit("stage2", stage2.phases)),
    )
