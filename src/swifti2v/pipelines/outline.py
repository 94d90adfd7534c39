"""The two stages of a model whose weights are not there: sizes and segments, but no frames."""

from pathlib import Path
from typing import Any

import torch

from swifti2v.config import GenerationConfig, SpeedConfig, StageName
from swifti2v.models.loading.architectures import KINDS, find_architecture
from swifti2v.models.loading.components import STAGES, Components
from swifti2v.models.loading.sources import find_model
from swifti2v.pipelines.two_stage import SwiftI2VPipeline


def outline_pipeline(
    name: str | Path, config: GenerationConfig, dtype: torch.dtype, device: torch.device
) -> SwiftI2VPipeline:
    """Both stages as the configurations of their components say, without weights and tokenizer.

    Args:
        name: See ``SwiftI2VPipeline.from_pretrained``.
        config: Settings.
        dtype: Number type of the weights that are not there.
        device: Where they would go.

    Raises:
        ConfigError: An unknown name or key.
        LoadingError: The configuration of a component cannot be found.
    """
    index, root = find_model(name)
    models: dict[str, Any] = {
        role: find_architecture(role, source, root).make_empty(role).to(dtype)
        for role, source in index.components.items()
        if role in KINDS
    }
    speed: dict[StageName, SpeedConfig] = {stage: getattr(config, stage).speed for stage in STAGES}
    components = Components(
        **models,
        tokenizer=None,  # type: ignore[arg-type] # nothing is encoded
        max_text_length=index.max_text_length,
        device=device,
        speed=speed,
    )
    return SwiftI2VPipeline(components, config)
