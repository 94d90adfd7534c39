"""The weights a LoRA belongs on: a hash in its metadata, written with it, checked before a merge."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swifti2v.errors import LoadingError
from swifti2v.models.fingerprints import sample_evenly, to_bytes
from swifti2v.models.lora.export import MAGNITUDE, save_lora
from swifti2v.models.weights.files import read_metadata
from swifti2v.models.weights.packed import is_packed

logger = logging.getLogger(__name__)

BASE = "swifti2v_base"
"""Metadata key: name of the model a LoRA belongs on."""
BASE_HASH = "swifti2v_base_sha256"
"""Metadata key: ``hash_base`` of the weights it belongs on."""
RECIPE = "swifti2v_recipe"
"""Metadata key: the part of a recipe that a LoRA is."""
CONFIG = "swifti2v_config"
"""Metadata key: settings of the training, as JSON."""
STEPS = "swifti2v_steps"
"""Metadata key: steps that a LoRA was trained for."""
RELAY1 = "relay1"
"""Recipe: the image modality, which ViBe trains first and leaves out of sampling."""
RELAY2 = "relay2"
"""Recipe: the high resolution, which ViBe trains on top of the first and keeps."""
NUM_HASHED = 4096
"""Values of a weight that count."""


def save_trained_lora(
    state: Mapping[str, Tensor],
    path: Path,
    *,
    alpha: float,
    base: str,
    base_hash: str,
    settings: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA for diffusers, and ``NAME_comfyui.safetensors`` beside it for ComfyUI.

    Two kinds get the first file alone: a DoRA, since ComfyUI's keys have no place for magnitudes,
    and the first LoRA of a relay, which is not for sampling.

    Args:
        state: See ``save_lora``.
        path: For diffusers.
        alpha: See ``save_lora``.
        base: Name of the model that was trained on.
        base_hash: ``hash_base`` of its transformer, before any other LoRA was merged.
        settings: Settings of the training, as plain values.
        metadata: Further texts for the header.

    Raises:
        SwiftI2VError: See ``save_lora``.
    """
    own = {BASE: base, BASE_HASH: base_hash, CONFIG: json.dumps(settings), **(metadata or {})}
    beside = path.with_name(f"{path.stem}_comfyui{path.suffix}")
    save_lora(state, path, "peft", alpha=alpha, metadata=own)
    if own.get(RECIPE) != RELAY1 and not any(key.endswith(MAGNITUDE) for key in state):
        save_lora(state, beside, "original", alpha=alpha, metadata=own)


def require_base(transformer: nn.Module, loras: Iterable[Path]) -> None:
    """Refuse LoRAs that do not belong on a transformer's weights.

    Files without our metadata, such as those of others, are not judged; neither are hashes for a
    transformer in float16, fp8 or GGUF, which rounds weights that are stored in another type.

    Args:
        transformer: With its weights, before any LoRA is merged.
        loras: Files or directories.

    Raises:
        LoadingError: A LoRA was trained on other weights, or is the first of a relay, which is not
            for sampling; or a file cannot be read.
    """
    for path in loras:
        metadata = read_metadata(path)
        if metadata.get(RECIPE) == RELAY1:
            raise LoadingError(
                f"{path} is the first LoRA of a relay: it turns a video model into one of images "
                "and is dropped after training; give the second one, which holds the resolution"
            )
        _require_weights(transformer, path, metadata)


def require_first(transformer: nn.Module, path: Path) -> None:
    """Refuse to fuse any file but the first LoRA of a relay on a transformer's weights.

    Files without our metadata are not judged.

    Args:
        transformer: With its weights, before the LoRA is merged.
        path: File or directory.

    Raises:
        LoadingError: A second LoRA, one of other weights, or a file that cannot be read.
    """
    metadata = read_metadata(path)
    if metadata.get(RECIPE) == RELAY2:
        raise LoadingError(
            f"{path} is the second LoRA of a relay; the one to fuse before it is trained is the "
            f"first, {RELAY1}.safetensors"
        )
    _require_weights(transformer, path, metadata)


def _require_weights(transformer: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    wanted = metadata.get(BASE_HASH)
    if wanted is None:
        return
    is_float16 = next(transformer.parameters()).dtype == torch.float16
    if is_float16 or is_packed(transformer):
        kind = "float16" if is_float16 else "fp8 or GGUF"
        logger.warning("%s: whether it belongs on this model is not checked in %s", path, kind)
        return
    base = hash_base(transformer)
    if wanted != base:
        name = metadata.get(BASE, "another model")
        raise LoadingError(
            f"{path} was trained on {name} with weights {wanted[:12]}, this "
            f"{type(transformer).__name__} has {base[:12]}; load the model it was trained on"
        )


def hash_base(transformer: nn.Module) -> str:
    """SHA-256 of a transformer's own weights by name; the same with and without an adapter.

    It does not depend on where or in which of float32 and bfloat16 they were loaded, nor on room
    for the reference: of each weight but the patch embedding's, up to 4096 evenly spaced values
    count, rounded to bfloat16.
    """
    digest = hashlib.sha256()
    base = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in transformer.state_dict().items()
        if ".lora_" not in name and not name.startswith("patch_embedding.")
    }
    for name, tensor in sorted(base.items()):
        values = sample_evenly(tensor, NUM_HASHED).to(torch.bfloat16)
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(to_bytes(values))
    return digest.hexdigest()
