"""The device that a command line names."""

from typing import TYPE_CHECKING

from swifti2v.errors import ConfigError

if TYPE_CHECKING:
    import torch


def find_device(name: str | None) -> "torch.device | None":
    """The device of a name, if it is there; None stays None: the caller chooses.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``.

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
        raise ConfigError(f"device {name!r} is not there: {count} CUDA devices are; use cpu")
    return device


def choose_device(name: str | None) -> "torch.device":
    """The device of a name; without one the first GPU, else the CPU.

    Raises:
        ConfigError: See ``find_device``.
    """
    import torch

    best = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return find_device(name) or best
