"""Weights kept as small as their file has them, and made whole a layer at a time when they compute.

8-bit floating point with or without scales, and the blocks of GGUF, which diffusers unpacks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from swifti2v.errors import LoadingError

FLOAT8_FORMATS = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedWeight:
    """One weight in the form of its file."""

    data: Tensor
    """``[..., bytes of a row]`` uint8."""
    shape: torch.Size
    """Shape of the whole weight."""
    format: str
    """A key of ``FLOAT8_FORMATS``, or a type of GGUF such as ``Q4_K``."""
    scale: Tensor | None = None
    """``[R, C]`` float32 factors, each for an equal part of the rows and columns; None without."""

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The whole weight."""
        return unpack(self.data, self.scale, self.format, dtype).reshape(self.shape)


Weight = Tensor | PackedWeight


def unpack(data: Tensor, scale: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
    """Values of a packed weight: ``value * scale``, rounded once.

    Args:
        data: See ``PackedWeight``.
        scale: See ``PackedWeight``.
        kind: See ``PackedWeight.format``.
        dtype: Number type of the result.

    Returns:
        ``[..., columns]``.
    """
    if kind not in FLOAT8_FORMATS:
        return _unpack_gguf(data, kind, dtype)
    values = data.view(FLOAT8_FORMATS[kind]).to(dtype)
    if scale is None:
        return values
    num_rows, num_columns = scale.shape
    parts = values.view(num_rows, values.shape[0] // num_rows, num_columns, -1)
    torch.mul(parts, scale[:, None, :, None], out=parts)  # computed in float32
    return values


def _unpack_gguf(data: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    from diffusers.quantizers.gguf.utils import dequantize_functions
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block_size, type_size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    unpack_blocks: Any = dequantize_functions[GGMLQuantizationType[kind]]
    # In float16, the type of GGUF's own scales, unless the caller computes in more.
    wide = torch.float32 if dtype == torch.float32 else None
    values: Tensor = unpack_blocks(data.reshape(-1, type_size), block_size, type_size, dtype=wide)
    return values.reshape(*data.shape[:-1], -1).to(dtype)


class PackedLinear(nn.Module):
    """A linear layer that unpacks its weight each time it computes.

    LoRAs stay beside the packed weight, which cannot take them: they are added to the unpacked one.

    Args:
        weight: ``[out, in]``; its tensors become the parameters ``packed`` and ``scale``.
        bias: ``[out]``, if there is one.
        dtype: Number type that ``weight`` tells to code that asks the layer for it.
    """

    packed: nn.Parameter
    scale: nn.Parameter | None
    bias: nn.Parameter | None
    up: nn.Parameter | None
    down: nn.Parameter | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.format, self.dtype = weight.format, dtype
        self.packed = nn.Parameter(weight.data, requires_grad=False)
        for name, tensor in (("scale", weight.scale), ("bias", bias), ("up", None), ("down", None)):
            parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, parameter)

    @property
    def weight(self) -> Tensor:
        """Shape and number type of the weight, without values."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight with its LoRAs, ``[out, in]``."""
        weight = unpack(self.packed, self.scale, self.format, dtype)
        if self.up is not None and self.down is not None:
            weight = torch.addmm(weight, self.up.to(dtype), self.down.to(dtype))
        return weight

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, computed in the type of the input."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return F.linear(hidden, self.unpack(hidden.dtype), bias)

    @torch.no_grad()
    def add_low_rank(self, up: Tensor, down: Tensor) -> None:
        """Add ``up @ down`` to the weight from now on.

        Args:
            up: ``[out, rank]``.
            down: ``[rank, in]``.
        """
        up, down = (part.to(self.packed.device, self.dtype) for part in (up, down))
        if self.up is not None and self.down is not None:
            up, down = torch.cat([self.up, up], dim=1), torch.cat([self.down, down])
        self.up = nn.Parameter(up, requires_grad=False)
        self.down = nn.Parameter(down, requires_grad=False)

    def extra_repr(self) -> str:
        """Sizes and format."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format}"


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """Packed layers of a model by name."""
    return (pair for pair in model.named_modules() if isinstance(pair[1], PackedLinear))


def is_packed(model: nn.Module) -> bool:
    """Whether a model has weights in the form of their file."""
    return any(True for _ in packed_layers(model))


def unpack_all(state: Mapping[str, Weight], dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict of whole weights; those that are packed get a number type."""
    return {k: w.unpack(dtype) if isinstance(w, PackedWeight) else w for k, w in state.items()}


def make_room(
    model: nn.Module, state: Mapping[str, Weight], dtype: torch.dtype, float32: set[str]
) -> dict[str, Tensor]:
    """Replace the linear layers of a model whose weights are packed, in place.

    Weights of other layers are unpacked.

    Args:
        model: Without memory (on the meta device).
        state: Every weight by name.
        dtype: Number type of the weights.
        float32: Parts of names whose weights are in float32, see
            ``swifti2v.models.loading.components.float32_parts``.

    Returns:
        Tensors for ``load_weights``.

    Raises:
        LoadingError: A shape differs from that of the model.
    """
    ready: dict[str, Tensor] = {}
    for key, weight in state.items():
        if not isinstance(weight, PackedWeight):
            ready[key] = weight
            continue
        name, _, leaf = key.rpartition(".")
        layer = _find(model, name)
        is_wide = bool(float32 & set(key.split(".")))
        own = torch.float32 if is_wide else dtype
        # diffusers reads the number type off the weights of its float32 layers: those must be whole.
        stays = leaf == "weight" and isinstance(layer, nn.Linear)
        if not stays or (is_wide and not isinstance(model, PreTrainedModel)):
            ready[key] = weight.unpack(own)
            continue
        _require_shape(key, weight, layer)
        bias = None if layer.bias is None else layer.bias.detach()
        model.set_submodule(name, PackedLinear(_without_memory(weight), bias, own))
        ready[f"{name}.packed"] = weight.data
        if weight.scale is not None:
            ready[f"{name}.scale"] = weight.scale
    return ready


def _find(model: nn.Module, name: str) -> Any:
    """The layer of a name; the model itself for an unknown one, so that loading names the key."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return model


def _require_shape(key: str, weight: PackedWeight, layer: nn.Linear) -> None:
    wanted = (layer.out_features, layer.in_features)
    if tuple(weight.shape) != wanted:
        raise LoadingError(
            f"{key} is {tuple(weight.shape)} in the file ({weight.format}), and the model needs "
            f"{wanted}; check that weights and configuration belong together"
        )


def _without_memory(weight: PackedWeight) -> PackedWeight:
    scale = None if weight.scale is None else weight.scale.to("meta")
    return PackedWeight(
        data=weight.data.to("meta"), shape=weight.shape, format=weight.format, scale=scale
    )


def share_packed(source: nn.Module, target: nn.Module) -> None:
    """Put the packed layers of one model into the places of those names in another."""
    for name, layer in packed_layers(source):
        target.set_submodule(name, layer)
