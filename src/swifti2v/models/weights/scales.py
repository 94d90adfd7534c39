"""Scales of 8-bit weights in the spellings of the programs that write them, applied or refused.

Every program computes ``weight * scale``. A file whose scales are dropped loads without an error and
makes white frames, so nothing here is left out silently.

Source:
    ComfyUI ``comfy/utils.py`` (old and new keys) and its ``QUANTIZATION.md``; musubi-tuner
    ``modules/fp8_optimization_utils.py`` (blocks of a row, two factors); diffusers
    ``quantizers/bfl``; DeepSeek's ``weight_scale_inv``, a factor in spite of its name.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from swifti2v.errors import LoadingError
from swifti2v.models.weights.names import shorten
from swifti2v.models.weights.packed import FLOAT8_FORMATS, PackedWeight, Weight

FORMATS = {dtype: name for name, dtype in FLOAT8_FORMATS.items()}
SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
FACTOR = ".scale_weight_tensor"
"""Second factor of musubi-tuner's blocks."""
FOR_INPUTS = (".scale_input", ".input_scale")
"""Scales of the layers' inputs, which nobody needs who multiplies whole weights."""
MARKER = "scaled_fp8"
NOTE = ".comfy_quant"
HEADER = "_quantization_metadata"
OTHERS = {
    ".weight_scale_2": "4-bit blocks (NVFP4)",
    ".pre_quant_scale": "smoothed inputs (AWQ)",
    ".weight._data": "quanto's layout",
    ".weight._scale": "quanto's layout",
}
"""Keys of formats that are not read."""
REMEDY = "take the bf16, fp16, fp8 or GGUF file of this model"


def pack_float8(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str
) -> dict[str, Weight]:
    """Join 8-bit weights with their scales; markers and scales of inputs go.

    Args:
        tensors: By the names in the file.
        metadata: Header of the file.
        source: Named in errors.

    Returns:
        The other tensors as they are, and a ``PackedWeight`` for each in 8-bit floating point.

    Raises:
        LoadingError: A scale without a weight of its own or of another shape, weights with and
            without scales in one file, or a format that is not read.
    """
    _require_known(tensors, metadata, source)
    scales = _find_scales(tensors, source)
    notes = [key for key in tensors if key.rpartition(".")[2] == MARKER or key.endswith(NOTE)]
    for key in notes:
        if key.endswith(NOTE) and f"{key.removesuffix(NOTE)}.weight" not in tensors:
            raise _lonely(key, source)
    extra = {*notes, *(key for key in tensors if key.endswith((*SCALES, FACTOR, *FOR_INPUTS)))}
    small = [key for key, tensor in tensors.items() if tensor.dtype in FORMATS and key not in extra]
    if small and not scales and any(not key.endswith(NOTE) for key in notes):
        raise LoadingError(
            f"{source} says {MARKER} and holds no scale of any layer: they were lost; {REMEDY}"
        )
    matrices = [key for key in small if key.endswith(".weight") and tensors[key].ndim == 2]
    if scales and (without := [key for key in matrices if key not in scales]):
        raise LoadingError(
            f"{source} holds scales of {len(scales)} 8-bit weights and none of {len(without)}: "
            f"{shorten(without)}; it is damaged or mixed from two files: {REMEDY}"
        )
    found: dict[str, Weight] = {k: t for k, t in tensors.items() if k not in extra}
    for key in small:
        found[key] = PackedWeight(
            data=tensors[key].view(torch.uint8),
            shape=tensors[key].shape,
            format=FORMATS[tensors[key].dtype],
            scale=scales.get(key),
        )
    return found


def _find_scales(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Scale of each weight, by the weight's name."""
    scales: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        suffix = next((s for s in (*SCALES, FACTOR, *FOR_INPUTS) if key.endswith(s)), None)
        if suffix is None:
            continue
        name = f"{key.removesuffix(suffix)}.weight"
        if name not in tensors:
            raise _lonely(key, source)
        if suffix not in SCALES:
            continue
        if tensors[name].dtype not in FORMATS:
            raise LoadingError(
                f"{source} holds {key} beside {name} in {tensors[name].dtype}; scales of 8-bit "
                f"floating point alone are applied: {REMEDY}"
            )
        if name in scales:
            raise LoadingError(f"{source} holds two scales of {name}; {REMEDY}")
        factor = tensors.get(f"{name}.".replace(".weight.", FACTOR))
        scales[name] = _to_grid(key, tensor, factor, tensors[name].shape, source)
    return scales


def _to_grid(
    key: str, scale: Tensor, factor: Tensor | None, shape: torch.Size, source: str
) -> Tensor:
    """``[R, C]`` float32, of which each is for an equal part of the weight."""
    grid = scale.float() if factor is None else scale.float() * factor.float()
    if grid.numel() == 1:
        grid = grid.reshape(1, 1)
    elif grid.ndim == 1 or (grid.ndim == 3 and grid.shape[2] == 1):
        grid = grid.reshape(grid.shape[0], -1)
    num_columns = shape[1] if len(shape) == 2 else 1  # a convolution has one for each row at most
    fits = grid.ndim == 2 and all(
        parts and whole % parts == 0
        for whole, parts in zip((shape[0], num_columns), grid.shape, strict=True)
    )
    if not fits:
        raise LoadingError(
            f"{source}: {key} {tuple(scale.shape)} is no scale of a weight {tuple(shape)}: one for "
            f"all, one for each row, or one for each equal block; {REMEDY}"
        )
    if not grid.is_meta and not (grid.isfinite().all() and (grid >= 0).all() and grid.any()):
        raise LoadingError(f"{source}: {key} holds zero, negative or no numbers; fetch it again")
    return grid.contiguous()


def _require_known(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> None:
    """Refuse formats that are not read."""
    for suffix, what in OTHERS.items():
        if strange := [key for key in tensors if key.endswith(suffix)]:
            raise LoadingError(f"{source} is in {what}: {shorten(strange)}; {REMEDY}")
    formats = {
        key: _read_note(bytes(t.cpu().to(torch.uint8).flatten().tolist()), f"{source}: {key}")
        for key, t in tensors.items()
        if key.endswith(NOTE) and not t.is_meta
    }
    if HEADER in metadata:
        layers = _read_note(metadata[HEADER], f"{source}: {HEADER}").get("layers", {})
        names = {key.removesuffix(".weight") for key in tensors if key.endswith(".weight")}
        bare = {name.removeprefix("model.").removeprefix("diffusion_model.") for name in names}
        absent = [layer for layer in layers if layer not in names | bare]
        if absent:
            raise LoadingError(
                f"the header of {source} tells of {len(absent)} layers that are not in it: "
                f"{shorten(absent)}; it is damaged or mixed from two files: {REMEDY}"
            )
        formats |= {str(layer): dict(values) for layer, values in layers.items()}
    wrong = [f"{k}: {n.get('format')}" for k, n in formats.items() if not _is_float8(n)]
    if wrong:
        raise LoadingError(
            f"{source} is stored in formats that are not read: {shorten(wrong)}; {REMEDY}"
        )


def _is_float8(note: Mapping[str, Any]) -> bool:
    return note.get("format") in FLOAT8_FORMATS


def _read_note(text: str | bytes, place: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise LoadingError(f"{place} cannot be read ({error}); fetch the file again") from None


def _lonely(key: str, source: str) -> LoadingError:
    return LoadingError(
        f"{source} holds {key} and no weight for it: it is damaged or mixed from two files; {REMEDY}"
    )
