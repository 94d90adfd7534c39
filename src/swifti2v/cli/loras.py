"""LoRAs that a command line names."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from swifti2v.errors import InputError

if TYPE_CHECKING:
    from swifti2v.cli.settings import Stage


class LoraArgument(NamedTuple):
    """What ``--lora`` says."""

    stage: "Stage"
    """Where it is merged."""
    path: Path
    """As it was given; it exists."""
    strength: float
    """Factor on its deltas."""


def parse_lora(text: str, default: "Stage" = "stage1") -> LoraArgument:
    """Read ``[stage1=|stage2=]PATH[:STRENGTH]``.

    Args:
        text: Of the command line.
        default: The stage if it is not said.

    Raises:
        InputError: It is none, or there is no such file.
    """
    from swifti2v.models.lora import parse_lora_argument

    named: tuple[Stage, ...] = ("stage1", "stage2")
    stage = next((name for name in named if text.startswith(f"{name}=")), default)
    path, strength = parse_lora_argument(text.removeprefix(f"{stage}="))
    if not path.exists():
        raise InputError(f"LoRA {path} does not exist; check the path")
    return LoraArgument(stage, path, strength)
