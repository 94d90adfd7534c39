"""Load components from a model's sources, and save them to a directory."""

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    UMT5EncoderModel,
)

from swifti2v.config import SpeedConfig, StageName
from swifti2v.errors import ConfigError, LoadingError
from swifti2v.models.image_encoder import load_image_processor, make_image_processor
from swifti2v.models.loading.architectures import (
    Architecture,
    find_architecture,
    is_of_segments,
    read_architecture,
    read_component,
    read_original,
    takes_reference,
)
from swifti2v.models.loading.official import locate, require_text_length
from swifti2v.models.loading.originals import convert_vision_names
from swifti2v.models.loading.sources import (
    INDEX_NAME,
    PEFT_CONFIG,
    PIPELINE_CLASS,
    ComponentSource,
    LoraSource,
    ModelIndex,
    Reference,
    find_model,
    resolve,
)
from swifti2v.models.lora.merge import LoraReport, merge_lora
from swifti2v.models.lora.provenance import require_base
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.frame_codec import frame_codec, set_dtypes
from swifti2v.models.weights.files import load_weights, read_weights
from swifti2v.models.weights.names import wan_transformer_state_dict
from swifti2v.models.weights.packed import Weight, is_packed, make_room, unpack_all
from swifti2v.models.weights.quantization import is_quantized
from swifti2v.shapes import NUM_WAYS
from swifti2v.version import __version__

logger = logging.getLogger(__name__)

STAGES: tuple[StageName, ...] = get_args(StageName)
IMAGE_PARTS = ("image_encoder", "image_processor")
"""Components that only Stage I uses."""
WITHOUT_WEIGHTS = ("tokenizer", "image_processor")
HOST = torch.device("cpu")
META = torch.device("meta")


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
    """Preprocessor of the photo; with an image encoder it defaults to Wan 2.1's."""
    max_text_length: int = 512
    """Tokens the transformers see; shorter prompts are padded with zeros."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offloads_history: bool = False
    """Whether Stage II's VAE keeps its causal history in host memory while it waits."""
    speed: Mapping[StageName, SpeedConfig] = field(
        default_factory=lambda: dict.fromkeys(STAGES, SpeedConfig())
    )
    """Speed settings of the transformers; see ``swifti2v.models.runtime.speed``."""
    loras: Mapping[str, Sequence[LoraReport]] = field(default_factory=dict)
    """Reports of the merged LoRAs by component."""

    def describe_loras(self) -> list[str]:
        """Describe how much of each LoRA was merged into which transformer, one line each."""
        return [
            f"{role}: {report.describe()}"
            for role, reports in self.loras.items()
            for report in reports
        ]

    def __post_init__(self) -> None:
        if self.image_encoder is not None and self.image_processor is None:
            side: Any = self.image_encoder.config.image_size
            self.image_processor = make_image_processor(side)


class _Files(NamedTuple):
    """Files of one component on this machine."""

    place: Path
    weights: Path | None
    loras: tuple[LoraSource, ...]
    source: ComponentSource


class _Loaded(NamedTuple):
    """A component and the LoRAs merged into it."""

    component: Any
    loras: tuple[LoraReport, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundComponents:
    """Components of a model whose files are all on this machine; none is loaded yet."""

    name: str
    """Name of the model, for errors."""
    index: ModelIndex
    """Index of the model."""
    root: Path
    """Folder from which the index's relative paths start."""
    stages: tuple[StageName, ...]
    """Stages that will run."""
    empty: tuple[str, ...]
    """Components that are made without memory: nothing of theirs is read."""
    files: Mapping[str, _Files]
    """Files of the others."""

    def load(self, role: str, dtype: torch.dtype, device: torch.device) -> _Loaded:
        """Load one of ``files``, see ``load_components``."""
        return _load(role, self.files[role], dtype, device)

    def twin(self, role: str) -> str:
        """Stage I's component where Stage II's has the same files and LoRAs: one serves for both."""
        first = self.index.twin(role)
        return first if self.files.get(first) == self.files[role] else role

    def each(self, load: Callable[[str], _Loaded]) -> dict[str, _Loaded]:
        """All of ``files``, those of twins loaded once.

        Args:
            load: Loads or outlines a component by name.
        """
        loaded = {role: load(role) for role in self.files if self.twin(role) == role}
        return {role: loaded[self.twin(role)] for role in self.files}

    def outline(self, role: str, dtype: torch.dtype) -> _Loaded:
        """Look one of ``files`` through, see ``outline_component``."""
        return _outline(role, self.files[role], dtype)

    def assemble(
        self, loaded: Mapping[str, _Loaded], device: torch.device
    ) -> tuple[Components, dict[str, Any]]:
        """Put loaded or outlined components together, see ``load_components``."""
        models = {role: part.component for role, part in loaded.items()}
        for role in self.empty:
            architecture = find_architecture(role, self.index.components[role], self.root)
            models[role] = architecture.make_empty(role)
        components = Components(
            **models,
            max_text_length=self.index.max_text_length,
            device=device,
            loras={role: part.loras for role, part in loaded.items() if part.loras},
        )
        motion = (self.index.settings.get("stage1") or {}).get("motion", "latents")
        displaces = motion == "displacement"
        _require_match(components, self.name, self.stages, displaces=displaces)
        return components, self.index.settings


def find_components(
    name: str | Path,
    loras: Sequence[LoraSource] = (),
    *,
    merges_own_loras: bool = True,
    stages: Sequence[StageName] = STAGES,
    skipped: Collection[str] = (),
) -> FoundComponents:
    """Find the files of a model's components, downloaded where they are on the Hub.

    Args:
        name: See ``find_model``.
        loras: See ``load_components``, as the others.
        merges_own_loras: Whether the model's own count.
        stages: Stages that will run.
        skipped: Transformers and VAEs of those stages that are made without memory as well.

    Raises:
        ConfigError: An unknown name or key.
        LoadingError: A file is missing.
    """
    index, root = find_model(name)
    if not merges_own_loras:
        index = index.without_loras()
    if unknown := sorted({lora.stage for lora in loras} - {*STAGES}):
        raise ConfigError(f"LoRAs for {', '.join(unknown)}; they go to stage1 or stage2")
    unused = tuple(stage for stage in STAGES if stage not in stages)
    empty = [r for r in index.components if r in skipped or r.startswith(unused)]
    roles = [r for r in index.components if "stage1" in stages or r not in IMAGE_PARTS]
    files = {  # all of them, before anything is loaded
        role: _find_files(
            role,
            index.components[role],
            root,
            [lora for lora in loras if role == f"{lora.stage}_transformer"],
        )
        for role in roles
        if role not in empty
    }
    for sources in files.values():
        require_text_length(sources.place, index.max_text_length)
    return FoundComponents(
        name=str(name),
        index=index,
        root=root,
        stages=tuple(stages),
        empty=tuple(empty),
        files=files,
    )


def load_components(
    name: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    loras: Sequence[LoraSource] = (),
    *,
    merges_own_loras: bool = True,
    stages: Sequence[StageName] = STAGES,
    skipped: Collection[str] = (),
) -> tuple[Components, dict[str, Any]]:
    """Load the components of a model.

    Args:
        name: See ``find_model``.
        dtype: Number type of the weights; parts that lose too much in 16 bits stay float32, as in
            diffusers.
        device: Where they go.
        loras: LoRAs, merged after the model's own; their relative paths start from the current
            directory.
        merges_own_loras: False leaves the model's own out: a LoRA is trained on the many-step
            base, never on the step-distilled one.
        stages: Stages that will run. The transformer and VAE of another one are made from their
            configuration without memory (on the meta device): their weights are not read.
        skipped: Transformers and VAEs of those stages that are made without memory as well.

    Returns:
        The components in eval mode, and the model's default settings.

    Raises:
        ConfigError: An unknown name or key.
        LoadingError: A file is missing or damaged, or its weights do not match.
    """
    found = find_components(
        name, loras, merges_own_loras=merges_own_loras, stages=stages, skipped=skipped
    )
    return found.assemble(found.each(lambda role: found.load(role, dtype, device)), device)


def load_component(
    role: str,
    source: ComponentSource,
    root: Path,
    dtype: torch.dtype,
    device: torch.device,
    loras: Sequence[LoraSource] = (),
) -> Any:
    """Load one component alone, with its checkpoint and LoRAs, in eval mode.

    Args:
        role: A field of ``Components``.
        source: Source of the component, from a ``ModelIndex``.
        root: Folder from which the source's relative paths start.
        dtype: See ``load_components``.
        device: Where it goes.
        loras: Merged after the source's own; relative paths start from the current directory.

    Raises:
        LoadingError: A file is missing or damaged, or its weights do not match.
    """
    return _load(role, _find_files(role, source, root, loras), dtype, device).component


def outline_component(
    role: str,
    source: ComponentSource,
    root: Path,
    dtype: torch.dtype,
    loras: Sequence[LoraSource] = (),
) -> tuple[Any, tuple[LoraReport, ...]]:
    """Look the files of one component through, and make it without memory.

    Weights are mapped, not read: a file that is cut short, a key or a shape too many, and a LoRA that
    does not fit are found now, and not when the component is loaded in the middle of a run.

    Args:
        role: See ``load_component``, as the others.
        source: Source of the component.
        root: Folder from which the source's relative paths start.
        dtype: Number type that the weights will have.
        loras: LoRAs after the source's own.

    Returns:
        The component on the meta device, and how much of each LoRA fits.

    Raises:
        LoadingError: A file is missing or damaged, or its weights do not match.
    """
    return _outline(role, _find_files(role, source, root, loras), dtype)


def _outline(role: str, files: _Files, dtype: torch.dtype) -> _Loaded:
    if role in WITHOUT_WEIGHTS:
        return _Loaded(LOADERS[role](files.place, dtype), ())
    mapped = load_model(role, files.place, dtype, files.source.reference, device=META)
    reports = _add_weights(mapped, files, only_checks=True)
    model = cast_weights(mapped.to(META), dtype).eval().requires_grad_(False)
    if files.source.encode_dtype or files.source.decode_dtype:
        set_vae_dtypes(model, files.source, dtype)
    return _Loaded(model, reports)


def _find_files(
    role: str, source: ComponentSource, root: Path, loras: Sequence[LoraSource]
) -> _Files:
    given = [(lora, root) for lora in source.loras] + [(lora, Path()) for lora in loras]
    return _Files(
        locate(role, source, root),
        None if source.weights is None else resolve(source.weights, "", root),
        tuple(
            # Whose it is says the component: twins are those with equal files.
            replace(lora, path=str(resolve(lora.path, "", start, [PEFT_CONFIG])), stage="stage1")
            for lora, start in given
        ),
        source,
    )


def _load(role: str, files: _Files, dtype: torch.dtype, device: torch.device) -> _Loaded:
    logger.info("loading %s from %s", role, files.place)
    if role in WITHOUT_WEIGHTS:
        return _Loaded(LOADERS[role](files.place, dtype), ())
    is_split = bool(files.source.encode_dtype or files.source.decode_dtype)
    stored = torch.float32 if is_split else dtype
    component = load_model(role, files.place, stored, files.source.reference, device=device)
    if is_split:
        set_vae_dtypes(component, files.source, dtype)
    component = component.to(device).eval().requires_grad_(False)
    return _Loaded(component, _add_weights(component, files))


def set_vae_dtypes(vae: Any, source: ComponentSource, dtype: torch.dtype) -> None:
    """Give encoder and decoder the number types that a source names, or else ``dtype``.

    Raises:
        LoadingError: ``vae`` has no networks.
    """
    names = (source.encode_dtype, source.decode_dtype)
    set_dtypes(vae, *(getattr(torch, name) if name else dtype for name in names))


def _add_weights(
    component: nn.Module, files: _Files, *, only_checks: bool = False
) -> tuple[LoraReport, ...]:
    """Replace weights by a checkpoint's and merge LoRAs, in place; or see whether they fit."""
    if files.weights is not None:
        if is_packed(component):
            raise LoadingError(
                f"{files.weights} cannot go into {files.place}, whose weights are packed; name it "
                "as the source of the component, which then needs no other weights"
            )
        if only_checks:
            component.to(META)  # takes the mapped tensors, instead of a copy
        state = wan_transformer_state_dict(read_weights(files.weights))
        load_weights(component, unpack_all(state, torch.float32), source=str(files.weights))
    require_base(component, [Path(lora.path) for lora in files.loras])
    reports = tuple(
        replace(
            merge_lora(
                component,
                lora.path,
                0 if only_checks else lora.strength,
                allow_partial=lora.allow_partial,
            ),
            strength=lora.strength,
        )
        for lora in files.loras
    )
    if only_checks:
        return reports
    if isinstance(component, SegmentTransformer3DModel):
        reference_half = component.patch_embedding.weight[:, component.config["out_channels"] :]
        if reference_half.numel() and not reference_half.any():
            logger.warning(
                "%s: the reference half of Stage II is zero, so it does not follow Stage I's motion; "
                "name trained Stage II weights",
                files.weights or files.place,
            )
    return reports


def save_components(components: Components, settings: dict[str, Any], directory: Path) -> None:
    """Write a directory that ``load_components`` reads; see ``ModelIndex`` for the index.

    Raises:
        ConfigError: Weights are in 8 bits, or packed as in their file.
    """
    for role in LOADERS:
        require_unpacked(role, getattr(components, role))
    for stage in STAGES:
        if is_quantized(getattr(components, f"{stage}_transformer")):
            raise ConfigError(
                f"{stage}'s linear layers are in 8 bits and cannot be saved; load the model with "
                f"{stage}.speed.linear=plain"
            )
    directory.mkdir(parents=True, exist_ok=True)
    is_one = components.stage1_transformer is components.stage2_transformer
    sources: dict[str, dict[str, Any]] = {}
    for role in LOADERS:
        component = getattr(components, role)
        if component is None:
            continue
        first = role.replace("stage2_", "stage1_")
        if is_one and first in sources and component is getattr(components, first):
            sources[role] = sources[first]
            continue
        subfolder = role.replace("_", "/", 1) if role.startswith("stage") else role
        component.save_pretrained(directory / subfolder)
        sources[role] = {"source": ".", "subfolder": subfolder}
        if is_one and role.endswith("transformer"):
            sources[role]["reference"] = "none"
        sources[role] |= _describe_types(component)
    index = {
        "_class_name": PIPELINE_CLASS,
        "_swifti2v_version": __version__,
        "components": sources,
        "max_text_length": components.max_text_length,
        "settings": settings,
    }
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _describe_types(component: Any) -> dict[str, str]:
    """Number types of a VAE's networks for its source, where they differ."""
    if not isinstance(component, AutoencoderKLWan):
        return {}
    codec = frame_codec(component)
    if codec.encoder.dtype == codec.decoder.dtype:
        return {}
    names = (str(network.dtype).removeprefix("torch.") for network in codec)
    return dict(zip(("encode_dtype", "decode_dtype"), names, strict=True))


def require_unpacked(role: str, component: Any) -> None:
    """Refuse to write a component whose weights are packed as in the file they came from.

    Raises:
        ConfigError: Naming the component.
    """
    if isinstance(component, nn.Module) and is_packed(component):
        raise ConfigError(
            f"{role} keeps the fp8 or GGUF weights of its file and cannot be saved in another "
            "form; load the model's bf16 files"
        )


def build(
    architecture: Architecture,
    state: Mapping[str, Weight],
    where: Path,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> Any:
    """Make a model without memory and give it a state dict, strictly.

    Args:
        architecture: Architecture of the model.
        state: Every weight; linear layers keep packed ones so, see ``swifti2v.models.weights.packed``.
        where: Named in errors.
        dtype: Number type of the weights, except those the class keeps in float32: always for
            diffusers, only in float16 for transformers.
        device: Device to which each weight goes by itself, so that the host never holds all of them;
            the meta device leaves them where they are, in the type they are stored in.
    """
    device = device or HOST
    with init_empty_weights(include_buffers=False):
        model = architecture.make(str(where))
    keep = float32_parts(model, dtype)
    ready = make_room(model, state, dtype, keep)
    packed = ready.keys() - state.keys()
    cast = {
        key: _put(tensor, torch.float32 if keep & set(key.split(".")) else dtype, device)
        if tensor.is_floating_point() and key not in packed
        else _move(tensor, device)
        for key, tensor in ready.items()
    }
    load_weights(model, cast, source=str(where))
    return model


def float32_parts(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Modules that stay float32 in a model of weights in ``dtype``, by a part of their names."""
    if isinstance(model, PreTrainedModel) and dtype != torch.float16:
        return set()
    return set(getattr(model, "_keep_in_fp32_modules", None) or ())


def cast_weights(model: nn.Module, dtype: torch.dtype) -> Any:
    """The model with weights of a type, in place; parts that stay float32 when loaded do so here."""
    keep = float32_parts(model, dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            is_kept = keep & set(name.split("."))
            parameter.data = parameter.data.to(torch.float32 if is_kept else dtype)
    return model


def _move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in the form of its file; on the host it stays mapped."""
    return tensor if device in (HOST, META) else tensor.to(device)


def _put(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device == META:
        return tensor
    if device != HOST:
        return tensor.to(device, dtype)
    # CPU kernels round differently where memory is not aligned, as in a mapped file. Copying
    # makes frames independent of the file that the weights come from.
    tensor = tensor.to(dtype)
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def load_model(
    role: str,
    place: Path,
    dtype: torch.dtype,
    reference: Reference = "channels",
    *,
    device: torch.device | None = None,
) -> Any:
    """Load a component with weights from a diffusers or transformers directory or an original file.

    Args:
        role: A key of ``swifti2v.models.loading.architectures.KINDS``.
        place: Path of the component.
        dtype: See ``build``.
        reference: See ``ComponentSource``; of a base model as Stage II.
        device: See ``build``; buffers stay on the host.

    Raises:
        LoadingError: It cannot be read, or its weights do not match its configuration.
    """
    if place.is_file():
        architecture, state = read_original(role, place)
    else:
        architecture, state = read_architecture(role, place), read_component(role, place)
        if role == "image_encoder":
            state = dict(convert_vision_names(unpack_all(state, dtype)))
        elif role.endswith("transformer"):
            state = wan_transformer_state_dict(state)
    is_segments = is_of_segments(role, reference)
    if is_segments and takes_reference(architecture.config, str(place)):
        architecture = architecture._replace(
            kind=SegmentTransformer3DModel
        )  # a file does not tell its class
    model = build(architecture, state, place, dtype, device)
    if is_segments and not isinstance(model, SegmentTransformer3DModel):
        # With a zero reference half, where there is to be one.
        model = SegmentTransformer3DModel.from_base(
            model, takes_reference=reference == "channels", shares_weights=True
        )
    return model


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
    "text_encoder": partial(load_model, "text_encoder"),
    "tokenizer": load_tokenizer,
    "image_encoder": partial(load_model, "image_encoder"),
    "image_processor": lambda place, _: load_image_processor(place),
    "stage1_transformer": partial(load_model, "stage1_transformer"),
    "stage1_vae": partial(load_model, "stage1_vae"),
    "stage2_transformer": partial(load_model, "stage2_transformer"),
    "stage2_vae": partial(load_model, "stage2_vae"),
}


def _require_match(
    parts: Components, name: str, stages: Sequence[StageName], *, displaces: bool
) -> None:
    """Refuse components that do not belong together, or not to how Stage I tells motion."""
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
            codec["z_dim"]
            if isinstance(parts.stage1_transformer, SegmentTransformer3DModel)
            else 2 * codec["z_dim"] + codec["scale_factor_temporal"],
        ),
        "stage1_transformer out_channels": (
            first["out_channels"],
            codec["z_dim"] + (NUM_WAYS if displaces else 0),
        ),
        "stage2_transformer in_channels": (
            second["in_channels"],
            # As many as it gives are latents alone, see ComponentSource.reference.
            fine["z_dim"] * (1 if second["in_channels"] == second["out_channels"] else 2),
        ),
        "stage2_transformer out_channels": (second["out_channels"], fine["z_dim"]),
        "stage1_transformer text_dim": (first["text_dim"], text_dim),
        "stage2_transformer text_dim": (second["text_dim"], text_dim),
        "stage1_transformer image_dim (of the image encoder)": (
            first.get("image_dim"),
            image_dim,
        ),
    }
    for what, (is_value, wanted) in checks.items():
        if what.startswith((*stages,)) and is_value != wanted:
            raise LoadingError(
                f"{name}: {what} is {is_value}, but the other components need {wanted}"
            )
