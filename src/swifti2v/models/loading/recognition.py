"""Tell which component of a model a file holds, by the names and shapes of its weights."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from swifti2v.errors import LoadingError
from swifti2v.models.loading.architectures import Architecture, convert_original
from swifti2v.models.weights.files import outline_weights
from swifti2v.models.weights.packed import PackedWeight, Weight

IGNORED = ("latents_mean", "latents_std")
"""Keys of a configuration that weights do not tell."""


class Content(NamedTuple):
    """What the head of a file says."""

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


def find_difference(role: str, content: Content, wanted: Architecture | None) -> str | None:
    """Reason why a file is not a component, or None if it fits.

    Args:
        role: A key of ``swifti2v.models.loading.architectures.KINDS``.
        content: The file's.
        wanted: Architecture of the component; None compares the kind of model alone.
    """
    try:
        found, _ = convert_original(role, content.state)
    except LoadingError as error:
        return str(error)
    if wanted is None:
        return None
    differing = {
        key: (value, _value(wanted, key))
        for key, value in found.config.items()
        if _is_compared(wanted, key) and _plain(value) != _plain(_value(wanted, key))
    }
    told = ", ".join(
        f"{key} {is_value} for {needed}" for key, (is_value, needed) in differing.items()
    )
    return f"it is another model of this kind ({told})" if differing else None


def _is_compared(wanted: Architecture, key: str) -> bool:
    if issubclass(wanted.kind, PreTrainedModel):
        return key in wanted.config and isinstance(wanted.config[key], int) and "token" not in key
    return key not in IGNORED


def _value(wanted: Architecture, key: str) -> Any:
    return wanted.config[key] if key in wanted.config else wanted.value(key)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
