import subprocess
import sys
from typing import Any

import diffusers
import pytest
import torch

from swifti2v.config import SpeedConfig
from swifti2v.errors import ConfigError
from swifti2v.evaluation.speed.models import distance
from swifti2v.models.runtime.speed import attention_order, prepare_speed
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.weights.quantization import FLOAT8_CAPABILITY

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def model() -> SegmentTransformer3DModel:
    torch.manual_seed(0)
    wan: Any = diffusers.WanTransformer3DModel
    base = wan(
        num_attention_heads=4, attention_head_dim=128, in_channels=48, out_channels=48,
        text_dim=64, freq_dim=64, ffn_dim=1024, num_layers=4,
    )  # fmt: skip
    made: SegmentTransformer3DModel = SegmentTransformer3DModel.from_base(base).eval()
    torch.nn.init.normal_(made.patch_embedding.weight, std=0.05)
    torch.nn.Module.to(made, CUDA)
    return made


@torch.no_grad()
def run(transformer: SegmentTransformer3DModel, num_given: int = 0) -> torch.Tensor:
    torch.manual_seed(1)
    dtype = transformer.patch_embedding.weight.dtype
    inputs = torch.randn(1, 96, 5, 16, 24, device=CUDA, dtype=dtype)
    sigma = torch.tensor([[0, 0, 0.9, 0.9, 0.9]], device=CUDA)
    text = torch.randn(1, 32, 64, device=CUDA, dtype=dtype)
    output: torch.Tensor = transformer(inputs, sigma, text, num_given=num_given)
    return output[:, :, 2 - num_given :]


@pytest.fixture(scope="module")
def reference():
    return run(model())


@pytest.mark.parametrize("first", ["auto", "cudnn", "flash", "efficient", "math"])
def test_every_kernel_of_attention_is_near_float32(first, reference):
    with attention_order(first, CUDA):
        assert distance(run(model().bfloat16()), reference) < 2e-2


def test_leaving_given_frames_out_changes_rounding_alone(reference):
    assert distance(run(model(), num_given=2), reference) < 1e-4  # TF32 may be on


@pytest.mark.parametrize("linear", ["int8", "float8"])
def test_8_bit_layers_are_near_float32(linear, reference):
    small = model().bfloat16()
    if linear == "float8" and torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        with pytest.raises(ConfigError, match="no 8-bit floating point"):
            prepare_speed(small, SpeedConfig(linear=linear), CUDA)
        return
    prepare_speed(small, SpeedConfig(linear=linear), CUDA)
    assert distance(run(small), reference) < 8e-2


def test_compiled_blocks_are_near_float32(reference, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    small = model().bfloat16()
    prepare_speed(small, SpeedConfig(compile=True), CUDA)
    assert distance(run(small, num_given=2), reference) < 2e-2
    compiled: Any = small.blocks[0].forward
    assert not compiled._fallback.is_taken


def test_a_capped_gpu_has_as_much_memory_as_was_left():
    code = """
import torch
from swifti2v.evaluation.speed.device_cap import capped
with capped(8 * 10**9, torch.device("cuda")):
    free, total = torch.cuda.mem_get_info()
    assert free < 8.1e9 < total, (free, total)
    try:
        torch.empty(8 * 10**9, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        print("full")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "full", done.stderr
