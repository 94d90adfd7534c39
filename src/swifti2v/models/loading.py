"""From a model's sources to loaded components, and back to a directory."""

import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    UMT5Config,
    UMT5EncoderModel,
)

from swifti2v.errors import ConfigError, LoadingError
from swifti2v.models import originals
from swifti2v.models.checkpoints import load_weights, read_state_dict
from swifti2v.models.codec import BlockCodec
from swifti2v.models.conversion import infer_wan_config, wan_transformer_state_dict
from swifti2v.models.image_encoder import load_image_processor
from swifti2v.models.lora import merge_lora
from swifti2v.models.sources import (
    INDEX_NAME,
    PIPELINE_CLASS,
    LoraSource,
    ModelIndex,
    find_model,
    resolve,
)
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.version import __version__

logger = logging.getLogger(__name__)

RUN_TIME_STAGES = ("stage1", "stage2")
"""Keys of the LoRAs a caller may add."""


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


class _Files(NamedTuple):
    """What one component is made of, on this machine."""

    place: Path
    weights: Path | None
    loras: tuple[tuple[Path, float], ...]


def load_components(
    name: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    loras: Mapping[str, Sequence[LoraSource]] | None = None,
    *,
    merges_own_loras: bool = True,
) -> tuple[Components, dict[str, Any]]:
    """Load every component of a model.

    Args:
        name: See ``find_model``.
        dtype: Of the weights; parts that lose too much in 16 bits stay float32, as in diffusers.
        device: Where they go.
        loras: LoRAs for ``"stage1"`` and ``"stage2"``, merged after the model's own; their
            relative paths start from the current directory.
        merges_own_loras: False leaves the model's own out: a LoRA is trained on the many-step
            base, never on the step-distilled one.

    Returns:
        The components in eval mode, and the model's default settings.

    Raises:
        ConfigError: An unknown name or key.
        LoadingError: A file is missing or damaged, or its weights do not match.
    """
    index, root = find_model(name)
    if not merges_own_loras:
        index = index.without_loras()
    files = _find_files(index, root, loras or {})  # all of them, before anything is loaded
    found: dict[str, Any] = {}
    for role, own in files.items():
        logger.info("loading %s from %s", role, own.place)
        component = LOADERS[role](own.place, dtype)
        if isinstance(component, nn.Module):
            component = component.to(device).eval().requires_grad_(False)
            _add_weights(component, own)
        found[role] = component
    components = Components(**found, max_text_length=index.max_text_length, device=device)
    _require_match(components, str(name))
    return components, index.settings


def _find_files(
    index: ModelIndex, root: Path, loras: Mapping[str, Sequence[LoraSource]]
) -> dict[str, _Files]:
    if unknown := sorted(loras.keys() - {*RUN_TIME_STAGES}):
        raise ConfigError(f"LoRAs for {', '.join(unknown)}; they go to stage1 or stage2")
    added = {f"{stage}_transformer": sources for stage, sources in loras.items()}
    files = {}
    for role, source in index.components.items():
        own = [(resolve(lora.path, "", root), lora.strength) for lora in source.loras]
        own += [(resolve(lora.path, "", Path()), lora.strength) for lora in added.get(role, ())]
        files[role] = _Files(
            resolve(source.source, source.subfolder, root),
            None if source.weights is None else resolve(source.weights, "", root),
            tuple(own),
        )
    return files


def _add_weights(component: nn.Module, files: _Files) -> None:
    """Replace weights by a checkpoint's and merge LoRAs, in place."""
    if files.weights is not None:
        state = wan_transformer_state_dict(read_state_dict(files.weights))
        load_weights(component, state, source=str(files.weights))
    for path, strength in files.loras:
        merge_lora(component, path, strength)
    if isinstance(component, SegmentTransformer3DModel):
        reference_half = component.patch_embedding.weight[:, component.config["in_channels"] // 2 :]
        if not reference_half.any():
            logger.warning(
                "%s: the reference half of Stage II is zero, so it does not follow Stage I's motion; "
                "name trained Stage II weights",
                files.weights or files.place,
            )


def save_components(components: Components, settings: dict[str, Any], directory: Path) -> None:
    """Write a directory that ``load_components`` reads; see ``ModelIndex`` for the index."""
    directory.mkdir(parents=True, exist_ok=True)
    sources = {}
    for role in LOADERS:
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


def build(
    make: Callable[[], nn.Module],
    state: Mapping[str, torch.Tensor],
    where: Path,
    dtype: torch.dtype,
) -> Any:
    """Make a model without memory and give it a state dict, strictly.

    Args:
        make: Constructs it.
        state: Every weight.
        where: Named in errors.
        dtype: Of the weights, except those the class keeps in float32: for diffusers always, for
            transformers in float16 only.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model: Any = make()
    except (TypeError, ValueError, KeyError, ZeroDivisionError, RuntimeError) as error:
        raise LoadingError(f"the configuration of {where} describes no model: {error}") from error
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if isinstance(model, PreTrainedModel) and dtype != torch.float16:
        keep = set()
    cast = {
        key: _align(tensor.to(torch.float32 if keep & set(key.split(".")) else dtype))
        if tensor.is_floating_point()
        else tensor
        for key, tensor in state.items()
    }
    load_weights(model, cast, source=str(where))
    return model


def _align(tensor: torch.Tensor) -> torch.Tensor:
    # CPU kernels round differently where memory is not aligned, as in a mapped file: the same
    # weights shall make the same frames whatever file they come from.
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def _from_config(kind: Any, config: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """Constructor of a diffusers model; keys that it does not know are left out."""
    known = inspect.signature(kind.__init__).parameters
    return lambda: kind(**{key: value for key, value in config.items() if key in known})


def _read_config(place: Path) -> dict[str, Any]:
    file = place / "config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise LoadingError(f"{file} cannot be read: {error}") from None


def _read_class(place: Path, *kinds: Any) -> tuple[Any, dict[str, Any]]:
    """The class, one of ``kinds``, that a diffusers ``config.json`` names, and its values."""
    config = _read_config(place)
    by_name = {kind.__name__: kind for kind in kinds}
    if (name := config.get("_class_name")) not in by_name:
        raise LoadingError(f"{place} holds a {name}, not a {' or '.join(by_name)}")
    return by_name[name], config


def load_transformer(place: Path, dtype: torch.dtype) -> WanTransformer3DModel:
    """Load a plain Wan transformer from a diffusers directory or an original file."""
    if place.is_file():
        state = wan_transformer_state_dict(read_state_dict(place))
        config = infer_wan_config(state)
    else:
        _, config = _read_class(place, WanTransformer3DModel)
        state = read_state_dict(place)
    make = _from_config(WanTransformer3DModel, config)
    model: WanTransformer3DModel = build(make, state, place, dtype)
    return model


def load_segment_transformer(place: Path, dtype: torch.dtype) -> SegmentTransformer3DModel:
    """Load a Stage II transformer; a plain base model is widened with a zero reference half.

    Raises:
        LoadingError: A base with other inputs than latents, such as an image-to-video one.
    """
    kind: Any = WanTransformer3DModel
    if place.is_file():
        state = wan_transformer_state_dict(read_state_dict(place))
        config = infer_wan_config(state)
    else:
        kind, config = _read_class(place, SegmentTransformer3DModel, WanTransformer3DModel)
        state = read_state_dict(place)
    in_channels, out_channels = config.get("in_channels", 16), config.get("out_channels", 16)
    takes_latents_only = config.get("image_dim") is None
    if in_channels == 2 * out_channels and takes_latents_only:
        kind = SegmentTransformer3DModel  # an original file does not tell the two apart
    elif in_channels != out_channels or not takes_latents_only:
        raise LoadingError(
            f"{place} takes {in_channels} channels and gives {out_channels}: Stage II is made from "
            "a model that takes as many as it gives, such as Wan2.2-TI2V-5B"
        )
    model: Any = build(_from_config(kind, config), state, place, dtype)
    segmented: SegmentTransformer3DModel = (
        model if kind is SegmentTransformer3DModel else SegmentTransformer3DModel.from_base(model)
    )
    return segmented


def load_vae(place: Path, dtype: torch.dtype) -> AutoencoderKLWan | BlockCodec:
    """Load a video VAE from a diffusers directory or an original Wan file."""
    kind: Any = AutoencoderKLWan
    if place.is_file():
        config, state = originals.convert_vae(read_state_dict(place))
    else:
        kind, config = _read_class(place, AutoencoderKLWan, BlockCodec)
        state = read_state_dict(place)
    vae: AutoencoderKLWan | BlockCodec = build(_from_config(kind, config), state, place, dtype)
    return vae


def load_text_encoder(place: Path, dtype: torch.dtype) -> UMT5EncoderModel:
    """Load a UMT5 encoder from a transformers directory or Wan's original file."""
    if place.is_file():
        config, state = originals.convert_text_encoder(read_state_dict(place))
    else:
        config = _read_transformers_config(place, UMT5Config)
        state = read_state_dict(place)
    encoder: UMT5EncoderModel = build(lambda: UMT5EncoderModel(config), state, place, dtype)
    return encoder


def load_image_encoder(place: Path, dtype: torch.dtype) -> CLIPVisionModel:
    """Load a CLIP vision model from a transformers directory or Wan's original file."""
    if place.is_file():
        config, state = originals.convert_image_encoder(read_state_dict(place))
    else:
        config = _read_transformers_config(place, CLIPVisionConfig)
        state = originals.convert_vision_names(read_state_dict(place))
    encoder: CLIPVisionModel = build(lambda: CLIPVisionModel(config), state, place, dtype)
    return encoder


def _read_transformers_config(place: Path, kind: Any) -> Any:
    values = _read_config(place)
    if (name := values.get("model_type", kind.model_type)) != kind.model_type:
        raise LoadingError(f"{place} holds a {name} model, not a {kind.model_type}")
    for key in ("dtype", "torch_dtype"):  # how it was stored; the caller decides anew
        values.pop(key, None)
    return kind(**values)


def load_tokenizer(place: Path, dtype: torch.dtype) -> PreTrainedTokenizerBase:  # noqa: ARG001
    """Load a tokenizer directory."""
    if not (place / "tokenizer_config.json").is_file():
        raise LoadingError(f"{place} holds no tokenizer: tokenizer_config.json is missing")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise LoadingError(f"{place} holds no tokenizer: {str(error).splitlines()[0]}") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


LOADERS: dict[str, Callable[[Path, torch.dtype], Any]] = {
    "text_encoder": load_text_encoder,
    "tokenizer": load_tokenizer,
    "image_encoder": load_image_encoder,
    "image_processor": lambda place, _: load_image_processor(place),
    "stage1_transformer": load_transformer,
    "stage1_vae": load_vae,
    "stage2_transformer": load_segment_transformer,
    "stage2_vae": load_vae,
}


def _require_match(parts: Components, name: str) -> None:
    """Refuse components that do not belong together."""
    first, second = parts.stage1_transformer.config, parts.stage2_transformer.config
    codec, fine = parts.stage1_vae.config, parts.stage2_vae.config
    text_dim = parts.text_encoder.config.d_model
    encoder = parts.image_encoder
    image_dim = None if encoder is None else encoder.config.hidden_size
    if (encoder is None) != (parts.image_processor is None):
        raise LoadingError(f"{name}: image_encoder and image_processor only work together")
    checks = {
        "stage1_transformer in_channels": (
            first["in_channels"],
            2 * codec["z_dim"] + codec["scale_factor_temporal"],
        ),
        "stage1_transformer out_channels": (first["out_channels"], codec["z_dim"]),
        "stage2_transformer in_channels": (second["in_channels"], 2 * fine["z_dim"]),
        "stage2_transformer out_channels": (second["out_channels"], fine["z_dim"]),
        "stage1_transformer text_dim": (first["text_dim"], text_dim),
        "stage2_transformer text_dim": (second["text_dim"], text_dim),
        "stage1_transformer image_dim (of the image encoder)": (first["image_dim"], image_dim),
    }
    for what, (is_value, wanted) in checks.items():
        if is_value != wanted:
            raise LoadingError(
                f"{name}: {what} is {is_value}, but the other components need {wanted}"
            )
