"""Placement of components: all on the device, or in host memory and on the device while used."""

import gc
from typing import Any, get_args

import torch
from diffusers.hooks.group_offloading import apply_group_offloading
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn
from transformers import CLIPVisionModel, UMT5EncoderModel

from swifti2v.errors import ConfigError
from swifti2v.models.loading.components import Components
from swifti2v.models.runtime.pinning import pin_weights
from swifti2v.models.runtime.roles import Placement
from swifti2v.models.vae.block_codec import BlockCodec

HOST = torch.device("cpu")


def require_placement(plan: str) -> None:
    """Refuse an unknown plan, before anything is loaded.

    Raises:
        ConfigError: Naming the plans there are.
    """
    if plan not in get_args(Placement):
        raise ConfigError(f"placement {plan!r} is unknown; use {', '.join(get_args(Placement))}")


def loading_device(device: torch.device, plan: Placement) -> torch.device:
    """Device to which ``load_components`` puts the weights: the host if the plan streams them."""
    return device if plan == "resident" else HOST


def place(components: Components, device: torch.device, plan: Placement) -> None:
    """Put every model where a plan wants it, in place; ``components.device`` becomes ``device``.

    ``resident`` moves all weights to the device. ``streamed`` moves those of the VAEs, leaves the
    others in host memory and brings them to the device block by block when they are used; on CUDA
    the next block is copied while one computes. ``offloaded`` also keeps the causal history of the VAEs in host memory, but
    for what a frame goes through. Results do not depend on the plan.

    Args:
        components: As loaded; LoRAs are merged already.
        device: Device that computes.
        plan: ``resident``, ``streamed`` or ``offloaded``.

    Raises:
        ConfigError: An unknown plan, or components that are streamed already.
    """
    require_placement(plan)
    models = _models(components)
    if any(is_streamed(model) for model in models):
        raise ConfigError("the components are streamed already; load them again to place them anew")
    for model in models:
        place_model(model, device, plan)
    components.device = device
    components.offloads_history = plan == "offloaded"


def place_model(model: nn.Module, device: torch.device, plan: Placement) -> None:
    """Put one model where a plan wants it, in place; see ``place``."""
    if plan == "resident" or not can_stream(model):
        model.to(device)
    else:
        _stream(model, device)


def collect_memory(device: torch.device) -> None:
    """Give the memory of models that nobody holds any more back to host and device."""
    gc.collect()  # hooks and modules hold each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
        # PyTorch keeps freed pinned memory for itself; the call is newer than the oldest supported.
        getattr(torch.accelerator.memory, "empty_host_cache", lambda: None)()


def is_empty(model: nn.Module) -> bool:
    """Whether it has no weights: of a stage that does not run, or not loaded at the moment."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def require_loaded(components: Components, role: str) -> None:
    """Refuse to run a model without weights.

    Raises:
        ConfigError: Naming the role, and how to get it back.
    """
    if is_empty(getattr(components, role)):
        raise ConfigError(
            f"{role} has no weights: it was not loaded; load the pipeline again with both stages"
        )


def can_stream(model: nn.Module) -> bool:
    """Whether its weights can come to the device block by block.

    Those of a VAE stay there: they are few, and would be copied anew for every tile and frame.
    """
    return not isinstance(model, (AutoencoderKLWan, BlockCodec))


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
    loaded = [part for part in parts if part is not None and not is_empty(part)]
    return list({id(part): part for part in loaded}.values())


def streamed_groups(model: nn.Module) -> list[list[Tensor]]:
    """Weights that come to the device together when ``model`` is streamed.

    Returns:
        First those that stay while the model runs, then those of each block.
    """
    root, block_modules = _find_root(model)
    fixed: list[Tensor] = []
    blocks: list[list[Tensor]] = []
    pending: list[nn.Module] = [root]
    while pending:
        module = pending.pop()
        fixed += module.parameters(recurse=False)
        for name, child in module.named_children():
            if name in block_modules:
                pending.append(child)
            elif isinstance(child, (nn.ModuleList, nn.Sequential)):
                blocks += [list(block.parameters()) for block in child]
            else:
                fixed += child.parameters()
    return [fixed, *blocks]


def _find_root(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Find the module to hand to ``apply_group_offloading``, and its children that hold blocks."""
    if isinstance(model, UMT5EncoderModel):
        return model.encoder, []  # holds all weights; the shared embedding is its own
    if isinstance(model, CLIPVisionModel):
        return model, ["encoder"]  # its layers are one level deeper
    return model, list(getattr(model, "_group_offload_block_modules", None) or [])


def _stream(model: nn.Module, device: torch.device) -> None:
    model.to(HOST)
    root, block_modules = _find_root(model)
    # Prefetching does not reach the layers of CLIP, which are one level deeper.
    use_stream = device.type == "cuda" and not isinstance(model, CLIPVisionModel)
    if use_stream:
        pin_weights(root)
    apply_group_offloading(
        root,
        onload_device=device,
        offload_device=HOST,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=use_stream,
        block_modules=block_modules or None,
    )
