"""The model that a training starts from."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from swifti2v.config import GenerationConfig, StageName, parse_config
from swifti2v.errors import ConfigError
from swifti2v.models.loading.components import load_components
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.weights.packed import is_packed
from swifti2v.pipelines.two_stage import SwiftI2VPipeline


def load_for_training(
    model: str,
    generation: Mapping[str, Any],
    stage: StageName,
    roles: Collection[str],
    device: torch.device,
    *,
    merges_own_loras: bool = False,
) -> SwiftI2VPipeline:
    """Load one stage of a model, all of it frozen; the other one gets no memory.

    Components of ``roles`` are on the device. The stage's others stay in host memory, and its
    transformer is loaded only if it is among them. A LoRA is trained on the many-step base, without
    the model's own few-step one.

    Raises:
        ConfigError: A setting is not possible, or the transformer's weights are packed.
        LoadingError: A file is missing or damaged.
    """
    # Frozen parts need no more than 16 bits on a GPU; trained parts become float32 again.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    parts, defaults = load_components(
        model,
        dtype,
        torch.device("cpu"),
        merges_own_loras=merges_own_loras,
        stages=(stage,),
        skipped={f"{stage}_transformer"} - {*roles},
    )
    if stage == "stage1" and isinstance(parts.stage1_transformer, SegmentTransformer3DModel):
        raise ConfigError(
            f"Stage I of {model} takes the photo as its first frame, and what is trained sees it in "
            "channels of its own: start from a model such as paper"
        )
    transformer = f"{stage}_transformer"
    if transformer in roles and is_packed(getattr(parts, transformer)):
        raise ConfigError(
            f"{transformer} of {model} keeps the fp8 or GGUF weights of its file, which cannot be "
            "trained; start from the model's bf16 files"
        )
    for role in roles:
        if (component := getattr(parts, role)) is not None:
            component.to(device)
    parts.device = device
    pipe = SwiftI2VPipeline(parts, parse_config(GenerationConfig, defaults, model))
    pipe.config = pipe.configure(**generation)
    pipe.encoder.truncate_prompt = True
    return pipe
