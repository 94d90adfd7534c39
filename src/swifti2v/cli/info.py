"""``swifti2v info``: the settings a video was made with."""

from pathlib import Path
from typing import Annotated

import typer

from swifti2v.cli.failures import exit_codes


def info(
    video: Annotated[Path, typer.Argument(help="A video made by this program.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Print the settings that are stored in a video; 'generate --like' repeats them."""
    with exit_codes(debug=debug):
        import json

        import yaml

        from swifti2v.jobs.settings import read_settings

        settings = read_settings(video)
        if as_json:
            typer.echo(settings.to_json())
        else:
            values = json.loads(settings.to_json())
            typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip())
