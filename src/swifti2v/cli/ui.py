"""``swifti2v ui``: the page of ``swifti2v serve`` in the browser."""

import socket
import threading
import time
import webbrowser
from typing import Annotated

import typer

from swifti2v.cli.models_dir import ModelsDir
from swifti2v.cli.serve import (
    DATA_DIRECTORY,
    DataDirectory,
    Debug,
    Device,
    LoraDirectory,
    Models,
    serve,
)

LOCAL = "127.0.0.1"


def ui(
    model: Models = None,
    models_dir: ModelsDir = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    data_dir: DataDirectory = DATA_DIRECTORY,
    lora_dir: LoraDirectory = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Start the server on this machine and open its page in the browser; Ctrl-C ends it."""
    del models_dir  # read from the environment
    if listens(port):
        open_page(port)  # one that runs already; its data dir has one server only
        return
    threading.Thread(target=_open_when_ready, args=(port,), daemon=True).start()
    serve(model=model, port=port, data_dir=data_dir, lora_dir=lora_dir, device=device, debug=debug)


def listens(port: int) -> bool:
    """Whether something answers at a port of this machine."""
    with socket.socket() as client:
        return client.connect_ex((LOCAL, port)) == 0


def open_page(port: int) -> None:
    """Open the page, and say where it is: not every machine has a browser."""
    address = f"http://{LOCAL}:{port}/"
    typer.echo(f"The page is at {address}", err=True)
    webbrowser.open(address)


def _open_when_ready(port: int) -> None:
    while not listens(port):  # the thread ends with the server that does not start
        time.sleep(0.2)
    open_page(port)
