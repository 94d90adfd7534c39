"""``--models-dir``: a folder of files to use before the Hub is asked."""

import os
from pathlib import Path
from typing import Annotated

import typer

from swifti2v.models.loading.models_dir import VARIABLE


def use_models_dir(context: typer.Context, folder: Path | None) -> Path | None:
    """Let the command and its processes look into a folder; the environment is restored after it."""
    if folder is not None:
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = str(folder.expanduser().absolute())
        context.call_on_close(lambda: _restore(before))
    return folder


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = before


def models_environment() -> dict[str, str]:
    """The folder as a variable for processes of other machines; empty without one."""
    folder = os.environ.get(VARIABLE)
    return {VARIABLE: folder} if folder else {}


ModelsDir = Annotated[
    Path | None,
    typer.Option(
        "--models-dir",
        envvar=VARIABLE,
        callback=use_models_dir,
        help="Folder with files of models, such as ComfyUI/models, used before the Hub is asked.",
    ),
]
