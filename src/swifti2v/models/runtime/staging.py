"""Models that are in memory only while a part of a run needs them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Timer
from typing import Any

import torch

from swifti2v.config import SpeedConfig, StageName
from swifti2v.models.loading.components import (
    STAGES,
    WITHOUT_WEIGHTS,
    Components,
    FoundComponents,
)
from swifti2v.models.loading.sources import NOTICE_SECONDS, progress
from swifti2v.models.runtime.placement import (
    collect_memory,
    is_empty,
    loading_device,
    place_model,
)
from swifti2v.models.runtime.roles import PARTS, Placement
from swifti2v.models.runtime.speed import prepare_speed, require_same_speed
from swifti2v.models.weights.quantization import require_float8


class Staging:
    """Loads components of a model when a part of a run begins, and frees them when it ends.

    Args:
        components: Those in ``roles`` have no memory.
        roles: Components that are loaded by parts; none where all of them stay in memory.
        load: Gives one of them, loaded and placed.
        twins: Role by role of the one that is loaded in its place, see ``FoundComponents.twin``.
            A model that a later part of a run shares stays in memory until then.
    """

    def __init__(
        self,
        components: Components,
        roles: Iterable[str] = (),
        load: Callable[[str], Any] | None = None,
        twins: Mapping[str, str] | None = None,
    ) -> None:
        self._components = components
        self._load = load
        self._twins = dict(twins or {})
        self._kept: dict[str, Any] = {}
        self._empty = {role: getattr(components, role) for role in roles}
        self._changes: dict[str, Callable[[Any], None]] = {}
        self.on_change: Callable[[], None] = lambda: None
        """Called when other models stand in ``components``, so that nobody holds the old ones."""

    @property
    def is_staged(self) -> bool:
        """Whether components are loaded by parts."""
        return bool(self._empty)

    def change(self, role: str, change: Callable[[Any], None]) -> None:
        """Change a component in place: now, or each time that it is loaded.

        Args:
            role: A field of ``Components``; of one that never has weights nothing is changed.
            change: Gets the component, loaded and placed.
        """
        model = getattr(self._components, role)
        if role in self._empty:
            self._changes[self._twins.get(role, role)] = change
        elif not is_empty(model):
            change(model)

    @contextmanager
    def hold(self, *roles: str) -> Iterator[None]:
        """Have components in memory within the block; those that are there already stay.

        Args:
            roles: Fields of ``Components``.

        Raises:
            LoadingError: Weights cannot be read.
        """
        parts, empty = self._components, self._empty
        absent = [role for role in roles if role in empty and getattr(parts, role) is empty[role]]
        if not absent:
            yield
            return
        names = {role: self._twins.get(role, role) for role in absent}
        models = {name: m for name, m in self._kept.items() if name in names.values()}
        self._kept.clear()
        try:
            for role, name in names.items():
                if name not in models:
                    models[name] = self._load_changed(name)
                setattr(parts, role, models[name])
            self.on_change()
            yield
        finally:
            for role in absent:
                setattr(parts, role, empty[role])
            self._kept = {name: m for name, m in models.items() if self._is_due(name, absent)}
            del models
            self.on_change()
            collect_memory(parts.device)

    def _load_changed(self, name: str) -> Any:
        assert self._load is not None
        model = self._load(name)
        if name in self._changes:
            self._changes[name](model)
        return model

    def _is_due(self, name: str, held: Sequence[str]) -> bool:
        """Whether a later part of a run than that of ``held`` has the same model."""
        places = {role: place for place, part in enumerate(PARTS) for role in part}
        now = max(places[role] for role in held)
        return any(
            self._twins.get(role, role) == name and places[role] > now for role in self._empty
        )


def stage_components(
    found: FoundComponents,
    dtype: torch.dtype,
    device: torch.device,
    placement: Placement,
    speed: Mapping[StageName, SpeedConfig],
) -> tuple[Components, Staging]:
    """Components of which only tokenizer and image processor are loaded, and what loads the others.

    The files of all of them are looked through now, see ``FoundComponents.outline``.

    Args:
        found: The model.
        dtype: Number type of the weights.
        device: Device that computes.
        placement: Placement of each part of a run while it is loaded.
        speed: Speed settings by stage.

    Raises:
        LoadingError: A file is damaged, or its weights do not match.
        ConfigError: The device cannot compute as ``speed`` asks.
    """
    if any(speed[stage].linear == "float8" for stage in found.stages):
        require_float8(device)
    outlined = found.each(lambda role: found.outline(role, dtype))
    components, _ = found.assemble(outlined, device)
    require_same_speed(components, speed)
    components.offloads_history = placement == "offloaded"
    components.speed = dict(speed)
    load = partial(_load, found, dtype, device, placement, speed)
    roles = [role for role in found.files if role not in WITHOUT_WEIGHTS]
    return components, Staging(components, roles, load, {r: found.twin(r) for r in roles})


def _load(
    found: FoundComponents,
    dtype: torch.dtype,
    device: torch.device,
    placement: Placement,
    speed: Mapping[StageName, SpeedConfig],
    role: str,
) -> Any:
    """A component, prepared for speed and placed; said where it takes long."""
    notice = Timer(NOTICE_SECONDS, progress.info, ["loading %s", role])
    notice.daemon = True
    notice.start()
    try:
        model = found.load(role, dtype, loading_device(device, placement)).component
        for stage in STAGES:
            if role == f"{stage}_transformer":
                prepare_speed(model, speed[stage], device)
        place_model(model, device, placement)
    finally:
        notice.cancel()
    return model
