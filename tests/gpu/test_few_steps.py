"""Named noise levels, noising anew, and Stage I in pieces, on a GPU as on the CPU."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swifti2v.models.runtime.placement import place
from tests.helpers.tiny import SIZE, tiny_pipeline

pytestmark = pytest.mark.gpu
LADDER: dict[str, Any] = {
    "num_inference_steps": 3, "sigmas": [1, 0.757, 0.522], "rule": "renoise",
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "stage1": {"sampling": LADDER, "piece_frames": 9, "piece_overlap": 5},
    "stage2": {"sampling": LADDER | {"strength": 0.757}},
    "later_prompts": ((13, "pan left"),),
}


def make(device: str) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    pipe = tiny_pipeline()
    place(pipe.components, torch.device(device), "resident")
    return pipe(Image.fromarray(pixels), "zoom in", generator=3, **SETTINGS).frames


def test_few_steps_in_pieces_are_those_of_the_cpu():
    on_gpu, again, on_cpu = make("cuda"), make("cuda"), make("cpu")
    assert np.array_equal(on_gpu, again)
    error = np.mean((on_gpu.astype(float) - on_cpu) ** 2)
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > 40
