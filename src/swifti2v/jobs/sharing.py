"""Models whose calls are shared between processes, see ``ClipRequest.num_processes``."""

import logging
from typing import Any

import torch

from swifti2v.config import GenerationConfig
from swifti2v.errors import ConfigError
from swifti2v.models.context_parallel import Bands, parallelize, require_heads
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.shapes import latent_frames

progress = logging.getLogger("swifti2v.progress")


def share_models(
    pipe: SwiftI2VPipeline, config: GenerationConfig, number: int, device: torch.device
) -> None:
    """Let a loaded pipeline share its model calls with the other processes.

    Stage I is small: where its tokens do not divide, each process makes all of it.

    Args:
        pipe: A pipeline; a stage that does not run is left alone.
        config: Settings of the clip.
        number: Processes.
        device: Device of this one.

    Raises:
        ConfigError: An attention that cannot be shared, or heads that do not divide.
        ShapeError: Rows of tokens of Stage II do not divide, or of Stage I where both are one model.
    """
    attention = config.stage2.attention
    if attention.kind != "full" or attention.context != "bidirectional":
        raise ConfigError(
            "--context-parallel goes with stage2.attention.kind full and context bidirectional, not "
            f"with {attention.kind} and {attention.context}"
        )
    Bands(number).rows(config.height // pipe.stage2.scale.side)
    require_heads(pipe.stage2.transformer, number)

    def share(transformer: Any) -> None:
        parallelize(transformer, number, device)

    num_parts, unit = _count_stage1_parts(pipe, config)
    if pipe.components.stage1_transformer is pipe.components.stage2_transformer:
        Bands(number).rows(num_parts)  # both stages are shared, or none
    elif num_parts % number:
        progress.info("Stage I's %d %s do not divide: each process makes all", num_parts, unit)
    else:
        pipe.staging.change("stage1_transformer", share)
    pipe.staging.change("stage2_transformer", share)


def _count_stage1_parts(pipe: SwiftI2VPipeline, config: GenerationConfig) -> tuple[int, str]:
    """Rows or tokens of Stage I, see ``parallelize``, and which of both."""
    side = pipe.stage1.scale.side * config.stage1.downscale
    rows, columns = config.height // side, config.width // side
    if isinstance(pipe.stage1.transformer, SegmentTransformer3DModel):
        return rows, "rows"
    frames = latent_frames(config.num_frames, pipe.stage1.scale.time)
    return frames * rows * columns, "tokens"
