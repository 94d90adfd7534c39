"""The fastest placement that fits a memory budget, found before a weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from swifti2v.jobs.request import ClipRequest
from swifti2v.jobs.settings import RunSettings
from swifti2v.models.runtime.roles import Placement
from swifti2v.planning.devices import DEVICES, PRECISIONS, Precision
from swifti2v.planning.measurement import free_bytes, memory_bytes
from swifti2v.planning.plans import Plan, Wish, make_plan
from swifti2v.planning.stored import find_costs
from swifti2v.units import format_bytes, parse_gigabytes

HOST = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """Placement of a run."""

    placement: Placement
    settings: RunSettings
    """Settings with the VAE tile, chosen if the user chose none."""
    note: str | None
    """Reason for the placement, if a plan chose it."""


def place(
    request: ClipRequest, settings: RunSettings, given: Mapping[str, Any], device: torch.device
) -> Placed:
    """Choose placement and VAE tile if the request names a memory budget and leaves them open.

    A VAE tile among the ``given`` settings is kept.

    Raises:
        ConfigError: Nothing fits, or the budget is neither ``auto`` nor a number above 0.
    """
    if request.memory is None:
        return Placed(placement=request.placement or "resident", settings=settings, note=None)
    budget = free_bytes(device) if request.memory == "auto" else parse_gigabytes(request.memory)
    stage2 = settings.config.stage2
    wish = Wish(
        placement=request.placement,
        is_tile_given="vae_tile" in given.get("stage2", {}),
        vae_tile=stage2.vae_tile,
    )
    plan = plan_run(settings, device, budget, wish)
    chosen = plan.require_fit()
    stage2 = replace(stage2, vae_tile=chosen.vae_tile)
    return Placed(
        placement=chosen.placement,  # type: ignore[arg-type] # "8-bit" is never chosen
        settings=replace(settings, config=replace(settings.config, stage2=stage2)),
        note=f"placement: {plan.why}",
    )


def plan_run(settings: RunSettings, device: torch.device, budget: float, wish: Wish) -> Plan:
    """Plan a run on a device of this machine.

    It measures nothing, so that the same command gives the same plan: the faster of two placements
    is the same on every card.
    """
    usual: Precision = "bfloat16" if device.type == "cuda" else "float32"
    known = next((name for name in PRECISIONS if name == settings.dtype), usual)
    with_stage1 = settings.command == "generate"
    costs = find_costs(settings.model, settings.config, known, with_stage1=with_stage1)
    typical = replace(
        DEVICES["rtx4090"],
        name=device.type,
        memory_bytes=memory_bytes(device),
        is_cpu=device.type == "cpu",
    )
    host_bytes = None if device.type == "cpu" else memory_bytes(HOST)
    return make_plan(costs, typical, known, budget, wish, host_bytes)


def suggest_plan(settings: RunSettings, placement: Placement, *, keeps: bool = False) -> str:
    """Advice after the device ran out of memory: the fastest plan that needs clearly less."""
    device, tile = torch.device(settings.device), settings.config.stage2.vae_tile
    now = Wish(placement=placement, is_tile_given=True, vae_tile=tile, keeps=keeps)
    total = memory_bytes(device)
    failed = plan_run(settings, device, total, now)
    budget = 0.9 * min(total, failed.smallest.peak_device_bytes["peak"])
    plan = plan_run(settings, device, budget, Wish(keeps=keeps))
    if plan.chosen is None:
        files = " or smaller files of the model" if plan.is_over_host(plan.smallest) else ""
        return f"choose a smaller size{files}: {plan.why}"
    flags = f"--placement {plan.chosen.placement}"
    if plan.chosen.vae_tile is not None:
        flags += f" --set stage2.vae_tile={plan.chosen.vae_tile}"
    needed = format_bytes(plan.chosen.peak_device_bytes["peak"])
    return f"repeat with {flags}, which needs about {needed}"
