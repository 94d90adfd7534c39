"""SIGINT and SIGTERM, which end a run between two files."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """SIGINT and SIGTERM as ``KeyboardInterrupt``, held back where a file would be left torn."""

    def __init__(self) -> None:
        self._shields = 0
        self._is_pending = False

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Handle both signals within the block (in the main thread; elsewhere as before)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Let the block finish before a signal that comes within it takes effect."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        if self._is_pending and not self._shields:
            self._is_pending = False
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._shields:
            self._is_pending = True
        else:
            raise KeyboardInterrupt
