import gc

import numpy as np
import pytest
import torch
from PIL import Image

from swifti2v.models.runtime.placement import place
from swifti2v.models.runtime.roles import Placement
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from tests.helpers.tiny import SIZE, TRANSFORMER, tiny_pipeline

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
LARGE = TRANSFORMER | {"num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096,
                       "num_layers": 24}  # fmt: skip


def large_pipeline() -> SwiftI2VPipeline:
    """Stage II of 1.6 GB in 24 blocks; everything else is tiny."""
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    model = SegmentTransformer3DModel(in_channels=768, out_channels=384, **LARGE)
    pipe.components.stage2_transformer = model.eval().requires_grad_(False)
    pipe.stage2.transformer = pipe.components.stage2_transformer
    return pipe


def test_streamed_frames_are_the_resident_ones_in_a_part_of_the_memory():
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    frames, peaks = {}, {}
    plans: tuple[Placement, ...] = ("resident", "streamed")
    for plan in plans:
        pipe = large_pipeline()
        total = sum(p.nbytes for p in pipe.components.stage2_transformer.parameters())
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        place(pipe.components, CUDA, plan)
        frames[plan] = [pipe(image, "zoom in", generator=seed).frames for seed in (1, 2)]
        peaks[plan] = torch.cuda.max_memory_allocated()
        del pipe
        gc.collect()
    for first, second in zip(*frames.values(), strict=True):
        assert np.array_equal(first, second)
    assert peaks["resident"] > total
    assert peaks["streamed"] < total / 2
