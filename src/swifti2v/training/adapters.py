"""LoRA adapters for training: put on a frozen transformer, read out and put back."""

import logging
import math
import re
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from swifti2v.config import settings
from swifti2v.errors import ConfigError, InputError, LoadingError
from swifti2v.models.weights.names import shorten

logger = logging.getLogger(__name__)

BLOCK_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
"""Queries, keys, values and output of self- and cross-attention, and both feed-forward layers."""
ADAPTER_NAME = "default"


@settings
class AdapterConfig:
    """A LoRA to train.

    Source:
        Rank, alpha and targets by default as in ViBe's code (arXiv:2603.23326).
    """

    rank: int = 32
    """Rank of every pair."""
    alpha: float | None = None
    """The change of a weight is ``alpha / rank * up @ down``; none means the rank."""
    target_modules: tuple[str, ...] = BLOCK_TARGETS
    """Regular expressions for the ends of layer names, from a dot on; all matches get a pair."""
    use_dora: bool = False
    """Train a magnitude for every output feature too; such a file loads in diffusers only."""
    seed: int = 0
    """Seed of the down matrices; the up matrices start at zero."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}; it must be at least 1")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"alpha is {self.alpha}; it must be a number above 0, or null")
        if not self.target_modules:
            raise ConfigError(f"target_modules is empty; the usual ones are {BLOCK_TARGETS}")
        for target in self.target_modules:
            try:
                re.compile(target)
            except re.error as error:
                raise ConfigError(
                    f"target_modules: {target!r} is not a regular expression ({error})"
                ) from None

    @property
    def resolved_alpha(self) -> float:
        """Alpha, also where it is not given."""
        return float(self.rank) if self.alpha is None else self.alpha


def add_adapter(transformer: nn.Module, config: AdapterConfig) -> list[str]:
    """Freeze a transformer and put a LoRA on it; its output stays what it was.

    The adapter's weights are float32 whatever the dtype of the base, and the same for the same seed
    on every device; global random state is left alone.

    Returns:
        Names of the trainable parameters, all of the adapter.

    Raises:
        ConfigError: A target matches no linear or convolutional layer.
        InputError: The transformer has an adapter already.
        LoadingError: It has no weights yet.
    """
    if getattr(transformer, "peft_config", None):
        raise InputError(f"the {type(transformer).__name__} has an adapter; load a fresh model")
    if any(parameter.is_meta for parameter in transformer.parameters()):
        raise LoadingError("the transformer has no weights yet; load them before adding an adapter")
    names = find_targets(transformer, config.target_modules)
    transformer.requires_grad_(False)
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.resolved_alpha,  # type: ignore[arg-type] # peft divides, so any number does
        target_modules=names,
        use_dora=config.use_dora,
    )
    model: Any = transformer
    with torch.random.fork_rng(devices=[]):  # peft draws weights of its own, on the CPU
        model.add_adapter(peft_config, ADAPTER_NAME)
    layers = [layer for layer in transformer.modules() if isinstance(layer, LoraLayer)]
    assert len(layers) == len(names)
    generator = torch.Generator().manual_seed(config.seed)
    for layer in layers:
        _initialize(layer, generator)
    trainable = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    logger.info(
        "LoRA of rank %d on %d layers of %s: %d parameters",
        config.rank,
        len(names),
        type(transformer).__name__,
        sum(parameter.numel() for parameter in trainable.values()),
    )
    return list(trainable)


def find_targets(transformer: nn.Module, target_modules: tuple[str, ...]) -> list[str]:
    """Names of the linear and 3-D convolutional layers that any of the patterns matches.

    Raises:
        ConfigError: A pattern matches none.
    """
    layers = [
        name
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv3d)
    ]
    patterns = {target: re.compile(rf"(?:.*\.)?(?:{target})") for target in target_modules}
    if idle := [t for t, pattern in patterns.items() if not any(map(pattern.fullmatch, layers))]:
        raise ConfigError(
            f"target_modules {', '.join(map(repr, idle))}: no such layer in "
            f"{type(transformer).__name__}; it has {shorten(layers[-6:], 6)}"
        )
    return [name for name in layers if any(p.fullmatch(name) for p in patterns.values())]


@torch.no_grad()
def _initialize(layer: LoraLayer, generator: torch.Generator) -> None:
    """Down uniform as PyTorch's linear layers, up zero, a magnitude that of the base weight."""
    down: Any = layer.lora_A[ADAPTER_NAME].weight
    up: Any = layer.lora_B[ADAPTER_NAME].weight
    drawn = torch.empty(down.shape)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    down.data = drawn.to(down.device)
    up.data = torch.zeros_like(up, dtype=torch.float32)
    if ADAPTER_NAME in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[ADAPTER_NAME].weight
        base = dequantize_module_weight(layer.get_base_layer()).float()
        magnitude.data = base.flatten(1).norm(dim=1).view(magnitude.shape)


def adapter_state_dict(transformer: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors in PEFT's naming, such as ``blocks.0.attn1.to_q.lora_A.weight``.

    They share memory with the transformer, as those of ``state_dict`` do.

    Raises:
        InputError: The transformer has no adapter.
    """
    if ADAPTER_NAME not in getattr(transformer, "peft_config", {}):
        raise InputError(f"the {type(transformer).__name__} has no adapter; call add_adapter first")
    state = get_peft_model_state_dict(
        transformer, adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    return {key: tensor.detach() for key, tensor in state.items()}
