"""``swifti2v plan``: seconds and memory of a clip on a machine, before anything is downloaded."""

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.flags import COMMAND_LINE, naming_flags
from swifti2v.cli.models_dir import ModelsDir

if TYPE_CHECKING:
    from swifti2v.planning.keeping import Keeping
    from swifti2v.planning.plans import Plan


class Precision(StrEnum):
    """Number type of the weights, see ``swifti2v.planning.devices``."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Linear(StrEnum):
    """See ``SpeedConfig.linear``."""

    PLAIN = "plain"
    FLOAT8 = "float8"
    INT8 = "int8"


def plan(
    model: Annotated[
        str,
        typer.Option(
            help="Model: nano, paper, a YAML preset, a directory or a Hub id; paper:fp8 takes "
            "smaller files."
        ),
    ] = "paper",
    models_dir: ModelsDir = None,
    device: Annotated[
        str,
        typer.Option(
            help="Card: rtx3060, rtx3090, rtx4060ti, rtx4070, rtx4080, rtx4090, rtx5070ti, rtx5080, "
            "rtx5090, l40s, a100, h100, h200; cpu and auto measure this machine."
        ),
    ] = "auto",
    height: Annotated[int | None, typer.Option(help="Output height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Output width in pixels.")] = None,
    num_frames: Annotated[
        int | None, typer.Option(help="Frames of the video: 4k + 1, such as 33 or 81.")
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="Number type of the weights (default bfloat16, on a CPU float32)."),
    ] = None,
    linear: Annotated[
        Linear | None,
        typer.Option(
            help="Linear layers of both transformers, see speed.linear (default the model's)."
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="auto|GB",
            help="Device memory to use (default all of it); auto takes the free memory now, "
            "all of a named card's.",
        ),
    ] = None,
    host_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB",
            help="Host memory (default this machine's, with a named card any).",
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="Files whose plan is shown in full, such as bf16, fp8 or gguf-q4; the last two "
            "stay packed (default those that --model names)."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Predict time and memory of each placement, and say which one to take."""
    del models_dir  # read from the environment
    with exit_codes(debug=debug):
        sizes = {"height": height, "width": width, "num_frames": num_frames}
        given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        if linear is not None:
            speed = {"speed": {"linear": linear.value}}
            given |= {"stage1": speed, "stage2": speed}
        from swifti2v.models.loading.sources import find_model, in_variant, split_variant

        base, named = split_variant(model)
        shown = variant or named
        find_model(in_variant(base, shown))  # there is such a variant
        with naming_flags():
            plans = _make(base, device, given, precision, memory, host_memory)
        if as_json:
            import json

            others = {name: _summarize(plan) for name, plan in plans.items()}
            typer.echo(json.dumps({**plans[shown].to_dict(), "variants": others}))
        else:
            lines = [*describe(plans[shown], given), "", *_compare(plans)]
            typer.echo("\n".join(lines))


def _make(
    model: str,
    device_name: str,
    given: dict[str, Any],
    asked: Precision | None,
    memory: str | None,
    host_memory: float | None,
) -> "dict[str, Plan]":
    """Plans from the files of each variant."""
    from swifti2v.jobs.devices import has_gpu
    from swifti2v.jobs.layers import resolve_config
    from swifti2v.models.loading.sources import find_model
    from swifti2v.planning.devices import PRECISIONS, find_device
    from swifti2v.planning.plans import make_plan
    from swifti2v.planning.stored import StoredCosts, find_costs
    from swifti2v.planning.variants import in_variant

    is_cpu = device_name == "cpu" or (device_name == "auto" and not has_gpu())
    usual = Precision.FLOAT32 if is_cpu else Precision.BFLOAT16
    precision = next(name for name in PRECISIONS if name == (asked or usual))
    device = find_device(device_name, precision)
    config = resolve_config(model, [(COMMAND_LINE, given)])
    budget = _read_budget(memory, device_name, is_cpu=is_cpu)
    host = _read_host_budget(host_memory, device_name, is_cpu=is_cpu)
    costs = find_costs(model, config, precision)
    if not isinstance(costs, StoredCosts):
        typer.echo(f"counting the work of a clip of {model} in {precision}: minutes", err=True)
    index, _ = find_model(model)
    return {
        variant: make_plan(
            in_variant(costs, index, variant), device, precision, budget, host_bytes=host
        )
        for variant in index.variants()
    }


def _read_host_budget(given: float | None, device_name: str, *, is_cpu: bool) -> float | None:
    """Bytes of host memory that may be used; None for any, and on a CPU, where they are the device's."""
    from swifti2v.errors import ConfigError
    from swifti2v.planning.devices import DEVICES
    from swifti2v.units import GB

    if given is not None and not 0 < given < math.inf:
        raise ConfigError(f"--host-memory {given:g} is not a number of GB above 0")
    if is_cpu or (given is None and device_name in DEVICES):
        return None
    if given is not None:
        return given * GB
    import torch

    from swifti2v.planning.measurement import memory_bytes

    return memory_bytes(torch.device("cpu"))


def _read_budget(memory: str | None, device_name: str, *, is_cpu: bool) -> float | None:
    """Bytes that may be used; None for all that the device has."""
    from swifti2v.planning.devices import DEVICES
    from swifti2v.units import parse_gigabytes

    if memory is None or (memory == "auto" and device_name in DEVICES):
        return None
    if memory != "auto":
        return parse_gigabytes(memory)
    import torch

    from swifti2v.planning.measurement import free_bytes

    return free_bytes(torch.device("cpu" if is_cpu else "cuda"))


def describe(plan: "Plan", given: dict[str, Any]) -> list[str]:
    """A plan for people: what and where, then every option by stage, then the choice."""
    from swifti2v.planning.costs import STAGES
    from swifti2v.units import GB, format_bytes

    size = ", ".join(f"{k} {v}" for k, v in given.items() if not isinstance(v, dict))
    flops = ", ".join(f"{name} {_tera(plan.flops[name])}" for name in (*STAGES, "total"))
    lines = [
        f"{plan.model} on {plan.device}, {plan.precision}{', ' if size else ''}{size}",
        f"work in TFLOP: {flops}",
        "",
        f"{'':34}{''.join(f'{name:>11}' for name in (*STAGES, 'in all'))}",
    ]
    for option in plan.options:
        mark = "*" if option is plan.chosen else " " if option.is_available else "-"
        seconds = [option.seconds[name] for name in (*STAGES, "total")]
        peaks = [option.peak_device_bytes[name] / GB for name in (*STAGES, "peak")]
        lines += [
            f"{mark} {option!s:26}{'s':>6}{''.join(f'{value:11.1f}' for value in seconds)}",
            f"{'':28}{'GB':>6}{''.join(f'{value:11.2f}' for value in peaks)}",
        ]
    shown = plan.chosen or plan.smallest
    return [
        *lines,
        "- changes the frames, so it is never chosen (--linear float8); in all: sum of the seconds, "
        "most of the memory",
        "",
        f"{'chosen' if plan.chosen else 'does not fit'}: {plan.why}",
        f"host memory {format_bytes(shown.host_bytes)}, weights {format_bytes(plan.disk_bytes)}; "
        "predicted from assumed efficiencies, loading and file writing not included",
    ]


def _summarize(plan: "Plan") -> dict[str, Any]:
    """The choice of a plan, as plain values."""
    shown = plan.chosen or plan.smallest
    return {
        "fits": plan.chosen is not None,
        "placement": shown.placement,
        "vae_tile": shown.vae_tile,
        "seconds": shown.seconds["total"],
        "peak_device_bytes": round(shown.peak_device_bytes["peak"]),
        "host_bytes": round(shown.host_bytes),
        "disk_bytes": round(plan.disk_bytes),
        "kept": _keeping(plan).why,
    }


def _keeping(plan: "Plan") -> "Keeping":
    """Whether a server would keep the model loaded in the placement that is shown."""
    from swifti2v.planning.keeping import Room, decide_keeping

    shown = plan.chosen or plan.smallest
    if shown.placement == "resident":
        return decide_keeping(plan.disk_bytes, Room("device", plan.budget_bytes))
    return decide_keeping(plan.disk_bytes, Room("host", plan.host_budget_bytes or math.inf))


def _compare(plans: "Mapping[str, Plan]") -> list[str]:
    """Device and host memory of each variant, a line each."""
    from swifti2v.units import GB

    lines = [
        f"{'files':10}{'fits':>6}{'seconds':>9}{'device GB':>11}{'host GB':>9}{'weights GB':>12}"
    ]
    for name, plan in plans.items():
        shown = plan.chosen or plan.smallest
        lines.append(
            f"{name:10}{'yes' if plan.chosen else 'no':>6}{shown.seconds['total']:9.1f}"
            f"{shown.peak_device_bytes['peak'] / GB:11.2f}{shown.host_bytes / GB:9.2f}"
            f"{plan.disk_bytes / GB:12.2f}  {shown}; in a server {_keeping(plan).why}"
        )
    return lines


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.2f}"
