"""``swifti2v serve``: videos over HTTP."""

import ipaddress
from pathlib import Path
from typing import Annotated

import typer

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.models_dir import ModelsDir
from swifti2v.cli.options import Placement
from swifti2v.errors import InputError
from swifti2v.units import GB

Models = Annotated[
    list[str] | None,
    typer.Option(help="Model to serve (default nano); may be given more than once."),
]
DataDirectory = Annotated[Path, typer.Option(help="Folder of jobs, videos and keys.")]
LoraDirectory = Annotated[
    Path | None, typer.Option(help="Folder whose .safetensors may be asked for by name.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
Debug = Annotated[bool, typer.Option("--debug", help="Log every request; show tracebacks.")]
DATA_DIRECTORY = Path("swifti2v-data")


def serve(
    model: Models = None,
    models_dir: ModelsDir = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")] = 8000,
    data_dir: DataDirectory = DATA_DIRECTORY,
    lora_dir: LoraDirectory = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="Number type of the weights.")] = None,
    placement: Annotated[Placement | None, typer.Option(help="Place of the weights.")] = None,
    memory: Annotated[
        float | None,
        typer.Option(help="GB of weights that stay loaded (default half of the device's memory)."),
    ] = None,
    queue_size: Annotated[int, typer.Option(help="Jobs that may wait.")] = 64,
    jobs_per_key: Annotated[int, typer.Option(help="Unfinished jobs of one API key.")] = 16,
    upload_mb: Annotated[int, typer.Option(help="Most MB of a request.")] = 64,
    keep_hours: Annotated[float, typer.Option(help="Hours that a finished job is kept.")] = 24,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Another name by which the server is called; * for any."),
    ] = None,
    allow_url_host: Annotated[
        list[str] | None, typer.Option(help="Host whose URLs input_reference may name.")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log prompts.")] = False,
    new_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Make an API key, print it once and stop.")
    ] = None,
    revoke_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Forget an API key and stop.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Make videos for clients: OpenAI's video API, streams, and jobs that survive."""
    del models_dir  # read from the environment
    with exit_codes(debug=debug):
        _require_package()
        from swifti2v.models.loading.sources import find_model
        from swifti2v.serving.data_dir import DataDir
        from swifti2v.serving.keys import Keys
        from swifti2v.serving.server import run_server
        from swifti2v.serving.settings import Limits, ServerSettings

        keys = Keys(DataDir(data_dir).keys)
        if new_key is not None:
            typer.echo(keys.add(new_key))
            return
        if revoke_key is not None:
            keys.revoke(revoke_key)
            return
        if not is_loopback(host) and not keys:
            raise InputError(
                f"--host {host} is not this machine alone, and there is no API key: make one with "
                "swifti2v serve --new-key NAME"
            )
        for name in model or ():
            find_model(name)
        own = ServerSettings(data_dir=data_dir)
        settings = ServerSettings(
            data_dir=data_dir.absolute(),
            models=tuple(model or own.models),
            lora_dir=lora_dir,
            device=device,
            dtype=dtype,
            placement=placement.value if placement else None,
            memory_bytes=round(memory * GB) if memory is not None else None,
            hosts=(*own.hosts, host, *(allow_host or ())),
            url_hosts=tuple(allow_url_host or ()),
            logs_prompts=log_prompts,
            limits=Limits(
                queue_size=queue_size,
                jobs_per_key=jobs_per_key if keys else queue_size + 1,
                upload_bytes=upload_mb * 1024**2,
                keep_seconds=round(keep_hours * 3600),
            ),
        )
        run_server(settings, host, port, debug=debug)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _require_package() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is missing: pip install 'swifti2v[serve]'") from None
