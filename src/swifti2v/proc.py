"""Memory as Linux tells it under ``/proc``."""

from contextlib import suppress
from pathlib import Path


def read_bytes(file: str, name: str) -> int | None:
    """A number of bytes from a file of ``/proc``, such as ``VmHWM`` of ``self/status``.

    None where there is no such file or line: on other systems.
    """
    with suppress(OSError):
        for line in Path("/proc", file).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
