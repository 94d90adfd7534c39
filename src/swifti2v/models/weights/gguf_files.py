"""Weights in GGUF files, as the video and text models of Wan are passed on in."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swifti2v.errors import LoadingError
from swifti2v.models.weights.headers import open_gguf
from swifti2v.models.weights.packed import PackedWeight, Weight

ARCHITECTURES = ("wan", "t5", "t5encoder")
ARCHITECTURE = "general.architecture"
SHAPE = "comfy.gguf.orig_shape."
"""Prefix of entries with the shapes of tensors that GGUF's four dimensions cannot hold."""
WHOLE = ("F32", "F16", "BF16")


def read_gguf(file: Path) -> tuple[dict[str, Weight], dict[str, str]]:
    """Read the weights of a GGUF file, mapped into memory, and the texts of its header.

    Args:
        file: Named by its path in errors.

    Returns:
        Weights in float32, float16 and bfloat16 as tensors, all others packed.

    Raises:
        ConfigError: The package ``gguf`` is missing.
        LoadingError: A damaged file, another kind of model, or a type of weights that cannot be
            unpacked.
    """
    reader = open_gguf(file)
    texts = {k: str(f.contents()) for k, f in reader.fields.items() if f.types[:1] == [_TEXT]}
    architecture = texts.get(ARCHITECTURE)
    if architecture not in ARCHITECTURES:
        told = f"says {architecture!r}" if architecture else "does not say which model it holds"
        raise LoadingError(
            f"{file} {told} ({ARCHITECTURE}); files of {' and '.join(ARCHITECTURES)} are read, as "
            "those of city96 and QuantStack: take one of them"
        )
    shapes = {
        name.removeprefix(SHAPE): torch.Size(map(int, field.contents()))
        for name, field in reader.fields.items()
        if name.startswith(SHAPE)
    }
    return {t.name: _read(t, shapes.get(t.name), file) for t in reader.tensors}, texts


_TEXT = 8
"""``GGUFValueType.STRING``."""


def _read(tensor: Any, shape: torch.Size | None, file: Path) -> Weight:
    from diffusers.quantizers.gguf.utils import dequantize_functions

    kind = tensor.tensor_type.name
    shape = shape or torch.Size(int(size) for size in reversed(tensor.shape))
    if kind not in WHOLE and tensor.tensor_type not in dequantize_functions:
        known = ", ".join((*WHOLE, *(k.name for k in dequantize_functions if k.name != "BF16")))
        raise LoadingError(
            f"{file}: {tensor.name} is of the type {kind}, which cannot be unpacked; take a file "
            f"in one of {known}"
        )
    data: Tensor = torch.from_numpy(tensor.data)
    if kind in WHOLE:
        return (data.view(torch.bfloat16) if kind == "BF16" else data).reshape(shape)
    if shape.numel() != int(tensor.n_elements):
        raise LoadingError(f"{file}: {tensor.name} does not have the shape {tuple(shape)} it says")
    return PackedWeight(data=data, shape=shape, format=kind)
