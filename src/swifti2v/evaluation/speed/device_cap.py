"""A large GPU that behaves like a small one, to try a memory plan: two caps at once."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from swifti2v.errors import ConfigError, SwiftI2VError
from swifti2v.units import MB, format_bytes

OUTSIDE = 700 * MB
"""Memory of a process that PyTorch's allocator does not count: context and libraries. An assumption."""
BALLAST = """
import sys
import torch
cap = int(sys.argv[1])
free, _ = torch.cuda.mem_get_info()
held = torch.empty(max(0, free - cap), dtype=torch.uint8, device="cuda")
print(torch.cuda.mem_get_info()[0], flush=True)
sys.stdin.read()
"""


@contextmanager
def capped(cap_bytes: int, device: torch.device) -> Iterator[None]:
    """Leave this process a card of ``cap_bytes`` of a GPU's memory, before it has used the GPU.

    A second process holds the rest, so that every library sees a small card; and PyTorch's own
    allocator is limited to what the card would leave it beside context and libraries.

    Raises:
        ConfigError: There is no GPU, or it has no more than that.
        SwiftI2VError: The other process failed.
    """
    if device.type != "cuda":
        raise ConfigError("--cap-gb makes a GPU smaller, and this machine has none; leave it out")
    ballast = subprocess.Popen(
        [sys.executable, "-c", BALLAST, str(cap_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert ballast.stdout is not None
        if not ballast.stdout.readline().strip():
            raise SwiftI2VError("the process that holds the rest of the GPU's memory failed")
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(find_fraction(cap_bytes, total), device)
        yield
    finally:
        ballast.communicate()


def find_fraction(cap_bytes: int, total_bytes: int) -> float:
    """Part of the GPU's memory that PyTorch's allocator may take.

    Raises:
        ConfigError: The cap is not between what lies outside the allocator and the whole GPU.
    """
    if not OUTSIDE < cap_bytes < total_bytes:
        raise ConfigError(
            f"a cap of {format_bytes(cap_bytes)} is not between {format_bytes(OUTSIDE)} and the "
            f"{format_bytes(total_bytes)} of this GPU"
        )
    return (cap_bytes - OUTSIDE) / total_bytes
