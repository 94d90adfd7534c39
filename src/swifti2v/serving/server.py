"""Run the application until SIGINT or SIGTERM."""

import logging
import signal
import socket

import uvicorn

from swifti2v.errors import InputError, SwiftI2VError
from swifti2v.serving.app import create_app
from swifti2v.serving.data_dir import DataDir
from swifti2v.serving.settings import ServerSettings

GRACE_SECONDS = 5
"""Until connections are closed that do not end by themselves."""


def run_server(settings: ServerSettings, host: str, port: int, *, debug: bool = False) -> None:
    """Serve until a signal comes; the running job is put back at the head of the queue.

    Args:
        settings: Settings of the server.
        host: Address to listen at.
        port: Port to listen at.
        debug: Log every request.

    Raises:
        SwiftI2VError: The server did not start; the log says why.
    """
    _require_free(settings, host, port)
    _log_to_stderr(logging.DEBUG if debug else logging.INFO)
    failures: list[SwiftI2VError] = []

    def end(error: SwiftI2VError) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(settings, lambda: server.should_exit, end)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=debug,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = uvicorn.Server(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises them again once it has ended
    server.run()
    if failures:
        raise failures[0]
    if not server.started:
        raise SwiftI2VError("the server did not start; the lines above say why")


def _require_free(settings: ServerSettings, host: str, port: int) -> None:
    """Refuse a folder that another server uses, or an address that is taken, before anything starts."""
    with DataDir(settings.data_dir).only_server():
        pass
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host.strip("[]"), port), family=family).close()
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port} cannot be listened at ({error.strerror or error}); choose "
            "another port, or end the program that has it"
        ) from None


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s server: %(message)s"))
    for name in ("swifti2v", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
