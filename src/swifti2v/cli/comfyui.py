"""``swifti2v comfyui``: the nodes for ComfyUI."""

from pathlib import Path
from typing import Annotated

import typer

from swifti2v.cli.failures import exit_codes

comfyui_app = typer.Typer(no_args_is_help=True, help="Nodes for ComfyUI.")


@comfyui_app.callback()
def comfyui() -> None:
    """Nodes for ComfyUI."""


@comfyui_app.command()
def install(
    directory: Annotated[
        Path, typer.Argument(help="ComfyUI's folder: the one that holds custom_nodes and models.")
    ],
) -> None:
    """Link the nodes into a ComfyUI folder; prints the link.

    ComfyUI must run with the Python that this package is installed for. Remove the link to
    uninstall the nodes.
    """
    with exit_codes(debug=False):
        from swifti2v.comfyui.install import install as link_nodes

        typer.echo(str(link_nodes(directory)))
