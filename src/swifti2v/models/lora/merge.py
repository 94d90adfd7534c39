"""Merge a LoRA of any common format into a Wan transformer, exactly and completely."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from swifti2v.errors import InputError, LoadingError
from swifti2v.models.lora.keys import (
    Layers,
    LoraPart,
    describe_other_kind,
    find_format,
    group_by_layer,
)
from swifti2v.models.lora.scale import find_scales
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.weights.files import read_tensors
from swifti2v.models.weights.names import shorten
from swifti2v.models.weights.packed import PackedLinear, packed_layers

logger = logging.getLogger(__name__)

PATCH_EMBEDDING = "patch_embedding.weight"
PARTIAL = "; to merge the rest, write --lora PATH:partial, or allow_partial: true in a preset"
MISSING = "its lora_up or lora_down is missing"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraReport:
    """Result of a merge."""

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

    def describe(self) -> str:
        """Describe merged and left layers in one line."""
        left = f"; left out: {shorten(self.skipped)}" if self.skipped else ""
        return (
            f"LoRA {self.source}: {self.applied} of {self.total} keys merged at strength "
            f"{self.strength:g}{left}"
        )


Target = Tensor | PackedLinear
"""Parameter, or layer with a packed weight, that a change goes into."""


class _Change(NamedTuple):
    """One addition to one parameter: ``scale * left @ right``, or ``scale * left``."""

    parameter: str
    keys: tuple[str, ...]
    left: Tensor
    right: Tensor | None
    scale: float


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
    Everything is checked before the first write. Several LoRAs are merged by several calls. Layers
    with packed weights (fp8 and GGUF files) keep the pairs and add them each time they unpack.

    Args:
        model: A model with the parameter names of diffusers' ``WanTransformer3DModel``.
        source: A LoRA file, a directory with one, or its tensors by key, in the format of
            diffusers/PEFT, ComfyUI/LightX2V (``diffusion_model.``), DiffSynth, FastVideo or kohya;
            see ``swifti2v.models.lora.scale`` for alpha. On a Stage II that was widened, what is
            for the patch embedding of its base goes to that half.
        strength: Factor on the whole LoRA; 0 checks the file and changes nothing.
        allow_partial: Skip layers with a key that does not fit, and warn, instead of refusing
            the file.

    Returns:
        How many keys were applied, and which were skipped.

    Raises:
        InputError: ``strength`` is not a finite number.
        LoadingError: The file cannot be read, is no plain LoRA, holds NaN, has a key that does not
            fit (unless ``allow_partial``) or none that does, or the weights are quantized or not
            loaded.

    Source:
        LightX2V's extracted few-step LoRAs carry norm, bias and modulation differences beside
        the low-rank pairs; diffusers 0.42 drops those of norms and modulation.
    """
    if not math.isfinite(strength):
        raise InputError(f"LoRA strength {strength} is not a finite number; 1.0 is the usual one")
    name, tensors, metadata, file = _open(source)
    require_finite(tensors, name)
    format_name = find_format(tensors)
    layers, problems = group_by_layer(tensors, _list_places(model))
    scales, wrong_numbers = find_scales(layers, metadata, file)
    additions, misfits = _plan(model, layers, scales, wrong_numbers)
    problems |= misfits
    skipped = tuple(f"{key} {tuple(tensors[key].shape)}: {why}" for key, why in problems.items())
    applied = len(tensors) - len(problems)
    if problems and (applied == 0 or not allow_partial):
        reason = describe_other_kind(name, tensors) or (
            f"{name} ({format_name} format) does not fit {type(model).__name__}: {applied} of "
            f"{len(tensors)} keys match; {shorten(skipped)}"
        )
        raise LoadingError(reason + (PARTIAL if applied else ""))
    _require_writable([target for target, _ in additions])
    if strength != 0:
        for target, change in additions:
            _apply(target, change, strength)
    report = LoraReport(
        source=name,
        format=format_name,
        strength=strength,
        applied=applied,
        total=len(tensors),
        skipped=skipped,
        metadata=metadata,
    )
    logger.log(logging.WARNING if skipped else logging.INFO, "%s", report.describe())
    return report


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


def _list_places(model: nn.Module) -> set[str]:
    """Layers and bare parameters."""
    names = {name for name, _ in model.named_parameters()}
    names |= {f"{name}.weight" for name, _ in packed_layers(model)}
    return names | {name.rpartition(".")[0] for name in names}


def _plan(
    model: nn.Module, layers: Layers, scales: Mapping[str, float], wrong: Mapping[str, str]
) -> tuple[list[tuple[Target, _Change]], dict[str, str]]:
    """Changes to make with their targets, and the reason for each key that has no place in them."""
    targets = _find_targets(model)
    additions: list[tuple[Target, _Change]] = []
    problems: dict[str, str] = {}
    for place, parts in layers.items():
        changes = _low_rank_changes(place, parts, scales.get(place, 1.0))
        changes += _full_changes(place, parts, targets)
        used = {key for change in changes for key in change.keys}
        bad = {p.key: MISSING for p in parts.values() if p.key not in used}
        found: list[tuple[Target, _Change]] = []
        for change in changes:
            if (target := _choose_target(change, targets)) is None:
                bad |= dict.fromkeys(change.keys, _explain_misfit(change, targets))
            else:
                found.append((target, change))
        bad |= {p.key: wrong[p.key] for p in parts.values() if p.key in wrong}
        if bad:  # a layer goes in whole or not at all
            problems |= dict.fromkeys((p.key for p in parts.values()), "its layer has a wrong key")
            problems |= bad
        else:
            additions += found
    return additions, problems


def _find_targets(model: nn.Module) -> dict[str, list[Target]]:
    """Parameters by name; of a widened patch embedding also the half that is the base model's."""
    targets: dict[str, list[Target]] = {name: [p] for name, p in model.named_parameters()}
    targets |= {f"{name}.weight": [layer] for name, layer in packed_layers(model)}
    if isinstance(model, SegmentTransformer3DModel):
        num_base_channels = model.config["out_channels"]
        if model.config["in_channels"] == 2 * num_base_channels:
            weight = model.patch_embedding.weight
            targets[PATCH_EMBEDDING].append(weight[:, :num_base_channels])
    return targets


def _low_rank_changes(place: str, parts: Mapping[str, LoraPart], scale: float) -> list[_Change]:
    if "down" not in parts or "up" not in parts:
        return []
    down, up = parts["down"], parts["up"]
    pair = tuple(parts[kind].key for kind in ("down", "up", "alpha", "rank") if kind in parts)
    changes = [_Change(f"{place}.weight", pair, up.tensor, down.tensor, scale)]
    if bias := parts.get("up_bias"):
        changes.append(_Change(f"{place}.bias", (bias.key,), bias.tensor, None, scale))
    return changes


def _full_changes(
    place: str, parts: Mapping[str, LoraPart], targets: Mapping[str, list[Target]]
) -> list[_Change]:
    parameters = {
        "diff": place if place in targets else f"{place}.weight",
        "diff_b": f"{place}.bias",
        "diff_m": place,
    }
    return [
        _Change(parameter, (parts[kind].key,), parts[kind].tensor, None, 1.0)
        for kind, parameter in parameters.items()
        if kind in parts
    ]


def _choose_target(change: _Change, targets: Mapping[str, list[Target]]) -> Target | None:
    return next((t for t in targets.get(change.parameter, ()) if _fits(change, t)), None)


def _shape_of(target: Target) -> torch.Size:
    return target.weight.shape if isinstance(target, PackedLinear) else target.shape


def _fits(change: _Change, target: Target) -> bool:
    left, right, shape = change.left, change.right, _shape_of(target)
    if right is None:
        return left.shape == shape and not isinstance(target, PackedLinear)
    return (
        left.ndim >= 2
        and right.ndim >= 2
        and right.shape[0] > 0
        and (left.shape[0], left.shape[1:].numel()) == (shape[0], right.shape[0])
        and (right.shape[1:] == shape[1:] or right.shape[1:] == (shape[1:].numel(),))
    )


def _explain_misfit(change: _Change, targets: Mapping[str, list[Target]]) -> str:
    found = targets.get(change.parameter, ())
    if change.right is None and any(isinstance(target, PackedLinear) for target in found):
        return (
            f"it is a whole difference, and the model keeps {change.parameter} packed as in its fp8 "
            "or GGUF file, which takes pairs alone; use the bf16 files"
        )
    shapes = " or ".join(str(tuple(_shape_of(target))) for target in found)
    return (
        f"does not fit {change.parameter} {shapes}"
        if shapes
        else f"the model has no {change.parameter}"
    )


def _require_writable(targets: list[Target]) -> None:
    for layer in targets:
        target = layer.packed if isinstance(layer, PackedLinear) else layer
        if target.is_meta:
            raise LoadingError("the model has no weights yet; load them before merging a LoRA")
        if isinstance(layer, PackedLinear):
            continue
        if not target.is_floating_point() or target.element_size() < 2:
            raise LoadingError(
                f"the model's weights are quantized ({target.dtype}); merge the LoRA before that"
            )


@torch.no_grad()
def _apply(target: Target, change: _Change, strength: float) -> None:
    if isinstance(target, PackedLinear):
        assert change.right is not None  # see _fits
        up = change.left.flatten(1).float() * (strength * change.scale)
        target.add_low_rank(up, change.right.flatten(1))
        return
    dtype = torch.promote_types(target.dtype, torch.float32)
    delta = change.left.to(target.device, dtype)
    if change.right is not None:
        delta = delta.flatten(1) @ change.right.to(target.device, dtype).flatten(1)
    delta = delta.reshape(target.shape) * (strength * change.scale)
    target.copy_(target.to(dtype) + delta)
