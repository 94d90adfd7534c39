"""``swifti2v verify``: whether a model works on this machine, and what is off where it does not."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.options import Placement, RunDtype

if TYPE_CHECKING:
    from rich.table import Table

    from swifti2v.evaluation.verify.report import Report

STYLES = {"ok": "green", "off": "bold red", "skipped": "yellow"}


def verify(
    model: Annotated[
        str, typer.Option(help="Model: nano, paper, a YAML preset, a directory or a Hub id.")
    ] = "nano",
    image: Annotated[
        Path | None, typer.Option(help="Photo for the checks (default a drawn one).")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N (default the first GPU).")
    ] = None,
    dtype: Annotated[RunDtype | None, typer.Option(help="Number type of the weights.")] = None,
    placement: Annotated[
        Placement | None,
        typer.Option(help="Placement of the weights (default the fastest that fits)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")] = False,
) -> None:
    """Check files, LoRAs, encoders, VAEs, denoising and a short clip of a model; exit 1 if one is off.

    Nothing is downloaded. The report names no file, folder or prompt of yours: post it with an issue.
    """
    with exit_codes(debug=debug):
        import json

        import torch

        from swifti2v.evaluation.verify.report import verify as run
        from swifti2v.jobs.devices import choose_device, find_dtype
        from swifti2v.media import load_image

        chosen = choose_device(device)
        usual = "bfloat16" if chosen.type == "cuda" else "float32"
        report = run(
            model,
            device=chosen,
            dtype=getattr(torch, find_dtype(dtype, chosen) or usual),
            placement=placement.value if placement else None,
            image=load_image(image) if image else None,
            on_finding=None
            if as_json
            else lambda finding: typer.echo(f"{finding.check}: {finding.status}", err=True),
        )
        if as_json:
            typer.echo(json.dumps(report.to_dict()))
        else:
            _print(report)
    if not report.is_good:
        raise typer.Exit(1)


def _print(report: "Report") -> None:
    from rich.console import Console

    console = Console()
    console.print(_make_table(report))
    facts = ", ".join(f"{name} {value}" for name, value in report.environment.items() if value)
    console.print(f"{report.model}: {facts}; {report.seconds:.1f} s")
    count = sum(finding.status == "off" for finding in report.findings)
    console.print("nothing is off" if report.is_good else f"{count} checks are off")


def _make_table(report: "Report") -> "Table":
    from rich.table import Table

    table = Table("check", "", "found", "expected, or the likely cause")
    for finding in report.findings:
        style = STYLES[finding.status]
        table.add_row(
            finding.check,
            f"[{style}]{finding.status}[/{style}]",
            _describe(finding.values),
            finding.cause or finding.expected,
        )
    return table


def _describe(values: Any) -> str:
    return "\n".join(f"{name} {value}" for name, value in values.items())
