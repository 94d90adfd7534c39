"""What tells files, prompts and models apart, so that a cache never gives what is of another one."""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from swifti2v.errors import LoadingError
from swifti2v.units import MB

ENDS_BYTES = MB
"""Of the head and of the tail of a file that ``hash_source`` reads."""
SAMPLED_VALUES = 65536
"""Values of a weight that ``fingerprint_model`` reads; larger weights are sampled evenly."""


def hash_source(source: Path | BinaryIO) -> str:
    """SHA-256 of a file's size, first and last MB: changes with any export, costs one read.

    Args:
        source: A path, or an open seekable file, which is left open.

    Raises:
        OSError: The file cannot be read.
    """
    if isinstance(source, Path):
        with source.open("rb") as file:
            return hash_source(file)
    size = source.seek(0, 2)
    digest = hashlib.sha256(f"{size} ".encode())
    source.seek(0)
    digest.update(source.read(ENDS_BYTES))
    if size > ENDS_BYTES:
        source.seek(max(ENDS_BYTES, size - ENDS_BYTES))
        digest.update(source.read(ENDS_BYTES))
    return digest.hexdigest()


def make_key(*parts: str | int | float) -> str:
    """Key of a cache's entry that depends on several things, such as a clip and a window."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def fingerprint_model(model: nn.Module) -> str:
    """SHA-256 of a model's configuration and weights, for a cache's fingerprint.

    Weights of up to 65536 values count whole, larger ones at as many evenly spaced places. The
    dtype counts; where the model came from and the device do not.

    Raises:
        LoadingError: The weights are not in memory (``meta``).
    """
    config: Any = getattr(model, "config", {})
    values = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    own = {key: value for key, value in values.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        if weight.is_meta:
            raise LoadingError(f"weight {name} is not in memory; take the fingerprint when it is")
        flat = weight.detach().reshape(-1)
        count = min(len(flat), SAMPLED_VALUES)
        places = torch.arange(count) * (len(flat) - 1) // max(1, count - 1)
        sample = flat[places.to(flat.device)].cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
