"""The trained parts of nano as a model directory."""

import copy
import logging
from pathlib import Path
from typing import TypeVar

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn
from transformers import UMT5EncoderModel

from swifti2v.config import to_dict
from swifti2v.models.loading.components import Components, save_components
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.storage import whole_directory
from swifti2v.training.nano.config import NanoConfig
from swifti2v.training.nano.text_encoder import make_tokenizer

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def assemble(
    config: NanoConfig,
    codecs: tuple[BlockCodec, BlockCodec],
    text_encoder: UMT5EncoderModel,
    transformers: tuple[WanTransformer3DModel, SegmentTransformer3DModel],
    directory: Path,
) -> None:
    """Write the trained parts as a model directory in bfloat16, replacing an older one.

    It appears, or is replaced, only once it is whole. The parts are not changed.
    """
    components = Components(
        text_encoder=round_weights(text_encoder),
        tokenizer=make_tokenizer(),
        stage1_transformer=round_weights(transformers[0]),
        stage1_vae=codecs[0],
        stage2_transformer=round_weights(transformers[1]),
        stage2_vae=codecs[1],
        max_text_length=config.max_text_length,
    )
    with whole_directory(directory) as unfinished:
        save_components(components, to_dict(config.to_generation_config()), unfinished)
    logger.info("model written to %s", directory)


def round_weights(model: Model) -> Model:
    """Copy of a model on the CPU in bfloat16, but for the parts its class keeps in float32."""
    rounded = copy.deepcopy(model).cpu()
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in rounded.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(torch.bfloat16)
    return rounded
