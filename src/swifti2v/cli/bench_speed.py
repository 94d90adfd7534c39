"""``swifti2v bench speed``: seconds and memory on this machine, beside diffusers' own classes."""

import sys
from contextlib import nullcontext
from enum import StrEnum
from typing import Annotated

import typer

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.flags import COMMAND_LINE, naming_flags
from swifti2v.cli.options import RunDtype, read_layers
from swifti2v.errors import ConfigError
from swifti2v.jobs.interruption import Interruption


class Rival(StrEnum):
    """Other implementation that makes the clip for comparison."""

    DIFFUSERS = "diffusers"


def speed(
    model: Annotated[
        str, typer.Option(help="Model: nano, paper, a YAML preset, a directory or a Hub id.")
    ] = "nano",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Draw the weights instead of reading them.")
    ] = False,
    stages: Annotated[
        str | None,
        typer.Option(
            help="Parts, with commas between: kernels, stage1, stage2, levers, vae, clip, lengths, "
            "end_to_end, published (default stage1 to lengths)."
        ),
    ] = None,
    against: Annotated[
        Rival | None,
        typer.Option(
            help="Implementation to compare the clip with: diffusers' Stage II transformer."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device: cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[RunDtype | None, typer.Option(help="Number type of the weights.")] = None,
    height: Annotated[int | None, typer.Option(help="Output height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Output width in pixels.")] = None,
    num_frames: Annotated[
        int | None, typer.Option(help="Frames of the video: 4k + 1, such as 33 or 81.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="One setting, as in swifti2v generate."),
    ] = None,
    warmups: Annotated[int, typer.Option(min=0, help="Runs before the measured ones.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Runs whose median is reported.")] = 5,
    cap_gb: Annotated[
        float | None,
        typer.Option(
            help="Leave the run this much of the GPU, as a smaller card would: 24 for 24 GB."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Measure this machine; prints a table in Markdown, or JSON."""
    with exit_codes(debug=debug), Interruption().catch():
        import json

        import torch

        from swifti2v.config import expand_shorthands
        from swifti2v.evaluation.speed.device_cap import capped
        from swifti2v.evaluation.speed.models import Subject
        from swifti2v.evaluation.speed.rows import Machine, to_dict, to_markdown
        from swifti2v.evaluation.speed.suite import USUAL, require_parts, run_parts
        from swifti2v.evaluation.speed.timing import Protocol
        from swifti2v.jobs.devices import choose_device, find_dtype
        from swifti2v.units import GB

        parts = stages.split(",") if stages else list(USUAL)
        require_parts(parts)
        target = choose_device(device)
        usual = "bfloat16" if target.type == "cuda" else "float32"
        kind = getattr(torch, find_dtype(dtype.value if dtype else usual, target) or usual)
        sizes = {"height": height, "width": width, "num_frames": num_frames}
        layers = [(COMMAND_LINE, expand_shorthands(sizes)), *read_layers(None, set_)]
        if cap_gb is not None and cap_gb <= 0:
            raise ConfigError(f"--cap-gb {cap_gb:g} leaves nothing; give a positive number of GB")
        cap = nullcontext() if cap_gb is None else capped(int(cap_gb * GB), target)
        with cap:
            with naming_flags(layers):
                subject = Subject.make(model, target, kind, layers, is_random=random_weights)
            rows = run_parts(
                parts,
                subject,
                Protocol(warmups=warmups, repeats=repeats),
                lambda row: typer.echo("  ".join(row.cells()), err=True),
                against=against is not None,
            )
            machine = Machine.here(target)
        arguments = ["swifti2v", *sys.argv[1:]]
        if as_json:
            typer.echo(json.dumps(to_dict(rows, machine, arguments)))
        else:
            typer.echo(to_markdown(rows, machine, arguments))
