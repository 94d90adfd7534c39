"""Write a LoRA in any of the four common formats, and turn one format into another."""

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from swifti2v.errors import InputError, LoadingError, NumericalError
from swifti2v.models.lora.keys import (
    KOHYA_PREFIX,
    Layers,
    LoraPart,
    describe_other_kind,
    find_format,
    group_by_layer,
)
from swifti2v.models.lora.merge import require_finite
from swifti2v.models.lora.scale import ADAPTER_CONFIG, SPELLINGS, VERSION, find_scales, rank_of
from swifti2v.models.weights.files import read_tensors, write_tensors
from swifti2v.models.weights.names import shorten, wan_names
from swifti2v.version import __version__

logger = logging.getLogger(__name__)

LoraStyle = Literal["peft", "original", "diffsynth", "kohya"]
"""The formats of ``swifti2v.models.lora.merge.LoraReport.format``."""
LORA_STYLES: tuple[LoraStyle, ...] = get_args(LoraStyle)
LEAVES: dict[LoraStyle, tuple[str, str]] = {
    "peft": ("lora_A.weight", "lora_B.weight"),
    "original": ("lora_down.weight", "lora_up.weight"),
    "diffsynth": ("lora_A.default.weight", "lora_B.default.weight"),
    "kohya": ("lora_down.weight", "lora_up.weight"),
}
"""Endings of the keys of a pair, down first."""
FULL_KINDS = ("diff", "diff_b", "diff_m")
MAGNITUDE = ".lora_magnitude_vector"
BLOCK = re.compile(r"blocks[._](\d{1,3})[._]")  # bounded, so that no key asks for a billion names


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConversion:
    """Result of ``convert_lora``."""

    source_style: str
    """Format of the file that was read."""
    num_layers: int
    """Layers with a low-rank pair."""
    num_full: int
    """Full differences of weights, biases and modulations."""


class _Pair(NamedTuple):
    """``scale * up @ down`` for a layer's weight, ``scale * bias`` for its bias."""

    down: Tensor
    up: Tensor
    scale: float
    bias: Tensor | None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


class _Lora(NamedTuple):
    """A LoRA of any format, by diffusers name."""

    pairs: dict[str, _Pair]
    full: dict[tuple[str, str], Tensor]  # (layer, kind)
    magnitudes: dict[str, Tensor]  # of a DoRA


def save_lora(
    state: Mapping[str, Tensor],
    path: Path | str,
    style: LoraStyle,
    *,
    alpha: float,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a trained LoRA as one safetensors file, replacing an older one in one go.

    ``original`` and ``kohya`` keep the pairs as they are and store alpha beside them. ``peft`` and
    ``diffsynth`` have no such key: there ``alpha / rank`` is multiplied into the up matrix, in its
    own dtype where that is exact, else in float32.

    Args:
        state: Pairs in PEFT's naming under diffusers layer names, as
            ``swifti2v.training.adapters.adapter_state_dict`` gives it; a DoRA's magnitudes too.
        path: Ends in ``.safetensors``.
        style: ``peft`` is what diffusers loads, ``original`` is for ComfyUI and LightX2V.
        alpha: Alpha of all layers; the change of a weight is ``alpha / rank * up @ down``.
        metadata: For the file's header, such as ``swifti2v_base`` (the base model's name),
            ``swifti2v_base_sha256``, ``swifti2v_recipe`` and ``swifti2v_config`` (the training's
            settings as JSON). ``swifti2v_version``, ``swifti2v_rank`` and ``swifti2v_alpha`` (as
            trained) are added.

    Raises:
        InputError: Alpha, path, style or metadata cannot be used, or the style cannot carry what
            the LoRA holds: a DoRA goes into ``peft`` only, biases into ``peft`` and ``original``.
        LoadingError: A key is not one of a Wan transformer's LoRA.
        NumericalError: A value is not finite.
        StorageError: The file cannot be written.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"LoRA alpha is {alpha}; it must be a number above 0, such as the rank")
    if bad := [key for key, tensor in state.items() if not tensor.float().isfinite().all()]:
        raise NumericalError(f"the LoRA holds NaN or infinity in {shorten(bad)}; it is not written")
    if alphas := [key for key in state if key.endswith((".alpha", ".lora_alpha"))]:
        raise InputError(f"{shorten(alphas)}: alpha is an argument here, not part of the state")
    plain = {key: tensor for key, tensor in state.items() if not key.endswith(MAGNITUDE)}
    if len(plain) < len(state) and style != "peft":
        raise InputError(
            f"style {style!r} cannot carry a DoRA: it has no place for the magnitudes, and the "
            "pairs alone are another change; use 'peft'"
        )
    magnitudes = {k.removesuffix(MAGNITUDE): t for k, t in state.items() if k not in plain}
    lora = _sort(plain, "the LoRA", partial(_same_alpha, alpha))
    if magnitudes and magnitudes.keys() != lora.pairs.keys():
        lone = sorted(magnitudes.keys() ^ lora.pairs.keys())
        raise LoadingError(
            f"every layer of a DoRA has a pair and a magnitude; these lack one: {shorten(lone)}"
        )
    _write(lora._replace(magnitudes=magnitudes), Path(path), style, metadata or {})


def convert_lora(source: Path | str, path: Path | str, style: LoraStyle) -> LoraConversion:
    """Write a LoRA file of any of the four formats in another one, with the same effect.

    Alpha is kept or multiplied in as in ``save_lora``; the file's metadata go along.

    Args:
        source: File or folder that ``swifti2v.models.lora.merge.merge_lora`` reads.
        path: Ends in ``.safetensors``; replaced in one go if it is there.
        style: The new format.

    Raises:
        InputError: As in ``save_lora``; full differences (``.diff``, ``.diff_b``, ``.diff_m``) go
            into ``original`` only.
        LoadingError: The source cannot be read, or holds NaN, a key that is not one of a Wan
            transformer's LoRA, or is another kind of adapter.
        StorageError: The file cannot be written.
    """
    source, name = Path(source), str(source)
    tensors, metadata = read_tensors(source)
    if other_kind := describe_other_kind(name, tensors):
        raise LoadingError(other_kind)
    require_finite(tensors, name)
    source_style = find_format(tensors)
    lora = _sort(tensors, name, lambda layers: find_scales(layers, metadata, source))
    # What tells alpha would be read again, beside the alpha that is written.
    telling = {ADAPTER_CONFIG, *SPELLINGS}
    kept = {key: text for key, text in metadata.items() if key.rpartition(".")[2] not in telling}
    _write(lora, Path(path), style, kept)
    logger.info("%s (%s) written to %s (%s)", name, source_style, path, style)
    return LoraConversion(
        source_style=source_style, num_layers=len(lora.pairs), num_full=len(lora.full)
    )


def _same_alpha(alpha: float, layers: Layers) -> tuple[dict[str, float], dict[str, str]]:
    """Return the same as ``find_scales``, with one alpha for all layers."""
    return {p: alpha / rank_of(parts["down"]) for p, parts in layers.items() if "down" in parts}, {}


def _sort(
    tensors: Mapping[str, Tensor],
    name: str,
    find: Callable[[Layers], tuple[dict[str, float], dict[str, str]]],
) -> _Lora:
    """Tensors of any format by layer, with what ``find_scales`` or its like says of them."""
    layers, problems = group_by_layer(tensors, _original_names(tensors).keys())
    scales, wrong_numbers = find(layers)
    problems |= wrong_numbers
    lora = _Lora({}, {}, {})
    for place, parts in layers.items():
        lora.full.update({(place, k): parts[k].tensor for k in FULL_KINDS if k in parts})
        low = {kind: part for kind, part in parts.items() if kind not in FULL_KINDS}
        if not low:
            continue
        if not _is_pair(low):
            problems |= {part.key: "no pair of one rank" for part in low.values()}
            continue
        bias = low["up_bias"].tensor if "up_bias" in low else None
        lora.pairs[place] = _Pair(
            low["down"].tensor, low["up"].tensor, scales.get(place, 1.0), bias
        )
    if problems or not tensors:
        reasons = [f"{key} {tuple(tensors[key].shape)}: {why}" for key, why in problems.items()]
        raise LoadingError(
            f"{name} is not a LoRA of a Wan transformer: {len(problems)} of {len(tensors)} keys "
            f"have no place; {shorten(reasons) or 'it is empty'}"
        )
    return lora


def _is_pair(parts: Mapping[str, LoraPart]) -> bool:
    if not {"down", "up"} <= parts.keys():
        return False
    down, up = parts["down"].tensor, parts["up"].tensor
    return down.ndim >= 2 and up.ndim >= 2 and up.shape[1] == down.shape[0] > 0


def _write(lora: _Lora, path: Path, style: LoraStyle, metadata: Mapping[str, str]) -> None:
    if style not in LORA_STYLES:
        raise InputError(f"LoRA style {style!r} is unknown; use one of {', '.join(LORA_STYLES)}")
    with_bias = [place for place, pair in lora.pairs.items() if pair.bias is not None]
    if with_bias and style in ("diffsynth", "kohya"):
        raise InputError(
            f"style {style!r} has no place for the biases of {shorten(with_bias)}; use 'original'"
        )
    if lora.full and style != "original":
        places = [f"{place} ({kind})" for place, kind in lora.full]
        raise InputError(
            f"style {style!r} has no place for the full differences of {shorten(places)}; use "
            "'original'"
        )
    header = dict(metadata) | {
        VERSION: __version__,
        "swifti2v_rank": _list_values(pair.rank for pair in lora.pairs.values()),
        "swifti2v_alpha": _list_values(pair.scale * pair.rank for pair in lora.pairs.values()),
    }
    if style == "peft":
        header[ADAPTER_CONFIG] = _describe_adapter(lora)
    write_tensors(_spell(lora, style), path, header)


def _list_values(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values)))


def _describe_adapter(lora: _Lora) -> str:
    """PEFT's config as JSON; without it the one of another LoRA in the folder would count."""
    ranks = {place: pair.rank for place, pair in lora.pairs.items()}
    rank = max(ranks.values(), default=1)
    others = {f"^{place}": other for place, other in ranks.items() if other != rank}
    config = {
        "r": rank,
        "lora_alpha": rank,  # alpha is in the weights
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "lora_bias": any(pair.bias is not None for pair in lora.pairs.values()),
        "use_dora": bool(lora.magnitudes),
    }
    return json.dumps({f"transformer.{key}": value for key, value in config.items()})


def _spell(lora: _Lora, style: LoraStyle) -> dict[str, Tensor]:
    """Tensors under the keys of a format."""
    down_leaf, up_leaf = LEAVES[style]
    names = _original_names([*lora.pairs, *(place for place, _ in lora.full)])
    tensors: dict[str, Tensor] = {}
    for place, pair in lora.pairs.items():
        stem = _stem(place, style, names)
        # diffusers' reader of the original format knows alpha in blocks only
        if keeps_alpha := style == "kohya" or (style == "original" and place.startswith("blocks.")):
            tensors[f"{stem}.alpha"] = torch.tensor(pair.scale * pair.rank)
        tensors[f"{stem}.{down_leaf}"] = pair.down
        tensors[f"{stem}.{up_leaf}"] = pair.up if keeps_alpha else fold(pair.up, pair.scale)
        if pair.bias is not None:
            leaf = "lora_B.bias" if style == "peft" else "diff_b"
            tensors[f"{stem}.{leaf}"] = fold(pair.bias, pair.scale)
    for place, magnitude in lora.magnitudes.items():
        tensors[_stem(place, style, names) + MAGNITUDE] = magnitude
    for (place, kind), tensor in lora.full.items():
        stem = _stem(place, style, names)
        key = f"{stem.removesuffix('.modulation') if kind == 'diff_m' else stem}.{kind}"
        tensors[key] = tensors[key] + tensor if key in tensors else tensor
    return tensors


def _original_names(keys: Iterable[str]) -> dict[str, str]:
    """Diffusers name -> original name of all layers and bare parameters, in as many blocks."""
    numbers = [int(match[1]) for key in keys if (match := BLOCK.search(key))]
    return {new: old for old, new in wan_names(max(numbers, default=-1) + 1).items()}


def _stem(place: str, style: LoraStyle, names: Mapping[str, str]) -> str:
    """Return the start of a layer's keys."""
    if style == "peft":
        return f"transformer.{place}"
    if style == "kohya":
        return KOHYA_PREFIX + names[place].replace(".", "_")
    return f"diffusion_model.{names[place]}" if style == "original" else names[place]


def fold(tensor: Tensor, scale: float) -> Tensor:
    """``scale * tensor``, in its own dtype where no value is rounded, else in float32.

    Args:
        tensor: Tensor of a floating-point dtype.
        scale: A factor; with 1 the tensor itself comes back.
    """
    if scale == 1:
        return tensor
    product = tensor.double() * scale
    rounded = product.to(tensor.dtype)
    return rounded if torch.equal(rounded.double(), product) else product.float()
