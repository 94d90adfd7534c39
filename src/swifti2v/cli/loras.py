"""LoRAs that a command line names."""

import math
from typing import get_args

from swifti2v.config import StageName
from swifti2v.errors import InputError
from swifti2v.models.loading.sources import LoraSource

LORA_FORM = "PATH[:STRENGTH][:partial]"
"""Form of ``--lora`` for commands with one stage."""
STAGED_LORA_FORM = f"[stage1=|stage2=]{LORA_FORM}"
LORA_HELP = "partial merges what fits instead of refusing the file. May be given more than once."
PARTIAL = ":partial"


def parse_lora(text: str, default: StageName = "stage1") -> LoraSource:
    """Read ``[stage1=|stage2=]PATH[:STRENGTH][:partial]``.

    Raises:
        InputError: It is of another form.
    """
    named: tuple[StageName, ...] = get_args(StageName)
    stage = next((name for name in named if text.startswith(f"{name}=")), default)
    rest = text.removeprefix(f"{stage}=")
    path, strength = _split_strength(rest.removesuffix(PARTIAL))
    if not path or not math.isfinite(strength):
        raise InputError(f"LoRA {text!r} is not {LORA_FORM}, as lora.safetensors:0.8")
    is_partial = rest.endswith(PARTIAL)
    return LoraSource(path=path, strength=strength, allow_partial=is_partial, stage=stage)


def _split_strength(text: str) -> tuple[str, float]:
    """The path, and what follows its last colon: 1 if nothing, NaN if it is no number."""
    path, colon, tail = text.rpartition(":")
    if not colon or "/" in tail or "\\" in tail:
        return text, 1.0
    try:
        return path, float(tail)
    except ValueError:
        return path, math.nan
