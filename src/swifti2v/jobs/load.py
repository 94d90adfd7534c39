"""The pipeline that a resolved request needs; a caller may keep it for the next one."""

import logging

import torch

from swifti2v.jobs.devices import cache_dir
from swifti2v.jobs.resolve import Resolved
from swifti2v.jobs.sharing import share_models
from swifti2v.models.loading.availability import find_missing_weights, require_obtainable
from swifti2v.models.loading.components import STAGES
from swifti2v.models.text import PromptCache
from swifti2v.pipelines.outline import outline_pipeline
from swifti2v.pipelines.two_stage import SwiftI2VPipeline

progress = logging.getLogger("swifti2v.progress")


def load(resolved: Resolved) -> SwiftI2VPipeline:
    """Load the model with its LoRAs where the request wants it; only the stages that run.

    Raises:
        LoadingError: Weights are neither here nor to be had, or damaged.
        ConfigError: A setting that the model does not take.
        ShapeError: A size that the processes cannot share.
    """
    settings, num_processes = resolved.settings, resolved.request.num_processes
    with_stage1 = settings.motion is None
    missing = find_missing_weights(settings.model, with_stage1=with_stage1)
    require_obtainable(settings.model, missing)
    progress.info("loading %s", settings.model)
    pipe = SwiftI2VPipeline.from_pretrained(
        settings.model,
        torch_dtype=getattr(torch, settings.dtype),
        device=resolved.device,
        placement=resolved.placement,
        loras=settings.loras,
        stages=STAGES if with_stage1 else ("stage2",),
        speed={stage: getattr(settings.config, stage).speed for stage in STAGES},
    )
    if num_processes > 1:
        share_models(pipe, settings.config, num_processes, resolved.device)
    pipe.encoder.cache = PromptCache(cache_dir() / "prompts")
    if settings.preview_decoder is not None:
        pipe.load_preview_decoder(settings.preview_decoder.path)
    return pipe


def outline(resolved: Resolved) -> SwiftI2VPipeline:
    """The model without its weights, to check a request for one that is not on this machine."""
    settings = resolved.settings
    dtype = getattr(torch, settings.dtype)
    return outline_pipeline(settings.model, settings.config, dtype, resolved.device)
