"""LoRAs that a command line names."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from swifti2v.errors import InputError

if TYPE_CHECKING:
    from swifti2v.jobs.settings import Stage
    from swifti2v.models.sources import LoraSource

LORA_FORM = "PATH[:STRENGTH][:partial]"
"""How ``--lora`` is written where there is one stage."""
STAGED_LORA_FORM = f"[stage1=|stage2=]{LORA_FORM}"
LORA_HELP = "partial merges what fits instead of refusing the file. May be given more than once."
PARTIAL = ":partial"


class LoraArgument(NamedTuple):
    """What ``--lora`` says."""

    stage: "Stage"
    """Where it is merged."""
    path: Path
    """As it was given; it exists."""
    strength: float
    """Factor on its deltas."""
    allow_partial: bool
    """Whether layers that do not fit are left out."""

    def to_source(self) -> "LoraSource":
        """For loading."""
        from swifti2v.models.sources import LoraSource

        return LoraSource(
            path=str(self.path), strength=self.strength, allow_partial=self.allow_partial
        )


def parse_lora(
    text: str, default: "Stage" = "stage1", find: Callable[[Path], Path] = Path
) -> LoraArgument:
    """Read ``[stage1=|stage2=]PATH[:STRENGTH][:partial]``.

    Args:
        text: Of the command line.
        default: The stage if it is not said.
        find: Where a path is that is not in the current folder.

    Raises:
        InputError: It is none, or there is no such file.
    """
    named: tuple[Stage, ...] = ("stage1", "stage2")
    stage = next((name for name in named if text.startswith(f"{name}=")), default)
    rest = text.removeprefix(f"{stage}=")
    name, strength = _split_strength(rest.removesuffix(PARTIAL))
    if not name or not math.isfinite(strength):
        raise InputError(f"LoRA {text!r} is not {LORA_FORM}, as lora.safetensors:0.8")
    path = find(Path(name))
    if not path.exists():
        raise InputError(f"LoRA {path} does not exist; check the path")
    return LoraArgument(stage, path, strength, rest.endswith(PARTIAL))


def _split_strength(text: str) -> tuple[str, float]:
    """The path, and what follows its last colon: 1 if nothing, NaN if it is no number."""
    path, colon, tail = text.rpartition(":")
    if not colon or "/" in tail or "\\" in tail:
        return text, 1.0
    try:
        return path, float(tail)
    except ValueError:
        return path, math.nan
