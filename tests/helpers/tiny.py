"""A pipeline of the real classes at a tiny size, with fixed random weights."""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from swifti2v.config import GenerationConfig, merge, parse_config
from swifti2v.models.loading.components import Components
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.pipelines.stage1 import Conditions
from swifti2v.pipelines.transition import MotionReference
from swifti2v.pipelines.two_stage import SwiftI2VPipeline

SIZE = 64
"""Output height and width in pixels; Stage I works at a quarter."""
NUM_FRAMES = 17
TEXT_LENGTH = 24
"""Most tokens (bytes and the end token) of a prompt."""
SETTINGS: dict[str, Any] = {
    "num_frames": NUM_FRAMES,
    "height": SIZE,
    "width": SIZE,
    "stage1": {"sampling": {"num_inference_steps": 2}},
    "stage2": {"segment_size": 1, "sampling": {"num_inference_steps": 2}},
}
DISPLACING: dict[str, Any] = {
    "condition": "chart",
    "motion": "displacement",
    "sampling": {"parameterization": "reference_residual"},
}
"""Settings of a Stage I that generates displacement."""
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 1,
    "attention_head_dim": 24,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 64,
}


def tiny_components(seed: int = 0, *, displaces: bool = False) -> Components:
    """All models, in float32 on the CPU.

    Args:
        seed: Of the weights.
        displaces: Stage I generates displacement besides the latents.
    """
    torch.manual_seed(seed)
    text_config = UMT5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    codec = BlockCodec(latents_std=(0.5,) * 768)
    stage1: Any = WanTransformer3DModel  # untyped in diffusers
    parts = Components(
        text_encoder=UMT5EncoderModel(text_config),
        tokenizer=ByT5Tokenizer(extra_ids=0),
        stage1_transformer=stage1(
            in_channels=1540, out_channels=773 if displaces else 768, **TRANSFORMER
        ),
        stage1_vae=codec,
        stage2_transformer=SegmentTransformer3DModel(
            in_channels=1536, out_channels=768, **TRANSFORMER
        ),
        stage2_vae=codec,
        max_text_length=TEXT_LENGTH,
    )
    models: list[Any] = [parts.text_encoder, parts.stage1_transformer, parts.stage2_transformer]
    for model in models:
        model.eval().requires_grad_(False)
    return parts


class KeptSegments(dict[int, Tensor]):
    """A ``SegmentStore`` of latents by segment index, and of nothing else."""

    def load_conditions(self) -> Conditions | None:
        return None

    def save_conditions(self, conditions: Conditions) -> None:
        pass

    def load_piece(self, index: int) -> MotionReference | None:
        return None

    def save_piece(self, index: int, motion: MotionReference) -> None:
        pass

    def load_motion_reference(self) -> MotionReference | None:
        return None

    def save_motion_reference(self, motion: MotionReference) -> None:
        pass

    def load_segment(self, index: int) -> Tensor | None:
        return self.get(index)

    def save_segment(self, index: int, latents: Tensor) -> None:
        self[index] = latents


def tiny_vae(seed: int = 0) -> AutoencoderKLWan:
    """A causal VAE of 16 latent channels."""
    torch.manual_seed(seed)
    vae: AutoencoderKLWan = AutoencoderKLWan(
        base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, z_dim=16
    )
    return vae.eval().requires_grad_(False)


def tiny_pipeline(seed: int = 0, *, displaces: bool = False) -> SwiftI2VPipeline:
    """Both stages; 17 frames of 64x64 in four segments of two steps each."""
    own = {"stage1": DISPLACING} if displaces else {}
    config = parse_config(GenerationConfig, merge(SETTINGS, own), "tests.helpers.tiny")
    return SwiftI2VPipeline(tiny_components(seed, displaces=displaces), config)
