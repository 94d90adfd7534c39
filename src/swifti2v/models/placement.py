"""Where components live: all on the device, or in host memory and on the device while used."""

from typing import Any, Literal, get_args

import torch
from diffusers.hooks.group_offloading import apply_group_offloading
from torch import nn
from transformers import CLIPVisionModel, UMT5EncoderModel

from swifti2v.errors import ConfigError
from swifti2v.models.codec import BlockCodec
from swifti2v.models.loading import Components

Placement = Literal["resident", "streamed"]
HOST = torch.device("cpu")


def require_placement(plan: str) -> None:
    """Refuse an unknown plan, before anything is loaded.

    Raises:
        ConfigError: Naming the plans there are.
    """
    if plan not in get_args(Placement):
        raise ConfigError(f"placement {plan!r} is unknown; use {' or '.join(get_args(Placement))}")


def loading_device(device: torch.device, plan: Placement) -> torch.device:
    """Where ``load_components`` shall put the weights for a plan: the host if they are streamed."""
    return device if plan == "resident" else HOST


def place(components: Components, device: torch.device, plan: Placement) -> None:
    """Put every model where a plan wants it, in place; ``components.device`` becomes ``device``.

    ``resident`` moves all weights to the device. ``streamed`` leaves them in host memory and
    brings them to the device block by block when they are used; on CUDA the next block is copied
    while one computes. Results do not depend on the plan.

    Args:
        components: As loaded; LoRAs are merged already.
        device: What computes.
        plan: ``resident`` or ``streamed``.

    Raises:
        ConfigError: An unknown plan, or components that are streamed already.
    """
    require_placement(plan)
    models = _models(components)
    if any(is_streamed(model) for model in models):
        raise ConfigError("the components are streamed already; load them again to place them anew")
    for model in models:
        if plan == "resident" or isinstance(model, BlockCodec):  # the codec has no weights
            model.to(device)
        else:
            _stream(model, device)
    components.device = device


def is_streamed(model: nn.Module) -> bool:
    """Whether ``place`` made the model's weights move."""
    return any(hasattr(module, "_diffusers_hook") for module in model.modules())


def _models(components: Components) -> list[nn.Module]:
    parts: list[Any] = [
        components.text_encoder,
        components.image_encoder,
        components.stage1_transformer,
        components.stage1_vae,
        components.stage2_transformer,
        components.stage2_vae,
    ]
    return list({id(part): part for part in parts if part is not None}.values())


def _stream(model: nn.Module, device: torch.device) -> None:
    model.to(HOST)
    blocks: list[str] | None = None
    use_stream = device.type == "cuda"
    if isinstance(model, UMT5EncoderModel):
        model = model.encoder  # holds all weights; the shared embedding is its own
    elif isinstance(model, CLIPVisionModel):
        blocks = ["encoder"]  # its layers are one level deeper, where prefetching does not reach
        use_stream = False
    apply_group_offloading(
        model,
        onload_device=device,
        offload_device=HOST,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=use_stream,
        block_modules=blocks,
    )
