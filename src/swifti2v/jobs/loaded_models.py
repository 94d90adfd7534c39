"""Pipelines that stay loaded between jobs, within one memory budget."""

import logging
from collections import OrderedDict

import torch

from swifti2v.jobs.load import load, outline, weight_bytes
from swifti2v.jobs.resolve import Resolved
from swifti2v.models.runtime.placement import collect_memory
from swifti2v.pipelines.two_stage import SwiftI2VPipeline

logger = logging.getLogger(__name__)


class LoadedModels:
    """Pipelines by what they were loaded from; the least recently used one leaves first.

    A model for which there is no room loads its parts for every job anew, see ``load``.

    Args:
        budget_bytes: Weights that may be held at once; a model that is larger is held alone.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._held: OrderedDict[str, tuple[SwiftI2VPipeline, int]] = OrderedDict()

    @property
    def names(self) -> list[str]:
        """Models that are held, the least recently used first."""
        return [key.split("\n")[0] for key in self._held]

    def get(self, resolved: Resolved) -> SwiftI2VPipeline:
        """The pipeline of a request, loaded if it is not held.

        Raises:
            SwiftI2VError: See ``swifti2v.jobs.load.load``.
        """
        key = _key(resolved)
        if key not in self._held:
            size = weight_bytes(outline(resolved).components)
            self._make_room(size, resolved.device)
            self._held[key] = load(resolved), size
        self._held.move_to_end(key)
        return self._held[key][0]

    def _make_room(self, size: int, device: torch.device) -> None:
        while self._held and size + self._held_bytes > self._budget_bytes:
            key, _ = self._held.popitem(last=False)
            logger.info("%s leaves the memory", key.split("\n")[0])
            collect_memory(device)

    @property
    def _held_bytes(self) -> int:
        return sum(size for _, size in self._held.values())


def _key(resolved: Resolved) -> str:
    """All that decides what is loaded."""
    settings, config = resolved.settings, resolved.settings.config
    parts = (
        settings.model,
        settings.model_sha256,
        settings.dtype,
        resolved.device,
        resolved.placement,
        settings.loras,
        settings.motion is None,
        config.stage1.speed,
        config.stage2.speed,
    )
    return "\n".join(map(str, parts))
