"""Makes a clip in a process that may not take more than so much memory: python -m tests.helpers.limited_memory."""

import resource
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from tests.helpers.tiny import tiny_pipeline

NUM_LAYERS = 32
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 128, "text_dim": 256, "freq_dim": 16,
    "ffn_dim": 1024, "num_layers": NUM_LAYERS, "rope_max_seq_len": 64,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 384, "d_model": 256, "d_kv": 64, "d_ff": 2048, "num_layers": NUM_LAYERS,
    "num_heads": 4,
}  # fmt: skip


def save_model(folder: Path) -> int:
    """A model of three parts of almost one size, in bfloat16; the bytes of the largest."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        pipe = tiny_pipeline()
        stage1: Any = WanTransformer3DModel  # untyped in diffusers
        parts = pipe.components
        parts.text_encoder = UMT5EncoderModel(UMT5Config(**TEXT))
        parts.stage1_transformer = stage1(in_channels=1540, out_channels=768, **TRANSFORMER)
        parts.stage2_transformer = SegmentTransformer3DModel(
            in_channels=1536, out_channels=768, **TRANSFORMER
        )
    finally:
        torch.set_default_dtype(torch.float32)
    pipe.save_pretrained(folder)
    return max(file.stat().st_size for file in folder.rglob("*.safetensors"))


def main(folder: str, most_bytes: str, staged: str) -> None:
    """Load the model and make the clip with at most so many bytes above what the imports took."""
    image = photo()
    status = Path("/proc/self/status").read_text().splitlines()
    (before,) = (int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    limit = before + int(most_bytes)
    # Data: what is allocated, and mapped files that the process may write to.
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    pipe = SwiftI2VPipeline.from_pretrained(
        folder, torch_dtype=torch.bfloat16, device="cpu", staged=staged == "staged"
    )
    sys.stdout.write(f"{pipe(image, 'zoom', num_frames=5).frames.shape}")


def photo() -> Any:
    """The photo; one forward pass before it lets PyTorch take what it takes once."""
    from tests.helpers.hub import photo as make_photo

    tiny_pipeline()(make_photo(), "zoom", num_frames=5)
    return make_photo()


if __name__ == "__main__":
    main(*sys.argv[1:])
