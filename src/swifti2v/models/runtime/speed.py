"""The levers of ``SpeedConfig`` on a transformer: attention kernel, compiled blocks, number types."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn.attention import SDPBackend, sdpa_kernel

from swifti2v.config import SpeedConfig, StageName
from swifti2v.errors import ConfigError
from swifti2v.models.loading.components import Components
from swifti2v.models.runtime.residual import keep_residual
from swifti2v.models.weights.quantization import quantize

logger = logging.getLogger(__name__)

HOPPER = (9, 0)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Kernels in the order in which they are tried after the requested one."""
PREPARED = ("linear", "compile", "residual")
"""Settings that change a transformer when it is loaded."""
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Variable that names PyTorch's directory of compiled code; unset means a temporary directory."""


def prepare_speed(transformer: nn.Module, speed: SpeedConfig, device: torch.device) -> None:
    """Pull the levers that change a loaded transformer, in place; before it is placed.

    Args:
        transformer: ``WanTransformer3DModel`` or ``SegmentTransformer3DModel``, LoRAs merged.
        speed: Settings; those in ``PREPARED`` are read.
        device: Device that will compute.

    Raises:
        ConfigError: See ``quantize``.
    """
    quantize(transformer, speed.linear, device)
    if speed.residual == "float32":
        keep_residual(transformer)
    if speed.compile:
        compile_blocks(transformer)


def accelerate(
    components: Components, speed: Mapping[StageName, SpeedConfig], device: torch.device
) -> None:
    """Prepare the transformers for speed, in place, after loading and before ``place``.

    Args:
        components: As loaded; LoRAs are merged already.
        speed: By stage; stages that do not run are left alone.
        device: Device that will compute.

    Raises:
        ConfigError: The device cannot do it, or it is done already.
    """
    if device.type == "cuda" and (warning := warn_of_torch(torch.__version__)):
        logger.warning(warning)
    require_same_speed(components, speed)
    asked = {id(getattr(components, f"{stage}_transformer")): stage for stage in speed}
    for stage in asked.values():  # one where both are the same model
        transformer = getattr(components, f"{stage}_transformer")
        if not any(tensor.is_meta for tensor in transformer.parameters()):
            prepare_speed(transformer, speed[stage], device)
    components.speed = dict(speed)


def require_same_speed(components: Components, speed: Mapping[StageName, SpeedConfig]) -> None:
    """Refuse two ways to prepare one transformer that both stages share.

    Raises:
        ConfigError: A setting of ``PREPARED`` differs.
    """
    if components.stage1_transformer is components.stage2_transformer:
        first, second = speed["stage1"], speed["stage2"]
        for name in PREPARED:
            if getattr(first, name) != getattr(second, name):
                raise ConfigError(
                    f"stage1.speed.{name} is {getattr(first, name)} and stage2.speed.{name} is "
                    f"{getattr(second, name)}, but both stages are one transformer: give both the "
                    "same"
                )


def require_prepared(loaded: SpeedConfig, asked: SpeedConfig, stage: str) -> None:
    """Refuse settings that a transformer was not prepared for.

    Raises:
        ConfigError: A setting of ``PREPARED`` differs.
    """
    for name in PREPARED:
        present, wanted = getattr(loaded, name), getattr(asked, name)
        if present != wanted:
            raise ConfigError(
                f"{stage}.speed.{name} is {wanted}, but the transformer was loaded with {present}; "
                "give the speed to from_pretrained"
            )


@contextmanager
def attention_order(first: str, device: torch.device) -> Iterator[None]:
    """Try one kernel of scaled dot-product attention first, within the block.

    Args:
        first: See ``SpeedConfig.attention``.
        device: Device that computes.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    with sdpa_kernel(order_backends(first, capability), set_priority=True):
        yield


def order_backends(first: str, capability: tuple[int, int] | None) -> list[SDPBackend]:
    """Kernels in the order in which they are tried.

    On Hopper cuDNN's takes about half the time of flash attention 2, on other GPUs it is no faster
    or slower.

    Args:
        first: See ``SpeedConfig.attention``.
        capability: Compute capability of the GPU; None on a CPU.

    Source:
        github.com/huggingface/transformers, pull request 48163 (1.7 to 2.3 times on Hopper, 0.82 on
        A100, 1.00 on L40S).
    """
    if first == "auto":
        first = "cudnn" if capability == HOPPER else "flash"
    return [BACKENDS[first], *(kernel for name, kernel in BACKENDS.items() if name != first)]


def compile_blocks(transformer: nn.Module) -> None:
    """Compile the forward pass of a transformer's blocks at their first call, once for each shape.

    All blocks share the code. If the compiler fails, a warning says so once, and all blocks compute
    as they would without it.
    """
    os.environ.setdefault(CACHE_VARIABLE, str(compile_cache_dir()))
    blocks: Any = transformer.blocks
    fallback = Fallback()
    for block in blocks:
        block.forward = CompiledForward(block.forward, fallback)


def compile_cache_dir() -> Path:
    """Directory that keeps compiled code from run to run."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "swifti2v" / "compiled"


class Fallback:
    """Whether the compiler failed; shared by the blocks of a transformer."""

    is_taken = False

    def take(self, error: Exception) -> None:
        """Warn, once."""
        if not self.is_taken:
            logger.warning(
                "the blocks of the transformer cannot be compiled and run without it, slower: %s: %s",
                type(error).__name__,
                " ".join(str(error).split())[:300],
            )
        self.is_taken = True


class CompiledForward:
    """A block's forward pass, compiled; the plain one after a failure of the compiler.

    Args:
        forward: Bound to the block.
        fallback: Fallback that all blocks share.
    """

    def __init__(self, forward: Callable[..., Any], fallback: Fallback) -> None:
        self._forward = forward
        self._compiled = torch.compile(forward, fullgraph=True, dynamic=False)
        self._fallback = fallback

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        if not self._fallback.is_taken:
            try:
                return self._compiled(*args, **kwargs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                self._fallback.take(error)
        return self._forward(*args, **kwargs)


def warn_of_torch(version: str) -> str | None:
    """Warning about a version of PyTorch that computes slowly on a GPU; None for other versions.

    Source:
        github.com/pytorch/pytorch, issues 166643 and 174051 (bfloat16 conv3d in 2.9).
    """
    if version.split("+")[0].split(".")[:2] == ["2", "9"]:
        return (
            f"PyTorch {version} computes 3D convolutions in bfloat16 several times slower and in more "
            "memory than other versions (with cuDNN before 9.15); install 2.10 or newer"
        )
    return None
