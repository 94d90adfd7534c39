"""The command line; every command is a small file of its own."""

from typing import Annotated

import typer

from swifti2v import __version__
from swifti2v.cli.batch import batch
from swifti2v.cli.bench import bench_app
from swifti2v.cli.cache import cache
from swifti2v.cli.comfyui import comfyui_app
from swifti2v.cli.compare import compare_app
from swifti2v.cli.configs import configs_app
from swifti2v.cli.data import data_app
from swifti2v.cli.doctor import doctor
from swifti2v.cli.evaluate import evaluate
from swifti2v.cli.export import models_app
from swifti2v.cli.generate import generate
from swifti2v.cli.index import index
from swifti2v.cli.info import info
from swifti2v.cli.model_files import download, scan
from swifti2v.cli.plan import plan
from swifti2v.cli.refine import refine
from swifti2v.cli.serve import serve
from swifti2v.cli.threads import limit_threads
from swifti2v.cli.train import train_app
from swifti2v.cli.transition import transition
from swifti2v.cli.ui import ui
from swifti2v.cli.upscale import upscale
from swifti2v.cli.vbench import vbench_app
from swifti2v.cli.verify import verify

app = typer.Typer(
    name="swifti2v",
    help="One photo and a prompt become a native 2K video.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (generate, refine, upscale, batch, plan, info, doctor, verify, evaluate, serve, ui):
    app.command()(command)
for command in (index, transition, cache):
    data_app.command()(command)
for command in (scan, download):
    models_app.command()(command)
app.add_typer(configs_app, name="configs")
app.add_typer(models_app, name="models")
app.add_typer(data_app, name="data")
app.add_typer(train_app, name="train")
app.add_typer(bench_app, name="bench")
app.add_typer(vbench_app, name="vbench")
app.add_typer(compare_app, name="compare")
app.add_typer(comfyui_app, name="comfyui")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"swifti2v {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """One photo and a prompt become a native 2K video."""
    del version
    limit_threads()  # before a command loads PyTorch
