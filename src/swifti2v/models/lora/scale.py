"""The factor of each layer of a LoRA, alpha / rank, wherever its file keeps alpha.

A tensor beside the pair comes first, then the file's header, then PEFT's ``adapter_config.json``
beside the file. If none of these holds alpha, alpha is the rank, as in all public loaders.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from swifti2v.errors import LoadingError
from swifti2v.models.loading.sources import PEFT_CONFIG
from swifti2v.models.lora.keys import KEY, KOHYA_PREFIX, Layers, LoraPart, strip_prefixes

ADAPTER_CONFIG = "lora_adapter_metadata"
"""Key of the PEFT config in a file's header, as diffusers writes it."""
VERSION = "swifti2v_version"
"""Key in the header of files that ``models.lora.export`` writes: alpha is a tensor or in the
weights."""
SPELLINGS = {
    "lora_alpha": "lora_alpha",
    "alpha": "lora_alpha",
    "network_alpha": "lora_alpha",
    "ss_network_alpha": "lora_alpha",
    "r": "r",
    "rank": "r",
    "lora_rank": "r",
    "network_dim": "r",
    "ss_network_dim": "r",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "peft_type": "peft_type",
}
"""Names in headers -> those of PEFT's config."""
KOHYA_MODULE = re.compile(r"(.*\.)?networks\.lora(_\w+)?")
"""Networks of kohya's trainers, which keep alpha in tensors, in ``ss_network_module``."""
SAYS_NOTHING = (None, "", "None", "null")


class _Said(NamedTuple):
    """One value and the key that holds it."""

    spelling: str
    value: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """Facts about a LoRA's layers from its header or from a file beside it."""

    place: str = ""
    """Name of the place in errors."""
    values: Mapping[str, list[_Said]] = field(default_factory=dict)
    """Values by their names in PEFT's config."""

    def scale(self, names: tuple[str, ...], rank: int) -> float:
        """``alpha / rank`` of a layer; 1 where the file holds no alpha.

        Args:
            names: All names of the layer.
            rank: Rank of its weights.

        Raises:
            LoadingError: Alpha is not a number above 0, or the stored rank differs from that of the
                weights.
        """
        alpha = self._number("lora_alpha", "alpha_pattern", names)
        if alpha is None:
            return 1.0
        told = self._number("r", "rank_pattern", names)
        if told is not None and told != rank:
            raise LoadingError(
                f"{self.place} says rank {told:g} for {names[0]}, the weights have rank {rank}: it "
                "belongs to another LoRA"
            )
        return alpha / (math.sqrt(rank) if self._is_set("use_rslora") else rank)

    def require_plain(self) -> None:
        """Refuse a config of another kind of adapter.

        Raises:
            LoadingError: Saying which.
        """
        kind = next((str(said.value) for said in self.values.get("peft_type", ())), "LORA")
        kind = "DoRA" if self._is_set("use_dora") else kind
        if kind.upper().removeprefix("PEFTTYPE.") != "LORA":
            raise LoadingError(
                f"{self.place} describes an adapter of the kind {kind}, not a plain LoRA; merge it "
                "with the program that made it, and give the merged weights"
            )

    def _is_set(self, name: str) -> bool:
        return any(str(said.value).lower() in ("true", "1") for said in self.values.get(name, ()))

    def _number(self, name: str, pattern_name: str, names: tuple[str, ...]) -> float | None:
        """A layer's number: that of the first pattern that matches, as in peft, or all layers'."""
        for spelling, patterns in self.values.get(pattern_name, ()):
            for pattern, value in _as_mapping(patterns, f"{self.place}: {spelling}").items():
                if self._matches(pattern, names):
                    return self._parse(f"{spelling} {pattern}", value)
        said = [s for s in self.values.get(name, ()) if s.value not in SAYS_NOTHING]
        numbers = {self._parse(*item): item.spelling for item in said}
        if len(numbers) > 1:
            told = " and ".join(sorted(f"{spelling} {n:g}" for n, spelling in numbers.items()))
            raise LoadingError(f"{self.place} contradicts itself: {told}; keep the right one")
        return next(iter(numbers), None)

    def _matches(self, pattern: str, names: tuple[str, ...]) -> bool:
        try:
            return any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in names)
        except re.error as error:
            raise LoadingError(
                f"{self.place}: {pattern!r} is not a regular expression ({error})"
            ) from error

    def _parse(self, spelling: str, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            raise LoadingError(
                f"{self.place} says {spelling} {value!r}, which must be a number above 0, and the "
                "file has no alpha beside its weights"
            )
        return number


def find_scales(
    layers: Layers, metadata: Mapping[str, str], file: Path | None
) -> tuple[dict[str, float], dict[str, str]]:
    """Factor on the product of each layer's pair.

    Args:
        layers: See ``group_by_layer``.
        metadata: Header of the file.
        file: The file or directory itself; None where the tensors come from elsewhere.

    Returns:
        Layer to factor, and the reason for each key that tells a wrong alpha or rank.

    Raises:
        LoadingError: Header or config cannot be read, tells another rank than the weights have or
            no alpha above 0, or describes another kind of adapter.
    """
    pairs = {place: parts for place, parts in layers.items() if {"down", "up"} <= parts.keys()}
    keys = [part.key for parts in pairs.values() for part in parts.values()]
    config = read_adapter_config(metadata, file, is_kohya=any(KOHYA_PREFIX in key for key in keys))
    config.require_plain()
    scales: dict[str, float] = {}
    problems: dict[str, str] = {}
    for place, parts in pairs.items():
        rank = rank_of(parts["down"])
        if "rank" in parts and (told := float(parts["rank"].tensor)) != rank:
            problems[parts["rank"].key] = f"it says {told:g}, the weights have rank {rank}"
        elif "alpha" not in parts:
            scales[place] = config.scale((place, _own_name(parts)), rank)
        elif (alpha := float(parts["alpha"].tensor)) > 0:
            scales[place] = alpha / rank
        else:
            problems[parts["alpha"].key] = f"alpha is {alpha:g}; it must be above 0"
    return scales, problems


def rank_of(down: LoraPart) -> int:
    """Rank of a pair by its down matrix; 1 of a tensor that can be none."""
    return down.tensor.shape[0] if down.tensor.ndim and down.tensor.numel() else 1


def _own_name(parts: Mapping[str, LoraPart]) -> str:
    """Name of a layer in the file itself."""
    match = KEY.fullmatch(strip_prefixes(parts["down"].key))
    assert match is not None  # or it were not sorted by layer
    return match["module"]


def read_adapter_config(
    metadata: Mapping[str, str], file: Path | None, *, is_kohya: bool
) -> AdapterConfig:
    """The config in a LoRA's header; where it tells no alpha, the one beside its file.

    Args:
        metadata: Header of the file.
        file: The file or its directory.
        is_kohya: Whether the keys are those of kohya's trainers.

    Raises:
        LoadingError: It cannot be read.
    """
    header = AdapterConfig(
        place=f"the header of {file}", values=_collect(_header_items(metadata, is_kohya, file))
    )
    if "lora_alpha" in header.values or VERSION in metadata or file is None:
        return header
    beside = (file if file.is_dir() else file.parent) / PEFT_CONFIG
    if not beside.is_file():
        return header
    items = _as_mapping(beside.read_bytes(), str(beside)).items()
    return AdapterConfig(place=str(beside), values=_collect(iter(items)))


def _header_items(
    metadata: Mapping[str, str], is_kohya: bool, file: Path | None
) -> Iterator[tuple[str, Any]]:
    """Names and values that may tell alpha, those in JSON too."""
    # musubi-tuner's convert_lora.py to ComfyUI's keys: alpha multiplied in, the header copied.
    is_converted = not is_kohya and KOHYA_MODULE.fullmatch(metadata.get("ss_network_module", ""))
    for name, text in metadata.items():
        if name == ADAPTER_CONFIG:
            yield from _as_mapping(text, f"the adapter config in {file}").items()
        elif VERSION not in metadata and not (is_converted and name.startswith("ss_")):
            yield name, text


def _collect(items: Iterator[tuple[str, Any]]) -> dict[str, list[_Said]]:
    """Values by PEFT's names; those for text encoders and for a second transformer are left out."""
    values: dict[str, list[_Said]] = {}
    for name, value in items:
        space, _, leaf = name.rpartition(".")
        if leaf in SPELLINGS and not space.startswith(("text_encoder", "transformer_2")):
            values.setdefault(SPELLINGS[leaf], []).append(_Said(name, value))
    return values


def _as_mapping(content: Any, place: str) -> Mapping[str, Any]:
    """A JSON object, parsed where it is still text."""
    try:
        return dict(json.loads(content) if isinstance(content, str | bytes) else content or {})
    except (ValueError, TypeError) as error:
        raise LoadingError(f"{place} cannot be read: {error}") from error
