"""From a name to loaded components: nano, presets, directories, Hub ids and original files."""

import inspect
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from pydantic import ConfigDict
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerBase,
    UMT5Config,
    UMT5EncoderModel,
)

from swifti2v import __version__
from swifti2v.config import parse_config, read_yaml
from swifti2v.errors import ConfigError, LoadingError
from swifti2v.models import originals
from swifti2v.models.checkpoints import load_weights, read_state_dict
from swifti2v.models.codec import BlockCodec
from swifti2v.models.image_encoder import load_image_processor
from swifti2v.models.lora import merge_lora
from swifti2v.models.transformer import SegmentTransformer3DModel

logger = logging.getLogger(__name__)

INDEX_NAME = "model_index.json"
PIPELINE_CLASS = "SwiftI2VPipeline"


@dataclass(kw_only=True, slots=True)
class Components:
    """The loaded models of both stages, on one device."""

    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    stage1_transformer: WanTransformer3DModel
    stage1_vae: AutoencoderKLWan | BlockCodec
    stage2_transformer: SegmentTransformer3DModel
    stage2_vae: AutoencoderKLWan | BlockCodec
    image_encoder: CLIPVisionModel | None = None
    image_processor: CLIPImageProcessorPil | None = None
    max_text_length: int = 512
    """Tokens the transformers see; shorter prompts are padded with zeros."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSource:
    """A LoRA to merge when its component is loaded."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: str
    """File, directory or ``org/repo/path/in/repo.safetensors`` on the Hub."""
    strength: float = 1.0
    """Factor on its deltas."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentSource:
    """Where one component comes from."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    source: str
    """A directory in diffusers layout, an original single file, or a Hub id."""
    subfolder: str = ""
    """Folder of the component below ``source``."""
    weights: str | None = None
    """A checkpoint loaded on top of ``source``, such as trained Stage II weights."""
    loras: tuple[LoraSource, ...] = ()
    """Merged in this order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIndex:
    """What ``model_index.json`` or a YAML preset says: component sources and default settings."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    components: dict[str, ComponentSource]
    """By name of the fields of ``Components``."""
    max_text_length: int = 512
    """Tokens the transformers see."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Defaults, see ``swifti2v.config.GenerationConfig``."""

    def __post_init__(self) -> None:
        required = {"text_encoder", "tokenizer"}
        required |= {f"stage{n}_{part}" for n in (1, 2) for part in ("transformer", "vae")}
        known = required | {"image_encoder", "image_processor"}
        if missing := sorted(required - self.components.keys()):
            raise ConfigError(f"components {', '.join(missing)} are missing")
        if unknown := sorted(self.components.keys() - known):
            raise ConfigError(f"components {', '.join(unknown)} are unknown")


def find_model(name: str | Path) -> tuple[ModelIndex, Path]:
    """Resolve a model's name to its index and the directory its relative paths start from.

    Args:
        name: ``"nano"`` or another name that ships with the package, a YAML preset, a directory
            with ``model_index.json``, or a Hub id of one.

    Raises:
        ConfigError: No such model, or an index with unknown keys.
    """
    shipped = Path(str(resources.files("swifti2v")))
    path = Path(name)
    candidates = (path, shipped / str(name), shipped / "presets" / f"{name}.yaml")
    found = next((p for p in candidates if (p / INDEX_NAME).is_file() or p.is_file()), None)
    if found is None and str(name).count("/") == 1 and not path.exists():
        found = download(str(name), patterns=None)
    if found is None:
        presets = [p.stem for p in (shipped / "presets").glob("*.yaml")]
        raise ConfigError(
            f"unknown model {str(name)!r}: not 'nano', a preset ({', '.join(sorted(presets))}), "
            f"a YAML file, a directory with {INDEX_NAME} or a Hub id like 'org/repo'"
        )
    if found.is_file():
        return parse_config(ModelIndex, read_yaml(found), str(found)), found.parent
    index = found / INDEX_NAME
    try:
        values = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{index} cannot be read: {error}") from None
    if values.pop("_class_name", None) != PIPELINE_CLASS:
        raise ConfigError(
            f"{index} is not a {PIPELINE_CLASS}; a plain diffusers pipeline holds one stage only: "
            "name its components in a YAML preset (see 'paper')"
        )
    values.pop("_swifti2v_version", None)
    return parse_config(ModelIndex, values, str(index)), found


def load_components(
    name: str | Path, dtype: torch.dtype, device: torch.device
) -> tuple[Components, dict[str, Any]]:
    """Load every component of a model.

    Args:
        name: See ``find_model``.
        dtype: Of the weights; parts that lose too much in 16 bits stay float32, as in diffusers.
        device: Where they go.

    Returns:
        The components in eval mode, and the model's default settings.

    Raises:
        ConfigError: An unknown name or key.
        LoadingError: A file is missing or damaged, or its weights do not match.
    """
    index, root = find_model(name)
    found: dict[str, Any] = {}
    for role, source in index.components.items():
        place = resolve(source.source, source.subfolder, root)
        logger.info("loading %s from %s", role, place)
        component = LOADERS[role.removeprefix("stage1_")](place, dtype)
        if isinstance(component, nn.Module):
            for extra, on_top in ((source.weights, True), *((s, False) for s in source.loras)):
                if extra is None:
                    continue
                if on_top:
                    file = resolve(str(extra), "", root)
                    state = originals.convert_transformer(read_state_dict(file))
                    load_weights(component, state, source=str(file))
                elif isinstance(extra, LoraSource):
                    merge_lora(component, resolve(extra.path, "", root), extra.strength)
            component = component.to(device).eval().requires_grad_(False)
        found[role] = component
    components = Components(**found, max_text_length=index.max_text_length, device=device)
    _require_match(components, str(name))
    return components, index.settings


def save_components(components: Components, settings: dict[str, Any], directory: Path) -> None:
    """Write a directory that ``load_components`` reads; see ``ModelIndex`` for the index."""
    directory.mkdir(parents=True, exist_ok=True)
    sources = {}
    for role in LOADERS_BY_ROLE:
        component = getattr(components, role)
        if component is None:
            continue
        subfolder = role.replace("_", "/", 1) if role.startswith("stage") else role
        component.save_pretrained(directory / subfolder)
        sources[role] = {"source": ".", "subfolder": subfolder}
    index = {
        "_class_name": PIPELINE_CLASS,
        "_swifti2v_version": __version__,
        "components": sources,
        "max_text_length": components.max_text_length,
        "settings": settings,
    }
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def resolve(source: str, subfolder: str, root: Path) -> Path:
    """Local path of a source: below ``root``, absolute, or downloaded from the Hub.

    Raises:
        LoadingError: It is nowhere.
    """
    local = (root / source).expanduser() / subfolder
    if local.exists():
        return local
    parts = source.split("/")
    if len(parts) == 2 and not source.startswith((".", "/", "~")):
        pattern = f"{subfolder}/*" if subfolder else None
        return download(source, pattern) / subfolder
    if len(parts) > 2 and not source.startswith((".", "/", "~")):
        inside = "/".join(parts[2:])
        return download("/".join(parts[:2]), inside) / inside
    raise LoadingError(f"{local} does not exist; name a directory, a file or a Hub id 'org/repo'")


def download(repo_id: str, patterns: str | None) -> Path:
    """Snapshot of a Hub repository (or of the files that match), from the cache where it is there.

    Raises:
        LoadingError: The Hub does not have it or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LoadingError(f"cannot get {repo_id!r} from the Hub: {reason}") from None


def build(
    kind: Any,
    config: Mapping[str, Any],
    state: dict[str, torch.Tensor],
    where: str,
    dtype: torch.dtype,
) -> Any:
    """Make a diffusers model without memory and give it a state dict, strictly.

    Args:
        kind: A ``ModelMixin`` class.
        config: Its configuration.
        state: Every weight.
        where: Named in errors.
        dtype: Of the weights, except those the class keeps in float32.
    """
    with init_empty_weights(include_buffers=False):
        # SegmentTransformer3DModel's file also holds the (empty) keys of its base class.
        known = inspect.signature(kind.__init__).parameters
        model = kind.from_config(
            {
                key: value
                for key, value in config.items()
                if not key.startswith("_") and (key in known or value is not None)
            }
        )
    keep = getattr(kind, "_keep_in_fp32_modules", None) or ()
    cast = {
        key: tensor.to(torch.float32 if any(part in key.split(".") for part in keep) else dtype)
        for key, tensor in state.items()
    }
    load_weights(model, cast, source=where)
    return model


def _read_config(place: Path) -> dict[str, Any]:
    try:
        values = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadingError(f"{place / 'config.json'} cannot be read: {error}") from None
    return dict(values)


def load_transformer(place: Path, dtype: torch.dtype) -> WanTransformer3DModel:
    """Load a plain Wan transformer from a diffusers directory or an original file."""
    if place.is_file():
        state = originals.convert_transformer(read_state_dict(place))
        config = originals.transformer_config(state)
        plain: WanTransformer3DModel = build(
            WanTransformer3DModel, config, state, str(place), dtype
        )
        return plain
    config = _read_config(place)
    segmented = config.get("_class_name") == SegmentTransformer3DModel.__name__
    kind = SegmentTransformer3DModel if segmented else WanTransformer3DModel
    model: WanTransformer3DModel = build(kind, config, read_state_dict(place), str(place), dtype)
    return model


def load_segment_transformer(place: Path, dtype: torch.dtype) -> SegmentTransformer3DModel:
    """Load a Stage II transformer; a plain base model is widened with a zero reference half."""
    model = load_transformer(place, dtype)
    if isinstance(model, SegmentTransformer3DModel):
        segmented: SegmentTransformer3DModel = model
        return segmented
    logger.warning("%s is a plain base model: its reference half is zero until trained", place)
    widened: SegmentTransformer3DModel = SegmentTransformer3DModel.from_base(model)
    return widened


def load_vae(place: Path, dtype: torch.dtype) -> AutoencoderKLWan | BlockCodec:
    """Load a video VAE from a diffusers directory or an original Wan file."""
    if place.is_file():
        config, state = originals.convert_vae(read_state_dict(place))
        wan: AutoencoderKLWan = build(AutoencoderKLWan, config, state, str(place), dtype)
        return wan
    config = _read_config(place)
    kinds = {"AutoencoderKLWan": AutoencoderKLWan, "BlockCodec": BlockCodec}
    if (name := config.get("_class_name")) not in kinds:
        raise LoadingError(f"{place} holds a {name}; known are {', '.join(kinds)}")
    vae: AutoencoderKLWan | BlockCodec = build(
        kinds[name], config, read_state_dict(place), str(place), dtype
    )
    return vae


def load_text_encoder(place: Path, dtype: torch.dtype) -> UMT5EncoderModel:
    """Load a UMT5 encoder from a transformers directory or Wan's original file."""
    if place.is_file():
        config, state = originals.convert_text_encoder(read_state_dict(place))
    else:
        config, state = UMT5Config(**_read_config(place)), read_state_dict(place)
    encoder: UMT5EncoderModel = _build_transformers(
        UMT5EncoderModel, config, state, str(place), dtype
    )
    return encoder


def load_image_encoder(place: Path, dtype: torch.dtype) -> CLIPVisionModel:
    """Load a CLIP vision model from a transformers directory or Wan's original file."""
    if place.is_file():
        config, state = originals.convert_image_encoder(read_state_dict(place))
    else:
        config, state = CLIPVisionConfig(**_read_config(place)), read_state_dict(place)
    encoder: CLIPVisionModel = _build_transformers(
        CLIPVisionModel, config, state, str(place), dtype
    )
    return encoder


def _build_transformers(
    kind: Any, config: Any, state: dict[str, torch.Tensor], where: str, dtype: torch.dtype
) -> Any:
    with init_empty_weights(include_buffers=False):
        model = kind(config)
    known = model.state_dict().keys()
    # Buffers that older versions of transformers saved, made anew by this one.
    state = {k: v.to(dtype) for k, v in state.items() if k in known or "position_ids" not in k}
    load_weights(model, state, source=where)
    return model


def load_tokenizer(place: Path, dtype: torch.dtype) -> PreTrainedTokenizerBase:  # noqa: ARG001
    """Load a tokenizer directory."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise LoadingError(f"{place} holds no tokenizer: {str(error).splitlines()[0]}") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


LOADERS: dict[str, Callable[[Path, torch.dtype], Any]] = {
    "text_encoder": load_text_encoder,
    "tokenizer": load_tokenizer,
    "image_encoder": load_image_encoder,
    "image_processor": lambda place, _: load_image_processor(place),
    "transformer": load_transformer,
    "vae": load_vae,
    "stage2_transformer": load_segment_transformer,
    "stage2_vae": load_vae,
}
LOADERS_BY_ROLE = (
    "text_encoder",
    "tokenizer",
    "image_encoder",
    "image_processor",
    "stage1_transformer",
    "stage1_vae",
    "stage2_transformer",
    "stage2_vae",
)


def _require_match(components: Components, name: str) -> None:
    """Refuse components that do not belong together."""
    parts = components
    text_dim = parts.text_encoder.config.d_model
    checks = {
        "stage1_transformer in_channels": (
            parts.stage1_transformer.config["in_channels"],
            2 * parts.stage1_vae.config["z_dim"] + parts.stage1_vae.config["scale_factor_temporal"],
        ),
        "stage2_transformer in_channels": (
            parts.stage2_transformer.config["in_channels"],
            2 * parts.stage2_vae.config["z_dim"],
        ),
        "stage1_transformer text_dim": (parts.stage1_transformer.config["text_dim"], text_dim),
        "stage2_transformer text_dim": (parts.stage2_transformer.config["text_dim"], text_dim),
        "image_encoder present": (
            parts.image_encoder is not None and parts.image_processor is not None,
            parts.stage1_transformer.config["image_dim"] is not None,
        ),
    }
    for what, (is_value, wanted) in checks.items():
        if is_value != wanted:
            raise LoadingError(
                f"{name}: {what} is {is_value}, but the other components need {wanted}"
            )
