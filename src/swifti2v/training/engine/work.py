"""Tokens and arithmetic of a training step, and what the device could have done meanwhile."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from swifti2v.planning.devices import DEVICES
from swifti2v.training.engine.memory import ParameterCount, count_parameters

DEVICE_NAMES = {
    "H200": "h200",
    "H100 80GB HBM3": "h100",
    "A100": "a100",
    "L40S": "l40s",
    "RTX 4090": "rtx4090",
}
"""Names in ``DEVICES``, by a part of the name that torch gives a device."""
MEASURED_SIZE = 4096
"""Side of the matrices whose product is timed where the data sheet is not known."""


@dataclass(slots=True)
class Work:
    """Work of a step on this rank."""

    tokens: int = 0
    """Tokens that went into the transformer."""
    flops: float = 0.0
    """See ``count_flops``."""


def count_flops(
    config: Mapping[str, Any],
    num_tokens: int,
    num_samples: int,
    parameters: ParameterCount,
    *,
    num_text_tokens: int = 512,
    num_image_tokens: int = 0,
    num_given_tokens: int = 0,
) -> float:
    """Arithmetic of training a Wan transformer on some samples, forward and backward.

    Counted are the products of matrices, two FLOP a multiply-add. The backward pass computes what a
    frozen weight's forward pass did once more (the gradient of its input), a trained one's twice;
    what gradient checkpointing computes again does not count. Left out are the embeddings of time
    and photo and all that is done value by value.

    Args:
        config: Configuration of ``WanTransformer3DModel``.
        num_tokens: L of one sample.
        num_samples: Number of samples.
        parameters: Parameters of the model; the trained ones say how much of the weights' gradient
            is needed.
        num_text_tokens: Number of text tokens of one sample.
        num_image_tokens: Number of tokens of the photo's embedding.
        num_given_tokens: Number of those L tokens to which the last block attends without
            computing them.
    """
    width: int = config["num_attention_heads"] * config["attention_head_dim"]
    keys = num_text_tokens + num_image_tokens  # of the second attention
    # Of a block: queries, keys, values and outputs of both attentions, then the feed-forward part.
    own = (4 * width + 2 * config["ffn_dim"]) * width
    linear = num_tokens * (own + 2 * width * width) + 2 * keys * width * width
    attention = 2 * (num_tokens + keys) * width
    patch, num_layers = math.prod(config["patch_size"]) * width, config["num_layers"]
    num_predicted = num_tokens - num_given_tokens
    ends = patch * (num_tokens * config["in_channels"] + num_predicted * config["out_channels"])
    ends += num_text_tokens * width * (config["text_dim"] + width)
    trained = parameters.trainable / parameters.total
    forward = num_layers * linear - num_given_tokens * own + ends
    num_attending = num_layers * num_tokens - num_given_tokens
    products: float = (2 + trained) * forward + 3 * num_attending * attention
    return 2.0 * num_samples * products


class WorkMeter:
    """Counts what the calls of a transformer in training take; of another model nothing is counted."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = count_parameters(model)
        self._work = Work()

    @contextmanager
    def measure(self) -> Iterator[Work]:
        """Count the calls within the block."""
        self._work = Work()
        if not isinstance(self._model, WanTransformer3DModel):
            yield self._work
            return
        hook = self._model.register_forward_pre_hook(self._add, with_kwargs=True)
        try:
            yield self._work
        finally:
            hook.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator] # counts must not become guards
    def _add(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        named = dict(zip(("hidden_states", "level", "encoder_hidden_states"), args, strict=False))
        given = {**named, **kwargs}
        latents, text = given["hidden_states"], given["encoder_hidden_states"]
        photo: Tensor | None = given.get("encoder_hidden_states_image")
        sides = zip(latents.shape[2:], module.config["patch_size"], strict=True)
        frames, *places = (cells // patch for cells, patch in sides)
        num_tokens = frames * math.prod(places)
        self._work.tokens += len(latents) * num_tokens
        self._work.flops += count_flops(
            module.config,
            num_tokens,
            len(latents),
            self._parameters,
            num_text_tokens=text.shape[1],
            num_image_tokens=0 if photo is None else photo.shape[1],
            num_given_tokens=given.get("num_given", 0) * math.prod(places),
        )


@cache
def find_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second that a GPU can reach; 0 for a CPU, whose rate depends on what else it does.

    It is the rate of the data sheet if that is known, else that of a product of matrices.
    """
    if device.type != "cuda":
        return 0.0
    if dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, known in DEVICE_NAMES.items():
            if part in name:
                return DEVICES[known].peak
    return measure_peak(device, dtype)


def measure_peak(device: torch.device, dtype: torch.dtype, size: int = MEASURED_SIZE) -> float:
    """FLOP a second of the product of two square matrices of side ``size``, the fastest of a few."""
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    fastest = float("inf")
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        _wait(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * size**3 / fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
