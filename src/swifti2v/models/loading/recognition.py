"""Tell which component of a model a file holds, by the names and shapes of its weights."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from swifti2v.models.loading.architectures import (
    Architecture,
    convert_original,
    keeps_packed,
)
from swifti2v.models.weights.files import outline_weights
from swifti2v.models.weights.packed import PackedWeight, Weight

IGNORED = ("latents_mean", "latents_std")
"""Keys of a VAE's configuration that weights do not tell."""
SIZES = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads",
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
    "patch_size",
)  # fmt: skip
"""Keys of the encoders' configurations that weights tell."""


class Content(NamedTuple):
    """Outline of a file's weights."""

    state: dict[str, Weight]
    kind: str
    """Form of most values, such as ``bfloat16``, ``float8_e4m3fn, scaled`` or ``Q4_K``."""


def read_content(file: Path) -> Content:
    """Read the head of a weight file.

    Raises:
        LoadingError: It is damaged, cut short or in a format that is not read.
    """
    state = outline_weights(file)
    sizes: Counter[str] = Counter()
    for weight in state.values():
        sizes[_describe(weight)] += weight.shape.numel()
    return Content(state, sizes.most_common(1)[0][0] if sizes else "empty")


def _describe(weight: Weight) -> str:
    if not isinstance(weight, PackedWeight):
        return str(weight.dtype).removeprefix("torch.")
    return weight.format if weight.scale is None else f"{weight.format}, scaled"


def identify(role: str, content: Content) -> Architecture:
    """Architecture of the component that a file holds.

    Args:
        role: A key of ``swifti2v.models.loading.architectures.KINDS``.
        content: The file's.

    Raises:
        LoadingError: It holds no such component.
    """
    state = content.state
    if not keeps_packed(role):  # its reader unpacks, which shapes alone need not
        state = {
            key: torch.empty(weight.shape, device="meta")
            if isinstance(weight, PackedWeight)
            else weight
            for key, weight in state.items()
        }
    return convert_original(role, state)[0]


def find_difference(found: Architecture, wanted: Architecture) -> str | None:
    """Differing sizes of two models of a kind; None if they are alike."""
    differing = {
        key: (value, _value(wanted, key))
        for key, value in found.config.items()
        if _is_compared(wanted, key) and _plain(value) != _plain(_value(wanted, key))
    }
    told = ", ".join(f"{key} {size} for {needed}" for key, (size, needed) in differing.items())
    return f"a model of other sizes: {told}" if differing else None


def _is_compared(wanted: Architecture, key: str) -> bool:
    if issubclass(wanted.kind, PreTrainedModel):
        return key in SIZES and key in wanted.config
    return key not in IGNORED


def _value(wanted: Architecture, key: str) -> Any:
    return wanted.config[key] if key in wanted.config else wanted.value(key)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
