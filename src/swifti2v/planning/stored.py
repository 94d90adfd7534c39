"""Counts that ship: a plan of a shipped model needs neither PyTorch nor the seconds of counting.

``runs/plan_counts.py`` writes them anew; ``tests/unit/planning/test_stored.py`` holds them to what is
counted.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from swifti2v.config import AttentionConfig, GenerationConfig, to_dict
from swifti2v.models.loading.sources import (
    ComponentSource,
    ModelIndex,
    find_model,
    split_variant,
)
from swifti2v.planning.costs import ClipCosts, ClipWork, Count, CountedStage, StageWork
from swifti2v.planning.devices import Precision
from swifti2v.planning.variants import in_variant

STORED = Path(str(resources.files("swifti2v"))) / "planning" / "counts.json"
"""Works of clips by ``fingerprint``."""
WITHOUT_WEIGHTS = ("tokenizer", "image_processor")
WORKS = TypeAdapter(list[ClipWork])


def find_costs(
    model: str, config: GenerationConfig, precision: Precision, *, with_stage1: bool = True
) -> ClipCosts:
    """Costs of a clip: stored ones, or counted now.

    Args:
        model: See ``swifti2v.models.loading.sources.find_model``.
        config: Settings of the clip.
        precision: Number type of the weights.
        with_stage1: Whether Stage I runs.

    Raises:
        ConfigError: No such model.
        LoadingError: The configuration of a component cannot be found.
        ShapeError: The size or the frame count does not fit the model.
    """
    whole, variant = split_variant(model)
    index, root = find_model(whole)
    key = fingerprint(index, root, config, precision)
    stored = json.loads(STORED.read_text(encoding="utf-8")).get(key) if key else None
    if stored is None:
        costs = count_live(whole, config, precision, with_stage1=with_stage1)
    else:
        works, cells = WORKS.validate_python(stored["works"]), tuple(stored["cells"])
        costs = StoredCosts(whole, config, precision, works, cells, with_stage1=with_stage1)
    return in_variant(costs, index, variant)  # the same architectures, packed


def count_live(
    model: str, config: GenerationConfig, precision: Precision, *, with_stage1: bool = True
) -> ClipCosts:
    """Costs of a clip, counted on demand; see ``find_costs``."""
    import torch

    from swifti2v.planning.models import Models, speed_of
    from swifti2v.planning.work import ClipCounter

    models = Models(model, getattr(torch, precision), speed_of(config))
    return ClipCounter(models, config, with_stage1=with_stage1)


class StoredCosts:
    """Stored costs of a clip; missing ones are counted on demand.

    Args:
        name: Name of the model.
        config: See ``find_costs``.
        precision: See ``find_costs``.
        works: Stored work, with Stage I.
        cells: Height and width of Stage II's latents.
        with_stage1: Whether Stage I runs.
    """

    def __init__(
        self,
        name: str,
        config: GenerationConfig,
        precision: Precision,
        works: list[ClipWork],
        cells: tuple[int, int],
        *,
        with_stage1: bool,
    ) -> None:
        self.name, self.cells = name, cells
        self._config, self._precision, self._with_stage1 = config, precision, with_stage1
        self._works = {(work.vae_tile, work.offloads_history): work for work in works}

    @property
    def linear(self) -> Mapping[str, str]:
        """Kind of the linear layers by component."""
        config = self._config
        return {
            "stage1_transformer": config.stage1.speed.linear,
            "stage2_transformer": config.stage2.speed.linear,
        }

    def count(self, vae_tile: int | None = None, *, offloads_history: bool = False) -> ClipWork:
        """Work of the clip, see ``ClipCounter``."""
        work = self._works.get((vae_tile, offloads_history))
        if work is None:
            return self._live.count(vae_tile, offloads_history=offloads_history)
        return work if self._with_stage1 else _without_stage1(work)

    @cached_property
    def _live(self) -> ClipCosts:
        config, precision = self._config, self._precision
        return count_live(self.name, config, precision, with_stage1=self._with_stage1)


def _without_stage1(work: ClipWork) -> ClipWork:
    nothing: dict[CountedStage, StageWork] = {
        stage: StageWork(count=Count(), passes={}) for stage in ("image", "stage1")
    }
    return replace(work, stages={**work.stages, **nothing})


def fingerprint(
    index: ModelIndex, root: Path, config: GenerationConfig, precision: str
) -> str | None:
    """SHA-256 of all that the costs of a clip depend on, or None where only loading can tell.

    Args:
        index: Index of the model.
        root: Folder from which its relative paths start.
        config: Settings; what costs the same whatever it says is left out.
        precision: Number type of the weights.
    """
    components = {
        role: _describe(source, root)
        for role, source in index.components.items()
        if role not in WITHOUT_WEIGHTS
    }
    if None in components.values():
        return None
    stage2 = replace(config.stage2, attention=AttentionConfig(), vae_tile=None)
    settings = to_dict(replace(config, stage2=stage2, negative_prompt="", fps=16))
    for name, stage in (("stage1", config.stage1), ("stage2", config.stage2)):
        sampling = stage.sampling
        is_guided = sampling.guidance_scale > 1
        settings[name]["sampling"] = {"num_calls": sampling.num_calls, "is_guided": is_guided}
    twins = {role: index.twin(role) for role in components if index.twin(role) != role}
    known = [components, twins, index.max_text_length, settings, precision]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _describe(source: ComponentSource, root: Path) -> dict[str, Any] | None:
    """Architecture and number types; checkpoints and LoRAs add no work."""
    place = root / Path(source.source).expanduser() / source.subfolder
    architecture: Any = f"{source.source}/{source.subfolder}"
    if place.exists():
        try:
            values = json.loads((place / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        architecture = {
            key: value for key, value in values.items() if key not in ("_diffusers_version",)
        }
    types = {"encode": source.encode_dtype, "decode": source.decode_dtype}
    return {"architecture": architecture, "reference": source.reference, **types}
