"""Run the application until SIGINT or SIGTERM."""

import logging
import signal

import uvicorn

from swifti2v.errors import SwiftI2VError
from swifti2v.serving.app import create_app
from swifti2v.serving.settings import ServerSettings

GRACE_SECONDS = 5
"""Until connections are closed that do not end by themselves."""


def run_server(settings: ServerSettings, host: str, port: int) -> None:
    """Serve until a signal comes; the running job is put back at the head of the queue.

    Raises:
        SwiftI2VError: The server did not start; the log says why.
    """
    _log_to_stderr()
    app = create_app(settings, lambda: server.should_exit)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = uvicorn.Server(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises them again once it has ended
    server.run()
    if not server.started:
        raise SwiftI2VError("the server did not start; the lines above say why")


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s server: %(message)s"))
    for name in ("swifti2v", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
