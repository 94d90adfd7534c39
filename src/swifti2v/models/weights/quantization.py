"""Linear layers in 8 bits: both sides of the product for speed, or the stored weights for memory."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swifti2v.errors import ConfigError
from swifti2v.models.weights.packed import is_packed

FLOAT8 = torch.float8_e4m3fn
LARGEST = {FLOAT8: torch.finfo(FLOAT8).max, torch.int8: 127.0}
FLOAT8_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that multiply 8-bit floating point (Ada, then Hopper)."""
TILE = 16
"""Sides of a matrix of 8-bit floating point are multiples of this, or no kernel takes it."""
TINY = 1e-12


class Quantized(nn.Module):
    """A linear layer whose weights are kept in 8 bits, with a scale for each output.

    Args:
        linear: The layer; it is not changed.
        dtype: Number type of the stored weights.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize_rows(linear.weight.detach(), dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        bias = None if linear.bias is None else linear.bias.detach()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


class Int8Linear(Quantized):
    """Weights stored as whole numbers; the product is computed in the type of the input."""

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        product = F.linear(hidden, self.weight.to(hidden.dtype)) * self.scale.t().to(hidden.dtype)
        return product if self.bias is None else product + self.bias


class Float8Linear(Quantized):
    """Product of 8-bit floating point numbers; every token gets a scale when it comes."""

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``; summed in float32, rounded to bfloat16."""
        rows, scale = quantize_rows(hidden.flatten(0, -2), FLOAT8)
        product = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        product = product.to(hidden.dtype).reshape(*hidden.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


KINDS = {"float8": (Float8Linear, FLOAT8), "int8": (Int8Linear, torch.int8)}


def quantize_rows(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """8-bit values and a float32 scale for each row: ``matrix`` is about ``values * scale``.

    Args:
        matrix: ``[R, D]``.
        dtype: ``float8_e4m3fn`` or ``int8``.

    Returns:
        ``[R, D]`` and ``[R, 1]``.
    """
    largest = LARGEST[dtype]
    scale = matrix.float().abs().amax(dim=1, keepdim=True).clamp(min=TINY) / largest
    values = (matrix.float() / scale).clamp(-largest, largest)
    return (values if dtype.is_floating_point else values.round()).to(dtype), scale


def quantize(transformer: nn.Module, linear: str, device: torch.device) -> None:
    """Put the linear layers of a transformer's blocks into 8 bits, in place; LoRAs are merged before.

    Embeddings, norms and the output layer stay as they are; with ``float8`` the first and the last
    block as well, where errors show most.

    Args:
        transformer: ``WanTransformer3DModel`` or ``SegmentTransformer3DModel``.
        linear: See ``SpeedConfig``.
        device: Device that will compute.

    Raises:
        ConfigError: The device or the type of the weights cannot do it, or it is done already.
    """
    if linear == "plain":
        return
    if is_quantized(transformer):
        raise ConfigError("the linear layers are in 8 bits already; load the model again")
    if is_packed(transformer):
        raise ConfigError(
            f"speed.linear={linear} packs bf16 weights, and these are packed already, as in their "
            "file; use plain, or the bf16 files"
        )
    kind, dtype = KINDS[linear]
    model: Any = transformer
    blocks = list(model.blocks)
    if linear == "float8":
        require_float8(device)
        blocks = blocks[1:-1]
    for block in blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and (linear == "int8" or _fits_tiles(child)):
                    setattr(parent, name, kind(child, dtype))
    if not is_quantized(transformer):
        raise ConfigError(
            f"no layer of {type(transformer).__name__} can be {linear}: it takes three blocks or more, "
            f"and sides that are multiples of {TILE}; use int8 or plain"
        )


def is_quantized(model: nn.Module) -> bool:
    """Whether ``quantize`` has changed the model."""
    return any(isinstance(module, Quantized) for module in model.modules())


def require_float8(device: torch.device) -> None:
    """Refuse a GPU without 8-bit floating point; the CPU computes it slowly, to try it out.

    Raises:
        ConfigError: Naming what works.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < FLOAT8_CAPABILITY:
            raise ConfigError(refuse_float8(torch.cuda.get_device_name(device), capability))


def refuse_float8(name: str, capability: tuple[int, int]) -> str:
    """Reason why a GPU cannot compute in ``float8``, and an alternative."""
    major, minor = capability
    return (
        f"{name} (compute capability {major}.{minor}) has no 8-bit floating point, which came with "
        "8.9; use speed.linear=int8 to save memory, or plain"
    )


def _fits_tiles(linear: nn.Linear) -> bool:
    return linear.in_features % TILE == 0 and linear.out_features % TILE == 0
