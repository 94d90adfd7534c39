"""Architecture of a component, read from its configuration without its weights."""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from transformers import CLIPVisionModel, PreTrainedModel, UMT5EncoderModel

from swifti2v.errors import LoadingError
from swifti2v.models.loading import originals
from swifti2v.models.loading.official import (
    component_kind,
    convert_config,
    find_official_file,
    is_wan_model,
)
from swifti2v.models.loading.sources import (
    CONFIG_NAME,
    ComponentSource,
    ModelIndex,
    Reference,
    download,
    find_here,
    find_snapshot,
    is_on_hub,
    parent,
    split_source,
)
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.weights.files import read_names, read_state_dict, read_weights
from swifti2v.models.weights.names import infer_wan_config, wan_transformer_state_dict
from swifti2v.models.weights.packed import Weight
from swifti2v.shapes import ScaleFactors

WAN21_I2V_14B = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 36,
    "out_channels": 16,
    "ffn_dim": 13824,
    "num_layers": 40,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}
WAN22_TI2V_5B = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 48,
    "out_channels": 48,
    "ffn_dim": 14336,
    "num_layers": 30,
}
WAN22_VAE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": originals.WAN22_LATENTS_MEAN,
    "latents_std": originals.WAN22_LATENTS_STD,
}
UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
CLIP_VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}


class Architecture(NamedTuple):
    """A class of models, and the arguments that make one of them."""

    kind: Any
    """``WanTransformer3DModel``, ``UMT5EncoderModel`` and their like."""
    config: Mapping[str, Any]
    """Values of its ``config.json``; keys that the class does not know are ignored."""

    def make(self, where: str) -> Any:
        """The model with random weights.

        Args:
            where: Named in errors.

        Raises:
            LoadingError: There is no such model.
        """
        try:
            if issubclass(self.kind, PreTrainedModel):
                return self.kind(self.kind.config_class(**self.config))
            known = inspect.signature(self.kind.__init__).parameters
            return self.kind(**{k: v for k, v in self.config.items() if k in known})
        except (TypeError, ValueError, KeyError, ZeroDivisionError, RuntimeError) as error:
            raise LoadingError(
                f"the configuration of {where} describes no model: {error}"
            ) from error

    def value(self, key: str) -> Any:
        """A value of the configuration, or the class's own default."""
        return self.config.get(key, inspect.signature(self.kind.__init__).parameters[key].default)

    def make_empty(self, where: str) -> Any:
        """The model in eval mode, without memory: its tensors have sizes and no values."""
        with torch.device("meta"):
            return self.make(where).eval().requires_grad_(False)


KNOWN: dict[str, dict[str, Architecture]] = {
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": {
        "transformer": Architecture(WanTransformer3DModel, WAN21_I2V_14B),
        "vae": Architecture(AutoencoderKLWan, {}),
        "text_encoder": Architecture(UMT5EncoderModel, UMT5_XXL),
        "image_encoder": Architecture(CLIPVisionModel, CLIP_VIT_H),
    },
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": {
        "transformer": Architecture(WanTransformer3DModel, WAN22_TI2V_5B),
        "vae": Architecture(AutoencoderKLWan, WAN22_VAE),
        "text_encoder": Architecture(UMT5EncoderModel, UMT5_XXL),
    },
}
"""Public models by Hub id and subfolder, so that a plan can be made before they are downloaded."""
KINDS: dict[str, tuple[Any, ...]] = {
    "stage1_transformer": (WanTransformer3DModel, SegmentTransformer3DModel),
    "stage2_transformer": (SegmentTransformer3DModel, WanTransformer3DModel),
    "stage1_vae": (AutoencoderKLWan, BlockCodec),
    "stage2_vae": (AutoencoderKLWan, BlockCodec),
    "text_encoder": (UMT5EncoderModel,),
    "image_encoder": (CLIPVisionModel,),
    "vae": (AutoencoderKLWan,),
}
"""Classes of each component of ``swifti2v.models.loading.components.Components`` that has weights; ``vae`` is
one alone."""
ORIGINALS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "stage1_vae": originals.convert_vae,
    "stage2_vae": originals.convert_vae,
    "vae": originals.convert_vae,
    "text_encoder": originals.convert_text_encoder,
    "image_encoder": originals.convert_image_encoder,
}
"""Functions that turn the weights of an original file into configuration and today's names."""


def find_architecture(role: str, source: ComponentSource, root: Path) -> Architecture:
    """Architecture of a component as it is loaded, without its weights where they are remote.

    Args:
        role: A key of ``KINDS``.
        source: Source of the component.
        root: Folder from which relative paths start.

    Raises:
        LoadingError: It is nowhere, is no such component, or is a remote file without a
            configuration beside it.
    """
    place = find_here(source.source, source.subfolder, root, source.also)
    if place is not None:
        architecture = read_architecture(role, find_official_file(role, place) or place)
    else:
        told = _configured(source)
        architecture = _find_known(role, told) or _read_remote(role, told, root)
    if is_of_segments(role, source.reference):
        return widen(architecture, source, str(place or source.source))
    return architecture


def recall_architecture(role: str, source: ComponentSource, root: Path) -> Architecture | None:
    """Architecture of the model at a component's source, if it is known without the network."""
    told = _configured(source)
    known = _find_known(role, told)
    place = find_here(told.source, told.subfolder, root)
    if place is None and is_on_hub(told.source, root):
        repo_id, inside = split_source(told.source, told.subfolder)
        place = (find_snapshot(repo_id) or root) / inside  # perhaps the configuration alone
    if known is not None or place is None or not (place / CONFIG_NAME).is_file():
        return known
    return read_architecture(role, find_official_file(role, place) or place)


def _configured(source: ComponentSource) -> ComponentSource:
    """The folder that has the configuration of a source, where the source says so."""
    if not source.architecture:
        return source
    repo_id, inside = split_source(source.architecture)
    return replace(source, source=repo_id, subfolder=inside)


def _find_known(role: str, source: ComponentSource) -> Architecture | None:
    """Architecture of a public model that Wan's own repository holds in one folder."""
    repository = KNOWN.get(f"{source.source}-Diffusers")
    if repository is not None and not source.subfolder:
        return repository.get(component_kind(role))
    return KNOWN.get(source.source, {}).get(source.subfolder)


def _read_remote(role: str, source: ComponentSource, root: Path) -> Architecture:
    """Read the architecture from the configuration on the Hub alone."""
    unknown = LoadingError(
        f"{root / source.source / source.subfolder} does not exist, so the sizes of {role} are not "
        "known; download it first, or name a directory in diffusers' layout"
    )
    organization, _, rest = source.source.partition("/")
    name, *inside = rest.split("/")
    if not is_on_hub(source.source, root) or (inside and not source.subfolder):
        raise unknown
    repo_id = f"{organization}/{name}"
    file = "/".join(part for part in (*inside, source.subfolder, CONFIG_NAME) if part)
    snapshot = find_snapshot(repo_id)
    is_here = snapshot is not None and (snapshot / file).is_file()
    place = ((snapshot if snapshot and is_here else download(repo_id, file)) / file).parent
    if is_wan_model(place):
        if not role.endswith("transformer"):
            raise unknown
        download(repo_id, f"{parent(file)}*.index.json")  # names of weights tell what it attends to
    return read_architecture(role, place)


def find_scale(stage: str, index: ModelIndex, root: Path) -> ScaleFactors:
    """Scale factors of a stage, before any weights are loaded.

    Args:
        stage: ``stage1`` or ``stage2``.
        index: The model.
        root: Folder from which its relative paths start.

    Raises:
        LoadingError: See ``find_architecture``.
    """
    vae = find_architecture(f"{stage}_vae", index.components[f"{stage}_vae"], root)
    source = index.components[f"{stage}_transformer"]
    place = find_here(source.source, source.subfolder, root, source.also)
    if place is not None and place.is_file():
        # It has no configuration and is too large to be read twice: one of Wan's own models.
        transformer = Architecture(WanTransformer3DModel, {})
    else:
        transformer = find_architecture(f"{stage}_transformer", source, root)
    return ScaleFactors(
        time=vae.value("scale_factor_temporal"),
        space=vae.value("scale_factor_spatial"),
        patch=transformer.value("patch_size")[1],
    )


def read_architecture(role: str, place: Path) -> Architecture:
    """Architecture of a component on this machine: of its ``config.json`` or its original file.

    Raises:
        LoadingError: It cannot be read, or is no such component.
    """
    if place.is_file():
        return read_original(role, place)[0]
    kinds = KINDS[role]
    config = _read_config(place)
    if role.endswith("transformer") and is_wan_model(place):
        converted = convert_config(config, read_names(place), place)
        return Architecture(WanTransformer3DModel, converted)
    if issubclass(kinds[0], PreTrainedModel):
        known = kinds[0].config_class.model_type
        if (name := config.get("model_type", known)) != known:
            raise LoadingError(f"{place} holds a {name} model, not a {known}")
        # How it was stored is not kept: the caller decides anew.
        stored = ("dtype", "torch_dtype")
        return Architecture(kinds[0], {k: v for k, v in config.items() if k not in stored})
    by_name = {kind.__name__: kind for kind in kinds}
    if (name := config.get("_class_name")) not in by_name:
        raise LoadingError(f"{place} holds a {name}, not a {' or '.join(by_name)}")
    return Architecture(by_name[name], config)


def read_component(role: str, place: Path) -> dict[str, Weight]:
    """Weights of a component under the names of their file; packed ones stay so where they can.

    Raises:
        LoadingError: See ``read_weights``.
    """
    return read_weights(place) if keeps_packed(role) else dict(read_state_dict(place))


def keeps_packed(role: str) -> bool:
    """Whether a component computes with packed weights; the others are small and unpacked."""
    return role.endswith("transformer") or role == "text_encoder"


def read_original(role: str, file: Path) -> tuple[Architecture, dict[str, Weight]]:
    """Architecture and weights of an original file, which has no configuration beside it.

    Raises:
        LoadingError: It cannot be read, or is no such component.
    """
    return convert_original(role, read_component(role, file))


def convert_original(
    role: str, state: Mapping[str, Weight]
) -> tuple[Architecture, dict[str, Weight]]:
    """Architecture and today's names of the weights of an original file.

    Raises:
        LoadingError: They are no such component.
    """
    if role.endswith("transformer"):
        renamed = wan_transformer_state_dict(state)
        return Architecture(WanTransformer3DModel, infer_wan_config(renamed)), renamed
    config, converted = ORIGINALS[role](state)
    values = config if isinstance(config, dict) else config.to_dict()
    return Architecture(KINDS[role][0], values), converted


def _read_config(place: Path) -> dict[str, Any]:
    file = place / CONFIG_NAME
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise LoadingError(f"{file} cannot be read: {error}") from None


def is_of_segments(role: str, reference: Reference) -> bool:
    """Whether a base model becomes one of segments, with a noise level for each frame."""
    return role == "stage2_transformer" or reference == "none"


def takes_reference(config: Mapping[str, Any], name: str) -> bool:
    """Whether a transformer has Stage II's input channels; a base that can be widened has not.

    Args:
        config: Configuration of a Wan transformer.
        name: Named in errors.

    Raises:
        LoadingError: Other inputs than latents, such as those of an image-to-video model.
    """
    in_channels, out_channels = config.get("in_channels", 16), config.get("out_channels", 16)
    takes_latents_only = config.get("image_dim") is None
    if in_channels == 2 * out_channels and takes_latents_only:
        return True
    if in_channels != out_channels or not takes_latents_only:
        raise LoadingError(
            f"{name} takes {in_channels} channels and gives {out_channels}: Stage II, and a Stage I "
            "without channels for the photo (reference: none), are made from a model that takes as "
            "many as it gives, such as Wan2.2-TI2V-5B"
        )
    return False


def widen(base: Architecture, source: ComponentSource, name: str) -> Architecture:
    """The segment transformer that is made from an architecture, or is it already.

    Args:
        base: Architecture of the model at the source.
        source: Says whether a base model gets room for the reference.
        name: Named in errors.

    Raises:
        LoadingError: See ``takes_reference``.
    """
    config = dict(base.config)
    is_base = not takes_reference(config, name) and base.kind is not SegmentTransformer3DModel
    if is_base and source.reference == "channels":
        config["in_channels"] = 2 * config.get("in_channels", 16)
    return Architecture(SegmentTransformer3DModel, config)
