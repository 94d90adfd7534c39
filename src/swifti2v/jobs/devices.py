"""The device and the number type that a command line names."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from swifti2v.errors import ConfigError

if TYPE_CHECKING:
    import torch


def find_device(name: str | None) -> "torch.device | None":
    """The device of a name such as ``cuda:1``, if it is there; for None the caller chooses.

    Raises:
        ConfigError: The name is unknown, or there is no such device.
    """
    import torch

    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is unknown; use cpu, cuda or cuda:N") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"device {name!r} does not exist: this machine has {count} CUDA devices; use cpu"
        )
    return device


def choose_device(name: str | None) -> "torch.device":
    """The device of a name; without one the first GPU, else the CPU.

    Raises:
        ConfigError: See ``find_device``.
    """
    import torch

    best = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return find_device(name) or best


def has_gpu() -> bool:
    """Whether there is a GPU that PyTorch can use."""
    import torch

    return torch.cuda.is_available()


def find_dtype(asked: str | None, device: "torch.device | None") -> str | None:
    """A number type by name; ``auto`` is resolved, and None stays None."""
    if asked != "auto":
        return asked
    from swifti2v.planning.precision import choose_cpu_precision

    if (device or choose_device(None)).type == "cuda":
        return "bfloat16"
    return choose_cpu_precision(cache_dir() / "cpu_precision.json")


def cache_dir() -> Path:
    """The user's cache, where the desktop convention puts it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swifti2v"
