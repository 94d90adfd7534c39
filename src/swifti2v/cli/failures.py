"""Turn exceptions into exit codes: 1 for an error, 130 for an interruption; typer uses 2."""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from swifti2v.errors import SwiftI2VError

ERROR, INTERRUPTED = 1, 130
LIBRARY_SETTINGS = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # of huggingface_hub and, loading weights, transformers
    "HF_HUB_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}
"""Environment variables that make other packages quiet."""


@contextmanager
def exit_codes(*, debug: bool) -> Iterator[None]:
    """Turn errors of the block, unless debugging, into one line on stderr and an exit code."""
    _print_any_name()
    configure_logging(debug=debug)
    if not debug:
        silence_libraries()
    try:
        yield
    except (SwiftI2VError, OSError, MemoryError) as error:
        if debug:
            raise
        typer.echo(f"error: {describe(error)}", err=True)
        raise typer.Exit(ERROR) from None
    except KeyboardInterrupt as error:
        notes = "; ".join(getattr(error, "__notes__", ())) or "nothing was written"
        typer.echo(f"interrupted: {notes}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _print_any_name() -> None:
    """Print the bytes of file names that are not UTF-8 as they are, whatever the locale."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")


def describe(error: BaseException) -> str:
    """An exception's message and notes as one line, never empty."""
    if isinstance(error, MemoryError):
        text = "out of memory: choose a smaller size"
    elif isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        text = f"{place}{error.strerror}"
    else:
        text = str(error)
    lines = [" ".join(part.split()) for part in (text, *getattr(error, "__notes__", ()))]
    return "; ".join(line for line in lines if line) or type(error).__name__


def configure_logging(*, debug: bool) -> None:
    """Warnings of this package (with ``debug`` everything) as plain lines on stderr.

    What takes long is told of in any case, by ``swifti2v.progress``.
    """
    for name, level, form in (
        ("swifti2v", logging.DEBUG if debug else logging.WARNING, "%(levelname)s: %(message)s"),
        ("swifti2v.progress", logging.INFO, "%(message)s"),
    ):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(form))
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], name == "swifti2v"
        logger.setLevel(level)


def silence_libraries() -> None:
    """Keep other packages' bars, log lines and warnings off stderr, where a run is told of.

    Call it before they are imported. Values set in the environment are kept.
    """
    for name, value in LIBRARY_SETTINGS.items():
        os.environ.setdefault(name, value)
    root = logging.getLogger()
    if not root.handlers:  # else Python itself prints what no handler takes
        root.addHandler(logging.NullHandler())
    logging.captureWarnings(capture=True)
