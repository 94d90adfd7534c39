"""Does a clip fit, with which placement, and how long will it take: counted work over known rates."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import Any, Literal

from swifti2v.errors import ConfigError
from swifti2v.models.runtime.roles import RELEASED, Placement
from swifti2v.models.vae.tiles import count_tiles
from swifti2v.planning.costs import STAGES, ClipCosts, ClipWork, CountedStage, StageWork
from swifti2v.planning.devices import Device, Precision
from swifti2v.units import GB, format_bytes

CONTEXT_BYTES = 0.5 * GB
"""Memory of the CUDA context and its libraries on a GPU, and of Python and PyTorch in the host.
An assumption, not measured."""
SLACK = 1.1
"""Activations with the allocator's gaps and the workspaces of cuDNN. An assumption, not measured."""
MIN_TILE = 16
"""Latent cells along the side of the smallest VAE tile that is proposed."""
NO_STREAMED_PREFETCH = ("image_encoder",)
"""Components whose blocks are fetched when they are due, not before."""
SEARCH_THREADS = 4
"""Cores beside a GPU that search motion for the carried detail. An assumption."""
PLACEMENTS: tuple[Placement, ...] = ("resident", "streamed", "offloaded")


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to run a clip."""

    placement: Placement | Literal["8-bit"]
    """See ``swifti2v.models.runtime.placement.place``."""
    vae_tile: int | None
    """Longest side of Stage II's VAE tiles in latent cells; None for whole frames."""
    seconds: dict[str, float]
    """Seconds by stage, and ``total``, without loading weights and writing files."""
    peak_device_bytes: dict[str, float]
    """Most device memory by stage, and ``peak``."""
    host_bytes: float
    """Host memory."""
    is_available: bool = True
    """Whether a plan may choose it; if not, it changes the frames and is shown for comparison."""

    def __str__(self) -> str:
        tiles = "" if self.vae_tile is None else f", VAE tiles of {self.vae_tile}"
        return f"{self.placement}{tiles}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The options for a clip on a device, and the one to take."""

    model: str
    device: str
    precision: Precision
    budget_bytes: float
    """Device memory that may be used, at most all that the device has."""
    asked_bytes: float
    """Device memory that the user asked for."""
    chosen: Option | None
    """The fastest that fits; None if none does."""
    smallest: Option
    """The available one that needs least device memory."""
    options: tuple[Option, ...]
    flops: dict[str, float]
    """FLOP by stage, and ``total``, of the chosen option (of the smallest, if none fits)."""
    disk_bytes: float
    """The weights in this precision."""

    @property
    def why(self) -> str:
        """The choice in one sentence."""
        room, asked = format_bytes(self.budget_bytes), format_bytes(self.asked_bytes)
        if asked != room:
            room += f", all that the {self.device} has of the {asked} asked for"
        if self.chosen is None:
            needed = format_bytes(self.smallest.peak_device_bytes["peak"])
            return f"nothing fits into {room}: the smallest, {self.smallest}, needs {needed}"
        faster = [
            option
            for option in self.options
            if option.is_available and option.seconds["total"] < self.chosen.seconds["total"]
        ]
        needs = [
            f"{item} needs {format_bytes(item.peak_device_bytes['peak'])}" for item in faster[:3]
        ]
        reason = f" ({'; '.join(needs)})" if needs else ""
        return f"{self.chosen}: the fastest that fits into {room}{reason}"

    def require_fit(self) -> Option:
        """The chosen option.

        Raises:
            ConfigError: None fits; the message says what would.
        """
        if self.chosen is None:
            needed = ceil(10 * self.smallest.peak_device_bytes["peak"] / GB) / 10
            raise ConfigError(
                f"{self.why}; give {needed:.1f} GB or more, a smaller size, or fewer frames in a "
                "segment (--segment-size)"
            )
        return self.chosen

    def to_dict(self) -> dict[str, Any]:
        """Plain values; bytes and FLOP as whole numbers."""
        shown = self.chosen or self.smallest
        return {
            "fits": self.chosen is not None,
            "placement": None if self.chosen is None else self.chosen.placement,
            "vae_tile": shown.vae_tile,
            "why": self.why,
            "model": self.model,
            "device": self.device,
            "precision": self.precision,
            "budget_bytes": round(self.budget_bytes),
            "flops": _rounded(self.flops),
            "seconds": shown.seconds,
            "peak_device_bytes": _rounded(shown.peak_device_bytes),
            "host_bytes": round(shown.host_bytes),
            "disk_bytes": round(self.disk_bytes),
            "options": [
                {
                    "placement": option.placement,
                    "vae_tile": option.vae_tile,
                    "is_available": option.is_available,
                    "seconds": option.seconds,
                    "peak_device_bytes": _rounded(option.peak_device_bytes),
                    "host_bytes": round(option.host_bytes),
                }
                for option in self.options
            ],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """Choices of the user; a plan never overrides them."""

    placement: Placement | None = None
    """None leaves the choice."""
    is_tile_given: bool = False
    """Whether ``vae_tile`` is decided."""
    vae_tile: int | None = None
    """Longest side of Stage II's VAE tiles; None for whole frames."""


def make_plan(
    costs: ClipCosts,
    device: Device,
    precision: Precision,
    budget_bytes: float | None = None,
    wish: Wish | None = None,
) -> Plan:
    """Find the fastest placement that fits.

    VAE tiles are tried from large to small, until one fits: smaller ones cost more work.

    Args:
        costs: Costs of the clip.
        device: Device that computes.
        precision: Number type of the weights.
        budget_bytes: Device memory that may be used; None, or more than the device has, for all
            of the device's.
        wish: Decisions to keep.

    Raises:
        ConfigError: A budget that is not positive, or a device without this precision.
    """
    wish = wish or Wish()
    asked = device.memory_bytes if budget_bytes is None else budget_bytes
    if asked <= 0:
        raise ConfigError(f"a budget of {asked / GB:g} GB holds nothing; give a positive number")
    budget = min(asked, device.memory_bytes)
    if precision not in device.rates:
        known = ", ".join(device.rates)
        raise ConfigError(f"the rates of {device.name} are not known in {precision}; use {known}")
    linear = set(costs.linear.values())
    if "float8" in linear and "float8" not in device.rates and len(device.rates) > 1:
        raise ConfigError(f"{device.name} has no 8-bit floating point; use int8 or plain layers")
    placements = PLACEMENTS if wish.placement is None else (wish.placement,)
    if device.is_cpu and wish.placement is None:
        placements = ("resident",)
    tiles = [wish.vae_tile] if wish.is_tile_given else [None, *propose_tiles(costs.cells)]
    options: list[Option] = []
    works: dict[int, ClipWork] = {}
    for tile, placement in product(tiles, placements):
        if tile != tiles[0] and any(_fits(option, budget) for option in options):
            break
        work = costs.count(tile, offloads_history=placement == "offloaded")
        options.append(estimate(work, device, precision, placement))
        works[id(options[-1])] = work
    fitting = [option for option in options if _fits(option, budget)]
    smallest = min(options, key=lambda option: option.peak_device_bytes["peak"])
    chosen = min(fitting, key=lambda option: option.seconds["total"], default=None)
    shown = chosen or smallest
    if not device.is_cpu and linear <= {"plain"}:
        options.append(_estimate_8bit(works[id(options[0])], device, precision))
    work = works[id(shown)]
    return Plan(
        model=costs.name,
        device=device.name,
        precision=precision,
        budget_bytes=budget,
        asked_bytes=asked,
        chosen=chosen,
        smallest=smallest,
        options=tuple(options),
        flops=work.flops,
        disk_bytes=sum(weights.num_bytes for weights in work.weights.values()),
    )


def propose_tiles(cells: tuple[int, int]) -> list[int]:
    """Sides of VAE tiles worth trying, from large to small: the smallest of each division.

    Args:
        cells: Height and width of Stage II's latents.
    """
    grids: dict[tuple[int, int], int] = {}
    for side in range(MIN_TILE, max(cells)):
        rows, columns = (count_tiles(length, side) for length in cells)
        grids.setdefault((rows, columns), side)
    return [*grids.values()][::-1]


def estimate(work: ClipWork, device: Device, precision: Precision, placement: Placement) -> Option:
    """Time and memory of a clip in one placement.

    A stage takes the time of its matrix products, attention, convolutions and remaining memory
    traffic, one after the other. The host searches motion for carried detail at the same time. Streamed weights are copied while a block computes, so the longer
    of the two counts; the causal history is not.

    Args:
        work: Counted with ``offloads_history`` as the placement says.
        device: Device that computes.
        precision: Number type of the weights.
        placement: Where they live.
    """
    is_streamed = placement != "resident"
    return Option(
        placement=placement,
        vae_tile=work.vae_tile,
        seconds=_all_seconds(work, device, precision, is_streamed=is_streamed),
        peak_device_bytes=_peaks(work, is_streamed=is_streamed),
        host_bytes=_host_bytes(work, device, is_streamed=is_streamed),
    )


def _all_seconds(
    work: ClipWork, device: Device, precision: str, *, is_streamed: bool
) -> dict[str, float]:
    """Seconds by stage, and ``total``."""
    seconds = {
        name: _seconds(work, work.stages[name], device, precision, is_streamed) for name in STAGES
    }
    seconds["reference"] += _wait_for_search(work, device, seconds)
    by_stage: dict[str, float] = {name: seconds[name] for name in STAGES}
    return {**by_stage, "total": sum(seconds.values())}


def _seconds(
    work: ClipWork, stage: StageWork, device: Device, precision: str, is_streamed: bool
) -> float:
    rates, count = device.rates[precision], stage.count
    if stage.is_float8:
        rates = device.rates.get("float8", rates)
    compute = (
        count.linear / rates.linear
        + count.attention / rates.attention
        + count.convolution / rates.convolution
        + count.other_bytes / rates.traffic
    )
    moved = count.transfer_bytes / rates.transfer
    hidden = shown = 0.0
    for role, passes in stage.passes.items() if is_streamed else ():
        if work.weights[role].stays:
            continue
        copied = passes * work.weights[role].num_bytes / rates.transfer
        if role in NO_STREAMED_PREFETCH:
            shown += copied
        else:
            hidden += copied
    return max(compute, hidden) + shown + moved


def _wait_for_search(
    work: ClipWork, device: Device, seconds: Mapping[CountedStage, float]
) -> float:
    """Seconds that the search for motion adds; it runs while a GPU makes the segment before."""
    if device.is_cpu:
        return work.search_seconds / (os.cpu_count() or 1)
    search = work.search_seconds / SEARCH_THREADS
    first = search / work.num_segments
    return first + max(0.0, search - first - seconds["stage2"] - seconds["decode"])


def _peaks(work: ClipWork, *, is_streamed: bool, is_8bit: bool = False) -> dict[str, float]:
    """Device memory by stage: weights, activations and the history that other stages keep."""
    all_weights = sum(
        part.num_bytes * (0.5 if is_8bit and role.endswith("transformer") else 1)
        for role, part in work.weights.items()
    )
    staying = sum(part.num_bytes for part in work.weights.values() if part.stays)
    kept = {name: work.stages[name].count.kept_bytes for name in STAGES}
    peaks: dict[str, float] = {}
    for name in STAGES:
        stage = work.stages[name]
        weights = all_weights
        if is_streamed:
            streamed = [work.weights[role].streamed_bytes for role in stage.passes]
            weights = max(streamed, default=0) + staying
        waiting = 0.0
        if name in ("reference", "stage2", "decode"):  # they take turns, segment by segment
            waiting = sum(kept.values()) - kept[name]
        peaks[name] = CONTEXT_BYTES + weights + SLACK * (stage.count.peak_bytes + waiting)
    return {**peaks, "peak": max(peaks.values())}


def _host_bytes(work: ClipWork, device: Device, *, is_streamed: bool) -> float:
    """Most host memory at a time: all weights at first, or the rest after ``release_stage1``."""
    weights = work.weights
    if device.is_cpu:
        peak = _peaks(work, is_streamed=False)["peak"]
        return peak + work.host_bytes
    if not is_streamed:  # each component passes through the host on its way to the device
        return CONTEXT_BYTES + max(part.num_bytes for part in weights.values()) + work.host_bytes
    start = sum(part.pinned_bytes for part in weights.values())
    left = sum(part.pinned_bytes for role, part in weights.items() if role not in RELEASED)
    return CONTEXT_BYTES + max(start, left + work.host_bytes)


def _estimate_8bit(work: ClipWork, device: Device, precision: Precision) -> Option:
    """All weights resident, those of the transformers in 8 bits."""
    stages = {
        name: replace(stage, is_float8=name in ("stage1", "stage2"))
        for name, stage in work.stages.items()
    }
    faster = replace(work, stages=stages)
    plain = estimate(work, device, precision, "resident")
    return replace(
        plain,
        placement="8-bit",
        seconds=_all_seconds(faster, device, precision, is_streamed=False),
        peak_device_bytes=_peaks(work, is_streamed=False, is_8bit=True),
        is_available=False,
    )


def _fits(option: Option, budget: float) -> bool:
    return option.is_available and option.peak_device_bytes["peak"] <= budget


def _rounded(values: dict[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in values.items()}
