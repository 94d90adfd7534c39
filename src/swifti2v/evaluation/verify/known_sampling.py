"""Sampling settings that are known for weights: those of the models that ship with this package."""

import filecmp
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from swifti2v.config import GenerationConfig, SamplingConfig, StageName, parse_config
from swifti2v.evaluation.verify.files import Outlines
from swifti2v.evaluation.verify.findings import Finding, judge
from swifti2v.models.loading.official import locate
from swifti2v.models.loading.sources import ComponentSource, ModelIndex, find_model, is_on_hub
from swifti2v.shipped import PACKAGE

COMPARED = ("shift", "parameterization", "sigmas", "rule")
"""Settings of sampling that belong to weights; steps and strength are free, and with ``sigmas`` the shift."""


class Known(NamedTuple):
    """Settings that weights are sampled with."""

    sampling: SamplingConfig
    model: str
    """Shipped model that has these weights."""


def find_known(
    index: ModelIndex, root: Path, stage: StageName, dropped_loras: Collection[str]
) -> Known | None:
    """Settings of a stage's transformer, if it is that of a model that ships; else None."""
    role = f"{stage}_transformer"
    source = index.components[role]
    fitting = tuple(lora for lora in source.loras if lora.path not in dropped_loras)
    source = replace(source, loras=fitting)
    names = ["nano", *sorted(file.stem for file in (PACKAGE / "presets").glob("*.yaml"))]
    for name in names:
        other, other_root = find_model(name)
        others = [other.in_variant(variant).components[role] for variant in other.variants()]
        if any(_is_same(role, (source, root), (each, other_root)) for each in others):
            config = parse_config(GenerationConfig, other.settings, name)
            return Known(getattr(config, stage).sampling, name)
    return None


def _is_same(
    role: str, one: tuple[ComponentSource, Path], other: tuple[ComponentSource, Path]
) -> bool:
    """Whether two sources are the same place on the Hub, or files of the same content."""
    (first, root), (second, other_root) = one, other
    if first.weights != second.weights or {x.path for x in first.loras} != {
        x.path for x in second.loras
    }:
        return False
    if is_on_hub(first.source, root) or is_on_hub(second.source, other_root):
        return (first.source, first.subfolder) == (second.source, second.subfolder)
    return _weights(role, first, root, second, other_root)


def _weights(
    role: str, first: ComponentSource, root: Path, second: ComponentSource, other_root: Path
) -> bool:
    folders = [
        locate(role, source, place) for source, place in ((first, root), (second, other_root))
    ]
    files = [{f.name: f for f in sorted(folder.glob("*.safetensors"))} for folder in folders]
    return (
        bool(files[0])
        and files[0].keys() == files[1].keys()
        and all(filecmp.cmp(file, files[1][name], shallow=False) for name, file in files[0].items())
    )


def check_sampling(
    outlines: Outlines, stage: StageName, sampling: SamplingConfig, dropped_loras: Collection[str]
) -> Finding:
    """Whether a stage is sampled as its weights are known to be.

    Args:
        outlines: The model.
        stage: The stage.
        sampling: Its settings.
        dropped_loras: Paths of LoRAs that do not fit, and are left out.

    Raises:
        SkippedError: The weights are not there.
    """
    outlines.need(f"{stage}_transformer")
    known = find_known(outlines.index, outlines.root, stage, dropped_loras)
    has_ladder = known is not None and known.sampling.sigmas is not None
    names = [name for name in COMPARED if not (has_ladder and name == "shift")]
    values = {name: getattr(sampling, name) for name in names}
    if known is None:
        return judge(f"sampling of {stage}", values, "not known for these weights", {})
    wanted = {name: getattr(known.sampling, name) for name in names}
    words = {"shift": "wrong shift", "parameterization": "wrong prediction type"}
    causes = {
        f"{words.get(name, f'wrong {name}')}: {stage}.sampling.{name} is {values[name]}, and these weights "
        f"({known.model}) are sampled with {wanted[name]}": values[name] != wanted[name]
        for name in names
    }
    expected = ", ".join(f"{name} {wanted[name]}" for name in names)
    return judge(f"sampling of {stage}", values, expected, causes)
