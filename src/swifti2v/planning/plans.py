"""Does a clip fit, with which placement, and how long will it take: counted work over known rates."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import Any, Literal

from swifti2v.errors import ConfigError
from swifti2v.models.runtime.roles import IMAGE, PARTS, STAGE1, STAGE2, TEXT, Placement
from swifti2v.models.vae.tiles import count_tiles
from swifti2v.planning.costs import (
    STAGES,
    ClipCosts,
    ClipWork,
    CountedStage,
    StageWork,
)
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
PASSING_BYTES = 2.2 * GB
"""Host memory of the largest weight on its way to the device, the embedding of UMT5-XXL in bfloat16; the
mapped file takes none that the system cannot take back."""
PIECE_BYTES = 2**30
"""Pinned memory that is filled while the weights that go there are still held."""
LOADED: dict[CountedStage, tuple[tuple[str, ...], ...]] = {
    "text": (TEXT,),
    "image": (IMAGE, STAGE1),
    "stage1": (STAGE1,),
    "reference": (STAGE2,),
    "stage2": (STAGE2,),
    "decode": (STAGE2,),
}
"""Components that a staged run has in memory together, one group after the other, by stage."""
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
    host_budget_bytes: float | None
    """Host memory that may be used; None if any."""
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
        if self.host_budget_bytes is not None:
            room += f" with {format_bytes(self.host_budget_bytes)} of host memory"
        if self.chosen is None:
            needed = format_bytes(self.smallest.peak_device_bytes["peak"])
            if self.host_budget_bytes is not None:
                needed += f" with {format_bytes(self.smallest.host_bytes)}"
            return f"nothing fits into {room}: the smallest, {self.smallest}, needs {needed}"
        faster = [
            option
            for option in self.options
            if option.is_available and option.seconds["total"] < self.chosen.seconds["total"]
        ]
        needs = [
            f"{item} needs {format_bytes(item.peak_device_bytes['peak'])}"
            + (
                f" and {format_bytes(item.host_bytes)} of host memory"
                if self.is_over_host(item)
                else ""
            )
            for item in faster[:3]
        ]
        reason = f" ({'; '.join(needs)})" if needs else ""
        return f"{self.chosen}: the fastest that fits into {room}{reason}"

    def is_over_host(self, option: Option) -> bool:
        """Whether an option needs more host memory than may be used."""
        return self.host_budget_bytes is not None and option.host_bytes > self.host_budget_bytes

    def require_fit(self) -> Option:
        """The chosen option.

        Raises:
            ConfigError: None fits; the message says what would.
        """
        if self.chosen is None:
            needed = ceil(10 * self.smallest.peak_device_bytes["peak"] / GB) / 10
            remedy = f"give {needed:.1f} GB or more"
            if self.is_over_host(self.smallest):
                remedy = "take smaller files of the model (a variant such as fp8)"
            raise ConfigError(
                f"{self.why}; {remedy}, a smaller size, or fewer frames in a segment (--segment-size)"
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
            "host_budget_bytes": None
            if self.host_budget_bytes is None
            else round(self.host_budget_bytes),
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
    keeps: bool = False
    """Whether all models stay loaded, as between the jobs of a server; else a clip has one part of them
    in memory at a time, see ``swifti2v.models.runtime.staging``."""


def make_plan(
    costs: ClipCosts,
    device: Device,
    precision: Precision,
    budget_bytes: float | None = None,
    wish: Wish | None = None,
    host_bytes: float | None = None,
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
        host_bytes: Host memory that may be used; None for any.

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
    too_large: set[Placement] = set()  # whatever the tiles
    for tile, placement in product(tiles, placements):
        if tile != tiles[0] and any(_fits(option, budget, host_bytes) for option in options):
            break
        if placement in too_large:
            continue
        work = costs.count(tile, offloads_history=placement == "offloaded")
        options.append(estimate(work, device, precision, placement, keeps=wish.keeps))
        if _is_too_large(options[-1], budget, host_bytes):
            too_large.add(placement)
        works[id(options[-1])] = work
    fitting = [option for option in options if _fits(option, budget, host_bytes)]
    smallest = min(options, key=lambda option: option.peak_device_bytes["peak"])
    chosen = min(fitting, key=lambda option: option.seconds["total"], default=None)
    shown = chosen or smallest
    if not device.is_cpu and linear <= {"plain"}:
        first = works[id(options[0])]
        options.append(_estimate_8bit(first, device, precision, keeps=wish.keeps))
    work = works[id(shown)]
    return Plan(
        model=costs.name,
        device=device.name,
        precision=precision,
        budget_bytes=budget,
        asked_bytes=asked,
        host_budget_bytes=host_bytes,
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


def estimate(
    work: ClipWork,
    device: Device,
    precision: Precision,
    placement: Placement,
    *,
    keeps: bool = False,
) -> Option:
    """Time and memory of a clip in one placement.

    A stage takes the time of its matrix products, attention, convolutions and remaining memory
    traffic, one after the other. The host searches motion for carried detail at the same time. Streamed weights are copied while a block computes, so the longer
    of the two counts; the causal history is not.

    Args:
        work: Counted with ``offloads_history`` as the placement says.
        device: Device that computes.
        precision: Number type of the weights.
        placement: Where they live.
        keeps: See ``Wish``.
    """
    is_streamed = placement != "resident"
    return Option(
        placement=placement,
        vae_tile=work.vae_tile,
        seconds=_all_seconds(work, device, precision, is_streamed=is_streamed),
        peak_device_bytes=_peaks(work, is_streamed=is_streamed, keeps=keeps),
        host_bytes=_host_bytes(work, device, is_streamed=is_streamed, keeps=keeps),
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


def _peaks(
    work: ClipWork, *, is_streamed: bool, keeps: bool, is_8bit: bool = False
) -> dict[str, float]:
    """Device memory by stage: weights, activations and the history that other stages keep."""
    kept = {name: work.stages[name].count.kept_bytes for name in STAGES}
    peaks: dict[str, float] = {}
    for name in STAGES:
        stage = work.stages[name]
        groups = (tuple(work.weights),) if keeps else LOADED[name]
        weights = max(_device_bytes(work, group, stage, is_streamed, is_8bit) for group in groups)
        waiting = 0.0
        if name in ("reference", "stage2", "decode"):  # they take turns, segment by segment
            waiting = sum(kept.values()) - kept[name]
        activations = SLACK * (stage.count.peak_bytes + waiting)
        peaks[name] = CONTEXT_BYTES + activations + (weights if stage.passes else 0)
    return {**peaks, "peak": max(peaks.values())}


def _device_bytes(
    work: ClipWork, roles: Sequence[str], stage: StageWork, is_streamed: bool, is_8bit: bool
) -> float:
    """Weights on the device while some components are loaded and those of a stage compute."""
    loaded = work.loaded(roles)
    if not is_streamed:
        return sum(
            part.num_bytes * (0.5 if is_8bit and role.endswith("transformer") else 1)
            for role, part in loaded.items()
        )
    streamed = [part.streamed_bytes for role, part in loaded.items() if role in stage.passes]
    return max(streamed, default=0) + sum(p.num_bytes for p in loaded.values() if p.stays)


def _host_bytes(work: ClipWork, device: Device, *, is_streamed: bool, keeps: bool) -> float:
    """Most host memory at a time."""
    weights = work.weights
    if device.is_cpu:
        return _peaks(work, is_streamed=False, keeps=keeps)["peak"] + work.host_bytes
    if not is_streamed:
        largest = max(part.num_bytes for part in weights.values())
        return CONTEXT_BYTES + min(PASSING_BYTES, largest) + work.host_bytes
    parts = (tuple(weights),) if keeps else PARTS
    peaks = []
    for roles in parts:
        loaded = [part for part in work.loaded(roles).values() if not part.stays]
        pinned = sum(part.pinned_bytes for part in loaded)
        loading = max((part.num_bytes for part in loaded), default=0) + PIECE_BYTES
        computing = pinned + (work.host_bytes if "stage2_vae" in roles else 0)
        peaks.append(max(computing, loading if loaded else 0))
    return CONTEXT_BYTES + max(peaks)


def _estimate_8bit(work: ClipWork, device: Device, precision: Precision, *, keeps: bool) -> Option:
    """Weights resident, those of the transformers in 8 bits."""
    stages = {
        name: replace(stage, is_float8=name in ("stage1", "stage2"))
        for name, stage in work.stages.items()
    }
    faster = replace(work, stages=stages)
    plain = estimate(work, device, precision, "resident", keeps=keeps)
    return replace(
        plain,
        placement="8-bit",
        seconds=_all_seconds(faster, device, precision, is_streamed=False),
        peak_device_bytes=_peaks(work, is_streamed=False, keeps=keeps, is_8bit=True),
        is_available=False,
    )


def _is_too_large(option: Option, budget: float, host_budget: float | None) -> bool:
    """Whether smaller tiles of Stage II's VAE cannot make an option fit."""
    before = max(option.peak_device_bytes[name] for name in ("text", "image", "stage1"))
    is_over = host_budget is not None and option.host_bytes > host_budget
    return is_over or before > budget


def _fits(option: Option, budget: float, host_budget: float | None) -> bool:
    has_host = host_budget is None or option.host_bytes <= host_budget
    return option.is_available and has_host and option.peak_device_bytes["peak"] <= budget


def _rounded(values: dict[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in values.items()}
