"""Hashes that tell one model from another by configuration and weights."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swifti2v.errors import LoadingError

SAMPLED_VALUES = 65536
"""Values of a weight that are read; larger weights are sampled evenly."""
MOTIONS_KEY = "camera_motions"
"""Config key of a text encoder that knows camera motions only: their names and words."""
UNIMPORTANT_KEYS = (
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    MOTIONS_KEY,
)
"""Config keys that do not tell how an encoder encodes."""


def fingerprint_model(model: nn.Module) -> str:
    """SHA-256 of a model's configuration and weights, for the caches of its output.

    Weights of up to 65536 values count whole, larger ones at as many evenly spaced places. The
    dtype counts; where the model came from and the device do not.

    Raises:
        LoadingError: The weights are not in memory (``meta``).
    """
    config: Any = getattr(model, "config", {})
    values = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    return _hash(model, {key: value for key, value in values.items() if not key.startswith("_")})


def fingerprint_encoder(encoder: PreTrainedModel) -> str:
    """SHA-256 as of ``fingerprint_model``, equal for all encoders that encode alike.

    Raises:
        LoadingError: The weights are not in memory (``meta``).
    """
    values = encoder.config.to_dict()
    return _hash(encoder, {k: v for k, v in values.items() if k not in UNIMPORTANT_KEYS})


def sample_evenly(weight: Tensor, num_values: int) -> Tensor:
    """Take at most ``num_values`` values of a tensor, evenly spaced from the first to the last."""
    flat = weight.detach().reshape(-1)
    count = min(len(flat), num_values)
    places = torch.arange(count) * (len(flat) - 1) // max(1, count - 1)
    return flat[places.to(flat.device)]


def to_bytes(tensor: Tensor) -> bytes:
    """The values as they lie in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _hash(model: nn.Module, config: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        if weight.is_meta:
            raise LoadingError(
                f"weight {name} of {type(model).__name__} is not in memory, so the model cannot be "
                "told from another: take the fingerprint before the weights are offloaded"
            )
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(to_bytes(sample_evenly(weight, SAMPLED_VALUES)))
    return digest.hexdigest()
