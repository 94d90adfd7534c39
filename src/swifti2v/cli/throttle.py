"""Lines about a long run, with a pause between them."""

import time

import typer

REPORT_SECONDS = 10.0
"""Seconds between two lines."""


class Throttle:
    """Report the progress of a run on stderr every few seconds."""

    def __init__(self) -> None:
        self._said_at = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line, unless the last one is too recent."""
        if (now := time.monotonic()) - self._said_at >= REPORT_SECONDS:
            self._said_at = now
            typer.echo(text, err=True)
