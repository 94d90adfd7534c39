"""The pipeline that a resolved request needs; a caller may keep it for the next one."""

import logging

import torch

from swifti2v.jobs.devices import cache_dir
from swifti2v.jobs.resolve import Resolved
from swifti2v.jobs.sharing import share_models
from swifti2v.models.loading.availability import find_missing_weights, require_obtainable
from swifti2v.models.loading.components import STAGES, Components
from swifti2v.models.runtime.roles import Placement
from swifti2v.models.text import PromptCache
from swifti2v.pipelines.outline import outline_pipeline
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.planning.keeping import Room, decide_keeping
from swifti2v.planning.measurement import memory_bytes

progress = logging.getLogger("swifti2v.progress")


def load(resolved: Resolved, *, keeps: bool | None = None) -> SwiftI2VPipeline:
    """Load the model with its LoRAs where the request wants it; only the stages that run.

    Args:
        resolved: Request for the first clip that will be made.
        keeps: True loads all models, for one clip after the other; False each part of a run when it
            begins, see ``SwiftI2VPipeline.from_pretrained``; None keeps what there is room for.

    Raises:
        LoadingError: Weights are neither here nor to be had, or damaged.
        ConfigError: A setting that the model does not take.
        ShapeError: A size that the processes cannot share.
    """
    settings, num_processes = resolved.settings, resolved.request.num_processes
    with_stage1 = settings.motion is None
    missing = find_missing_weights(settings.model, with_stage1=with_stage1)
    require_obtainable(settings.model, missing)
    if keeps is None:
        room = find_room(resolved.device, resolved.placement)
        keeping = decide_keeping(weight_bytes(outline(resolved).components), room)
        keeps = keeping.keeps
        if not keeps:
            progress.info("%s: %s", settings.model, keeping.why)
    progress.info("loading %s", settings.model)
    pipe = SwiftI2VPipeline.from_pretrained(
        settings.model,
        torch_dtype=getattr(torch, settings.dtype),
        device=resolved.device,
        placement=resolved.placement,
        loras=settings.loras,
        stages=STAGES if with_stage1 else ("stage2",),
        speed={stage: getattr(settings.config, stage).speed for stage in STAGES},
        staged=not keeps,
    )
    if num_processes > 1:
        share_models(pipe, settings.config, num_processes, resolved.device)
    pipe.encoder.cache = PromptCache(cache_dir() / "prompts")
    if settings.preview_decoder is not None:
        pipe.load_preview_decoder(settings.preview_decoder.path)
    return pipe


def find_room(device: torch.device, placement: Placement) -> Room:
    """Memory in which the weights of a model lie on this machine."""
    if device.type == "cpu" or placement != "resident":
        return Room("host", memory_bytes(torch.device("cpu")))
    return Room("device", memory_bytes(device))


def weight_bytes(components: Components) -> int:
    """Memory that the weights of a model take."""
    models = (getattr(components, role) for role in components.__slots__)
    tensors = [
        tensor
        for model in models
        if isinstance(model, torch.nn.Module)
        for tensor in (*model.parameters(), *model.buffers())
    ]
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())  # stages may share a VAE


def outline(resolved: Resolved) -> SwiftI2VPipeline:
    """The model without its weights, to check a request for one that is not on this machine."""
    settings = resolved.settings
    dtype = getattr(torch, settings.dtype)
    return outline_pipeline(settings.model, settings.config, dtype, resolved.device)
