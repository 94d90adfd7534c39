"""Merge a LoRA of any common format into a Wan transformer, exactly and completely."""

import json
import logging
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swifti2v.errors import InputError, LoadingError
from swifti2v.models.checkpoints import read_tensors
from swifti2v.models.conversion import shorten, wan_names

logger = logging.getLogger(__name__)

KOHYA_PREFIX = "lora_unet_"
PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
)
KEY = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"lora[._](?:A|down)(?:\.[^.]+)?\.(?P<down>weight)"  # [^.]+: the adapter's name, as "default"
    r"|lora[._](?:B|up)(?:\.[^.]+)?\.(?:(?P<up>weight)|(?P<up_bias>bias))"
    r"|(?P<alpha>alpha)|(?P<diff>diff)|(?P<diff_b>diff_b)|(?P<diff_m>diff_m))"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraReport:
    """What a merge did."""

    source: str
    """The file, or ``mapping``."""
    format: str
    """``peft``, ``original``, ``diffsynth`` or ``kohya``."""
    strength: float
    """The factor asked for; 0 leaves the model as it was."""
    applied: int
    """Keys of the file that went into the model."""
    total: int
    """Keys in the file."""
    skipped: tuple[str, ...]
    """Keys left out, each with its shape and the reason; empty unless partial was allowed."""
    metadata: Mapping[str, str]
    """The file's own safetensors metadata."""


class _Change(NamedTuple):
    """One addition to one parameter: ``scale * left @ right``, or ``scale * left``."""

    parameter: str
    keys: tuple[str, ...]
    left: Tensor
    right: Tensor | None
    scale: float


class LoraPart(NamedTuple):
    """One tensor of the file and the key it came under."""

    key: str
    tensor: Tensor


def merge_lora(
    model: nn.Module,
    source: Path | str | Mapping[str, Tensor],
    strength: float = 1.0,
    *,
    allow_partial: bool = False,
) -> LoraReport:
    """Add a LoRA to the weights of a transformer, in place.

    ``weight += strength * (alpha / rank * up @ down + diff)``, ``bias += strength * diff_b``,
    ``modulation += strength * diff_m``: in float32, then cast to the dtype of the parameter.
    Everything is checked before the first write. Several LoRAs are merged by several calls.

    Args:
        model: A model with the parameter names of diffusers' ``WanTransformer3DModel``.
        source: A LoRA file, a directory with one, or its tensors by key, in the format of
            diffusers/PEFT, ComfyUI/LightX2V (``diffusion_model.``), DiffSynth or kohya. Without
            an ``.alpha`` key or a stored PEFT config alpha is the rank, for kohya it is 1.
        strength: Factor on the whole LoRA; 0 checks the file and changes nothing.
        allow_partial: Skip keys that do not fit, instead of refusing the file.

    Returns:
        How many keys were applied, and which were skipped.

    Raises:
        InputError: ``strength`` is not a finite number.
        LoadingError: The file cannot be read, holds NaN, has a key that does not fit (unless
            ``allow_partial``) or none that does, or the weights are quantized or not loaded.

    Source:
        LightX2V's extracted few-step LoRAs carry norm, bias and modulation differences beside
        the low-rank pairs; diffusers 0.42 drops those of norms and modulation.
    """
    if not math.isfinite(strength):
        raise InputError(f"LoRA strength {strength} is not a finite number; 1.0 is the usual one")
    name, tensors, metadata, file = _open(source)
    require_finite(tensors, name)
    format_name = find_format(tensors)
    config = read_adapter_config(metadata, file) if format_name == "peft" else {}
    parameters = dict(model.named_parameters())
    changes, problems = _plan(tensors, parameters, format_name, config)
    skipped = tuple(f"{k} {tuple(tensors[k].shape)}: {why}" for k, why in problems.items())
    applied = len(tensors) - len(problems)
    if problems and (applied == 0 or not allow_partial):
        remedy = "" if applied == 0 else "; allow_partial merges the rest"
        raise LoadingError(
            f"{name} ({format_name} format) does not fit {type(model).__name__}: {applied} of "
            f"{len(tensors)} keys match; {shorten(skipped)}{remedy}"
        )
    _require_writable([parameters[change.parameter] for change in changes])
    if strength != 0:
        for change in changes:
            _apply(parameters[change.parameter], change, strength)
    logger.info(
        "LoRA %s: applied %d of %d keys, strength %g", name, applied, len(tensors), strength
    )
    return LoraReport(
        source=name,
        format=format_name,
        strength=strength,
        applied=applied,
        total=len(tensors),
        skipped=skipped,
        metadata=metadata,
    )


def parse_lora_argument(text: str) -> tuple[Path, float]:
    """Split ``PATH`` or ``PATH:STRENGTH``; the strength is 1 if it is not given.

    Raises:
        InputError: The path is empty, or what follows the last colon is neither a finite
            number nor part of a path.
    """
    path, colon, tail = text.rpartition(":")
    if not colon or "/" in tail or "\\" in tail:
        path, tail = text, "1"
    try:
        strength = float(tail)
    except ValueError:
        strength = math.nan
    if not path or not math.isfinite(strength):
        raise InputError(f"LoRA {text!r} is not PATH or PATH:STRENGTH, as lora.safetensors:0.8")
    return Path(path), strength


def _open(
    source: Path | str | Mapping[str, Tensor],
) -> tuple[str, dict[str, Tensor], dict[str, str], Path | None]:
    if isinstance(source, Mapping):
        if not source:
            raise LoadingError("the LoRA mapping is empty; give the tensors of a LoRA by key")
        return "mapping", dict(source), {}, None
    path = Path(source)
    tensors, metadata = read_tensors(path)
    return str(path), tensors, metadata, path


def require_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        LoadingError: Naming the file ``name`` and the keys.
    """
    if bad := [key for key, tensor in tensors.items() if not tensor.float().isfinite().all()]:
        raise LoadingError(f"{name} holds NaN or infinity in {shorten(bad)}; download it again")


def find_format(keys: Collection[str]) -> str:
    """Format of a LoRA by its keys: ``peft``, ``original``, ``diffsynth`` or ``kohya``."""
    if any(key.startswith(KOHYA_PREFIX) for key in keys):
        return "kohya"
    if any(key.removeprefix("model.").startswith("diffusion_model.") for key in keys):
        return "original"
    diffusers = re.compile(
        r"transformer\.|base_model\.|condition_embedder\.|proj_out\.|.*\.attn[12]\.|.*ffn\.net\."
    )
    return "peft" if any(diffusers.match(key) for key in keys) else "diffsynth"


def read_adapter_config(metadata: Mapping[str, str], file: Path | None) -> dict[str, Any]:
    """The PEFT config in a LoRA's metadata, else the one beside its file, else an empty dict.

    Raises:
        LoadingError: It cannot be read, or describes a DoRA adapter.
    """
    place = str(file)
    try:
        if text := metadata.get("lora_adapter_metadata"):
            config = {k.removeprefix("transformer."): v for k, v in json.loads(text).items()}
        else:
            folder = file if file is None or file.is_dir() else file.parent
            if folder is None or not (folder / "adapter_config.json").is_file():
                return {}
            place = str(folder / "adapter_config.json")
            config = dict(json.loads(Path(place).read_text()))
    except (ValueError, AttributeError, TypeError) as error:
        raise LoadingError(f"the adapter config in {place} cannot be read: {error}") from error
    if config.get("use_dora"):
        raise LoadingError(f"{place} describes a DoRA adapter; only plain LoRA can be merged")
    return config


def _plan(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    format_name: str,
    config: Mapping[str, Any],
) -> tuple[list[_Change], dict[str, str]]:
    """Changes to make, and the reason for each key that has no place in them."""
    own = set(parameters) | {name.rpartition(".")[0] for name in parameters}
    layers, problems = group_by_layer(tensors, own)
    changes: list[_Change] = []
    for place, parts in layers.items():
        found = _low_rank_changes(place, parts, format_name, config)
        found += _full_changes(place, parts, parameters)
        wrong = {key: why for c in found if (why := _misfit(c, parameters)) for key in c.keys}
        used = {key for change in found for key in change.keys}
        wrong |= {
            p.key: "its lora_up or lora_down is missing"
            for p in parts.values()
            if p.key not in used
        }
        if wrong:  # a layer goes in whole or not at all
            problems |= dict.fromkeys((p.key for p in parts.values()), "its layer has a wrong key")
            problems |= wrong
        else:
            changes += found
    return changes, problems


def group_by_layer(
    tensors: Mapping[str, Tensor], names: Collection[str]
) -> tuple[dict[str, dict[str, LoraPart]], dict[str, str]]:
    """Sort the tensors of a LoRA of any format by layer.

    Args:
        tensors: By key.
        names: Layers and bare parameters of the model, under diffusers names.

    Returns:
        Layer to kind (``down``, ``up``, ``up_bias``, ``alpha``, ``diff``, ``diff_b`` or
        ``diff_m``) to tensor, and the reason for each key that has no place in it.
    """
    places = _index_places(names)
    problems: dict[str, str] = {}
    layers: dict[str, dict[str, LoraPart]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(_strip(key))
        if match is None:
            problems[key] = "not a known kind of LoRA key"
            continue
        kind = next(kind for kind, text in match.groupdict().items() if kind != "module" and text)
        module = match["module"] + (".modulation" if kind == "diff_m" else "")
        place = places.get(module.replace(".", "_"))
        if place is None:
            problems[key] = "no such layer in the model"
        elif kind == "alpha" and tensor.numel() != 1:
            problems[key] = "alpha is not one number"
        elif kind in layers.setdefault(place, {}):
            problems[key] = f"the same as {layers[place][kind].key}"
        else:
            layers[place][kind] = LoraPart(key, tensor)
    return layers, problems


def _strip(key: str) -> str:
    if key.startswith(KOHYA_PREFIX):
        return key.removeprefix(KOHYA_PREFIX).removeprefix("_")
    while prefix := next((p for p in PREFIXES if key.startswith(p)), None):
        key = key.removeprefix(prefix)
    return key


def _index_places(names: Collection[str]) -> dict[str, str]:
    """Every name a layer goes by, with ``_`` for ``.`` as kohya writes it -> its own name."""
    blocks = [int(name.split(".")[1]) for name in names if re.match(r"blocks\.\d+\.", name)]
    original = {
        old: new for old, new in wan_names(max(blocks, default=-1) + 1).items() if new in names
    }
    return {old.replace(".", "_"): new for old, new in (original | {n: n for n in names}).items()}


def _low_rank_changes(
    place: str, parts: Mapping[str, LoraPart], format_name: str, config: Mapping[str, Any]
) -> list[_Change]:
    if "down" not in parts or "up" not in parts:
        return []
    down, up = parts["down"], parts["up"]
    scale = find_scale(place, parts, format_name, config)
    pair = tuple(parts[kind].key for kind in ("down", "up", "alpha") if kind in parts)
    changes = [_Change(f"{place}.weight", pair, up.tensor, down.tensor, scale)]
    if bias := parts.get("up_bias"):
        changes.append(_Change(f"{place}.bias", (bias.key,), bias.tensor, None, scale))
    return changes


def find_scale(
    place: str, parts: Mapping[str, LoraPart], format_name: str, config: Mapping[str, Any]
) -> float:
    """Factor on the product of the low-rank pair of the layer ``place``, ``alpha / rank``.

    Raises:
        LoadingError: The config tells another rank than the weights.
    """
    down = parts["down"].tensor
    rank = down.shape[0] if down.ndim and down.numel() else 1
    if "alpha" in parts:
        return float(parts["alpha"].tensor.flatten()[0]) / rank
    return 1 / rank if format_name == "kohya" else _configured_scale(place, rank, config)


def _configured_scale(place: str, rank: int, config: Mapping[str, Any]) -> float:
    """``alpha / rank`` of a layer by its PEFT config; 1 where there is none."""

    def look_up(name: str, pattern_name: str) -> Any:  # a pattern wins, as in peft
        patterns = config.get(pattern_name) or {}
        found = (v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", place))
        return next(found, config.get(name))

    stored_rank, alpha = look_up("r", "rank_pattern"), look_up("lora_alpha", "alpha_pattern")
    if stored_rank is not None and stored_rank != rank:
        raise LoadingError(
            f"the adapter config says rank {stored_rank} for {place}, the weights have rank {rank}; "
            "the config belongs to another LoRA"
        )
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _full_changes(
    place: str, parts: Mapping[str, LoraPart], parameters: Mapping[str, nn.Parameter]
) -> list[_Change]:
    targets = {
        "diff": place if place in parameters else f"{place}.weight",
        "diff_b": f"{place}.bias",
        "diff_m": place,
    }
    return [
        _Change(target, (parts[kind].key,), parts[kind].tensor, None, 1.0)
        for kind, target in targets.items()
        if kind in parts
    ]


def _misfit(change: _Change, parameters: Mapping[str, nn.Parameter]) -> str | None:
    """Why a change cannot be added to its parameter, or ``None``."""
    if change.parameter not in parameters:
        return f"the model has no {change.parameter}"
    shape = parameters[change.parameter].shape
    left, right = change.left, change.right
    if right is None:
        fits = left.shape == shape
    else:
        fits = (
            left.ndim >= 2
            and right.ndim >= 2
            and (left.shape[0], left.shape[1:].numel()) == (shape[0], right.shape[0])
            and (right.shape[1:] == shape[1:] or right.shape[1:] == (shape[1:].numel(),))
        )
    return None if fits else f"does not fit {change.parameter} {tuple(shape)}"


def _require_writable(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.is_meta:
            raise LoadingError("the model has no weights yet; load them before merging a LoRA")
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise LoadingError(
                f"the model's weights are quantized ({parameter.dtype}); merge the LoRA before that"
            )


@torch.no_grad()
def _apply(parameter: nn.Parameter, change: _Change, strength: float) -> None:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    delta = change.left.to(parameter.device, dtype)
    if change.right is not None:
        delta = delta.flatten(1) @ change.right.to(parameter.device, dtype).flatten(1)
    delta = delta.reshape(parameter.shape) * (strength * change.scale)
    parameter.copy_(parameter.to(dtype) + delta)
