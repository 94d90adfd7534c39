"""The models of a run without their weights: their memory, and the cost of a forward pass."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swifti2v.config import GenerationConfig, SpeedConfig
from swifti2v.models.loading.architectures import KINDS, Architecture, find_architecture
from swifti2v.models.loading.components import cast_weights, set_vae_dtypes
from swifti2v.models.loading.sources import ModelIndex, find_model
from swifti2v.models.runtime.pinning import pinned_bytes
from swifti2v.models.runtime.placement import can_stream, streamed_groups
from swifti2v.models.runtime.residual import keep_residual
from swifti2v.models.weights.quantization import quantize
from swifti2v.planning.costs import Count, Weights, extrapolate
from swifti2v.planning.counting import META, count

LAYERS = {
    "text_encoder": "num_layers",
    "image_encoder": "num_hidden_layers",
    "stage1_transformer": "num_layers",
    "stage2_transformer": "num_layers",
}
"""Configuration key that counts a component's equal layers."""
FEWEST_FLOAT8 = 3
"""Layers of which one at least is neither the first nor the last."""


def speed_of(config: GenerationConfig) -> dict[str, SpeedConfig]:
    """Speed settings of the transformers by component, as ``Models`` takes them."""
    return {
        "stage1_transformer": config.stage1.speed,
        "stage2_transformer": config.stage2.speed,
    }


class Models:
    """The components of a model on the meta device, made when they are asked for.

    Args:
        name: See ``swifti2v.models.loading.sources.find_model``.
        dtype: Number type of the weights; parts that stay float32 when loaded do so here.
        speed: Speed settings by component; a component without settings computes plainly.

    Raises:
        ConfigError: No such model.
        LoadingError: The configuration of a component cannot be found.
    """

    def __init__(
        self,
        name: str | Path,
        dtype: torch.dtype,
        speed: Mapping[str, SpeedConfig] | None = None,
    ) -> None:
        self.name = str(name)
        index, root = find_model(name)
        self.index: ModelIndex = index
        self.dtype = dtype
        self.speed = dict(speed or {})
        self.linear = {role: asked.linear for role, asked in self.speed.items()}
        self.architectures: dict[str, Architecture] = {
            role: find_architecture(role, source, root)
            for role, source in index.components.items()
            if role in KINDS
        }
        self._made: dict[tuple[str, int | None], Any] = {}

    def get(self, role: str, num_layers: int | None = None) -> Any:
        """A component in eval mode.

        Args:
            role: Its name in ``Components``.
            num_layers: Fewer layers than it has; None for all.
        """
        if (role, num_layers) not in self._made:
            kind, config = self.architectures[role]
            if num_layers is not None:
                config = {**config, LAYERS[role]: num_layers}
            model = cast_weights(Architecture(kind, config).make_empty(role), self.dtype)
            source = self.index.components[role]
            if source.encode_dtype or source.decode_dtype:
                set_vae_dtypes(model, source, self.dtype)
            model = model.to(META)
            linear = self.linear.get(role, "plain")
            if linear != "float8" or num_layers is None or num_layers >= FEWEST_FLOAT8:
                quantize(model, linear, META)
            if role in self.speed and self.speed[role].residual == "float32":
                keep_residual(model)
            self._made[role, num_layers] = model
        return self._made[role, num_layers]

    def count_layers(self, role: str, run: Callable[[Any], object], least: int = 1) -> Count:
        """Cost of ``run`` on a component, from two that have few layers.

        Args:
            role: Role of the component.
            run: Computes with it.
            least: Layers from which on each further one costs the same, memory included.
        """
        num_layers = int(getattr(self.get(role).config, LAYERS[role]))
        if self.linear.get(role) == "float8":
            least = max(least, FEWEST_FLOAT8)
        if num_layers <= least:
            return count(partial(run, self.get(role)))
        models = self.get(role, least), self.get(role, least + 1)  # made before anything is counted
        first, second = (count(partial(run, model)) for model in models)
        return extrapolate(first, second, num_layers - least)

    def weights(self, role: str) -> Weights:
        """Memory of a component."""
        model = self.get(role)
        size = _num_bytes(model.parameters())
        if not can_stream(model):
            return Weights(num_bytes=size, stays=True, streamed_bytes=0, pinned_bytes=0)
        linear = [m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear)]
        fixed, *blocks = map(_num_bytes, streamed_groups(model))
        return Weights(
            num_bytes=size,
            stays=False,
            streamed_bytes=fixed + sum(sorted(blocks)[-2:]),
            pinned_bytes=pinned_bytes(model),
            linear_bytes=sum(linear),
            largest_linear_bytes=max(linear),
        )


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
