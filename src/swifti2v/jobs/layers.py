"""Layers of settings, weakest first, each with the source that error messages name."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from swifti2v.config import GenerationConfig, merge, parse_config
from swifti2v.models.loading.sources import find_model

ANY_LENGTH = sys.maxsize - 1
"""``num_frames`` of a layer that names none: it comes from another layer, or from the model."""
Layer = tuple[str, Mapping[str, Any]]
"""The source, and nested settings that it asks for."""


def resolve_config(model: str, layers: Sequence[Layer] = ()) -> GenerationConfig:
    """Settings of a model with others on top.

    Raises:
        ConfigError: An unknown model, or a layer with an unknown key or a bad value.
    """
    return parse_config(
        GenerationConfig, merge(find_model(model)[0].settings, merge_layers(layers)), "settings"
    )


def merge_layers(layers: Sequence[Layer]) -> dict[str, Any]:
    """Nested settings of all layers, later ones on top; each is checked by itself.

    Raises:
        ConfigError: Naming the layer's source.
    """
    merged: dict[str, Any] = {}
    for source, asked in layers:
        parse_config(GenerationConfig, {"num_frames": ANY_LENGTH, **asked}, source)
        merged = merge(merged, asked)
    return merged
