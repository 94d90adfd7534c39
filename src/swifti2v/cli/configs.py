"""``swifti2v configs``: the configurations that ship with the package."""

import json
from pathlib import Path
from typing import Annotated

import typer

from swifti2v.cli.failures import exit_codes
from swifti2v.jobs.paths import require_new_file
from swifti2v.shipped import require_shipped_config, shipped_configs

configs_app = typer.Typer(no_args_is_help=True, help="List, show and copy shipped configurations.")


@configs_app.callback()
def configs() -> None:
    """List, show and copy the configurations that ship with the package.

    ``--config NAME`` takes a configuration, ``--model NAME`` a preset: ``--model paper``.
    """


@configs_app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """List the configurations by name, each with its purpose."""
    titles = {name: title(file) for name, file in shipped_configs().items()}
    if as_json:
        typer.echo(json.dumps(titles))
        return
    width = max(map(len, titles))
    typer.echo("\n".join(f"{name:{width}}  {text}" for name, text in titles.items()))


@configs_app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name from 'swifti2v configs list'.")],
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Print a configuration."""
    with exit_codes(debug=debug):
        typer.echo(require_shipped_config(name).read_text(encoding="utf-8"), nl=False)


@configs_app.command()
def copy(
    name: Annotated[str, typer.Argument(help="Name from 'swifti2v configs list'.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File to write (default NAME.yaml in this folder)."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Copy a configuration to a file of your own; prints its path."""
    with exit_codes(debug=debug):
        source = require_shipped_config(name)
        path = output or Path(source.name)
        require_new_file(path, ".yaml")
        path.write_bytes(source.read_bytes())
        typer.echo(str(path.resolve()))


def title(file: Path) -> str:
    """First sentence of the comment that a configuration begins with."""
    words: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        words.append(text)
    return " ".join(words).split(". ")[0].removesuffix(".")
