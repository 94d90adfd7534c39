"""Wan's own repositories: one folder with a sharded transformer and a file for each other model."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from swifti2v.errors import LoadingError
from swifti2v.models.loading.models_dir import is_complete
from swifti2v.models.loading.sources import (
    CONFIG_NAME,
    ComponentSource,
    download,
    find_here,
    find_snapshot,
    is_on_hub,
    resolve,
)

CLASS_NAME = "WanModel"
"""Class name in the ``config.json`` of Wan's own transformers."""
TRANSFORMER_FILES = [CONFIG_NAME, "diffusion_pytorch_model*"]
FILES = {
    "vae": "Wan2.?_VAE.pth",
    "text_encoder": "models_t5_umt5-xxl-enc-*.pth",
    "tokenizer": "google/umt5-xxl",
    "image_encoder": "models_clip_*.pth",
}
"""File patterns of the other components, by their name without the stage."""
TYPES = ("t2v", "i2v", "ti2v", "flf2v")
"""Types of Wan's transformers that diffusers' class can hold; others have additional layers."""
IMAGE_DIM = 1280
"""Width of CLIP, see ``MLPProj(1280, dim)`` in ``wan/modules/model.py`` of Wan2.1."""
NUM_FLF_TOKENS = 2 * 257
"""Tokens of the two images of a first-and-last-frame model."""
DEFAULTS: dict[str, Any] = {  # of the class; the files leave out the first five
    "patch_size": (1, 2, 2),
    "cross_attn_norm": True,
    "qk_norm": True,
    "text_dim": 4096,
    "window_size": (-1, -1),
    "model_type": "t2v",
    "text_len": 512,
    "in_dim": 16,
    "dim": 2048,
    "ffn_dim": 8192,
    "freq_dim": 256,
    "out_dim": 16,
    "num_heads": 16,
    "num_layers": 32,
    "eps": 1e-6,
}


def component_kind(role: str) -> str:
    """Name of a component without its stage."""
    return role.removeprefix("stage1_").removeprefix("stage2_")


def locate(role: str, source: ComponentSource, root: Path) -> Path:
    """Local path of a component, downloaded where it is on the Hub.

    Args:
        role: Role of the component.
        source: Source of the component.
        root: Folder from which relative paths start.

    Returns:
        A directory or file; of a folder in Wan's own layout the part that is this component.

    Raises:
        LoadingError: The component is missing, or several files match.
    """
    if source.source.count("/") == 1 and not source.subfolder and is_on_hub(source.source, root):
        part = _find_part(role, source.source) or _download_part(role, source.source)
        if part is not None:
            return part
    here = find_here(source.source, source.subfolder, root, source.also)
    place = here or resolve(source.source, source.subfolder, root)
    return find_official_file(role, place) or place


def _find_part(role: str, repo_id: str) -> Path | None:
    """A component of one of Wan's repositories in the Hub's cache; None if it must be asked."""
    folder = find_snapshot(repo_id)
    if folder is None or not is_wan_model(folder):
        return None
    kind = component_kind(role)
    if kind == "transformer":
        has_weights = any(folder.glob("diffusion_pytorch_model*.safetensors"))
        return folder if has_weights and is_complete(folder) else None
    found = sorted(folder.glob(FILES[kind])) if kind in FILES else []
    return found[0] if len(found) == 1 and is_complete(found[0]) else None


def _download_part(role: str, repo_id: str) -> Path | None:
    """Download a component from one of Wan's repositories; None if it is another repository."""
    kind = component_kind(role)
    if kind == "transformer":
        is_official = is_wan_model(download(repo_id, CONFIG_NAME))
        return download(repo_id, TRANSFORMER_FILES) if is_official else None
    if kind not in FILES:
        return None
    patterns = [CONFIG_NAME, FILES[kind], f"{FILES[kind]}/*"]
    return find_official_file(role, download(repo_id, patterns))


def is_wan_model(folder: Path) -> bool:
    """Whether a folder holds a transformer in Wan's own layout."""
    return read_class_name(folder) == CLASS_NAME


def read_class_name(folder: Path) -> str | None:
    """Class name in a folder's ``config.json``; None if the file or the name is missing."""
    return _read_config(folder).get("_class_name")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}  # code that needs it reads it again and reports the fault


def find_official_file(role: str, folder: Path) -> Path | None:
    """Find a component in a folder of Wan's own layout; None if it is not there.

    Args:
        role: Role of the component.
        folder: Any.

    Raises:
        LoadingError: Several files match, or the folder lacks the component.
    """
    pattern = FILES.get(component_kind(role))
    name = read_class_name(folder)
    if pattern is None or name not in (CLASS_NAME, None):
        return None
    files = sorted(folder.glob(pattern))
    if len(files) > 1:
        names = " and ".join(file.name for file in files)
        raise LoadingError(f"{folder} holds {names}; name one of them")
    if not files and name == CLASS_NAME:
        raise LoadingError(
            f"{folder} is one of Wan's own folders and lacks {pattern}; download it, or name "
            f"another source of {role}"
        )
    return files[0] if files else None


def require_text_length(place: Path, max_text_length: int) -> None:
    """Refuse a transformer that was trained on prompts padded to another length.

    Args:
        place: Path of any component; only one in Wan's own layout tells it.
        max_text_length: Tokens that a prompt is padded to.

    Raises:
        LoadingError: Naming both lengths.
    """
    if not is_wan_model(place):
        return
    length = _read_config(place).get("text_len", DEFAULTS["text_len"])
    if length != max_text_length:
        raise LoadingError(
            f"{place} takes prompts of {length} tokens, and max_text_length is {max_text_length}; "
            f"write max_text_length: {length} in the preset"
        )


def convert_config(config: Mapping[str, Any], keys: Collection[str], place: Path) -> dict[str, Any]:
    """Arguments of ``WanTransformer3DModel`` from a ``config.json`` of class ``WanModel``.

    Args:
        config: Values of the file.
        keys: Names of the weights: Wan2.1's image-to-video models attend to an image encoder,
            those of Wan2.2 do not, and their configurations do not tell.
        place: Named in errors.

    Raises:
        LoadingError: It describes another kind of model.
    """
    values = DEFAULTS | {key: value for key, value in config.items() if key in DEFAULTS}
    kind = values["model_type"]
    if kind not in TYPES:
        raise LoadingError(
            f"{place} holds a Wan model of type {kind!r}; those of type {', '.join(TYPES)} load"
        )
    try:
        width, num_heads = int(values["dim"]), int(values["num_heads"])
        has_windows = tuple(values["window_size"]) != (-1, -1)
    except (TypeError, ValueError) as error:
        raise LoadingError(f"the configuration of {place} describes no model: {error}") from None
    if num_heads < 1 or width % num_heads or has_windows:
        raise LoadingError(
            f"{place} describes a Wan model of width {width} with {num_heads} heads and windows of "
            f"{values['window_size']}; the width must be a multiple of the heads, windows [-1, -1]"
        )
    has_image = any(key.startswith("img_emb.") for key in keys)
    image = {"image_dim": IMAGE_DIM, "added_kv_proj_dim": width} if has_image else {}
    if "img_emb.emb_pos" in keys:
        image["pos_embed_seq_len"] = NUM_FLF_TOKENS
    return image | {
        "patch_size": tuple(values["patch_size"]),
        "num_attention_heads": num_heads,
        "attention_head_dim": width // num_heads,
        "in_channels": values["in_dim"],
        "out_channels": values["out_dim"],
        "text_dim": values["text_dim"],
        "freq_dim": values["freq_dim"],
        "ffn_dim": values["ffn_dim"],
        "num_layers": values["num_layers"],
        "cross_attn_norm": values["cross_attn_norm"],
        "qk_norm": "rms_norm_across_heads" if values["qk_norm"] else None,
        "eps": values["eps"],
    }
