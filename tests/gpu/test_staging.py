import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swifti2v.evaluation.verify.report import verify
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from tests.helpers.hub import photo
from tests.helpers.limited_memory import save_model

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("placement", ["resident", "streamed"])
def test_a_staged_clip_takes_the_device_memory_of_its_largest_part(
    tmp_path: Path, placement: Any
) -> None:
    largest = save_model(tmp_path)
    frames, peaks = [], []
    for staged in (False, True):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pipe = SwiftI2VPipeline.from_pretrained(
            tmp_path, device=CUDA, placement=placement, staged=staged
        )
        frames.append(pipe(photo(), "zoom", num_frames=5).frames)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        if staged:  # the first kernels keep a workspace
            assert torch.cuda.memory_allocated() - before < 0.2 * largest
        del pipe
    np.testing.assert_array_equal(frames[0], frames[1])
    if placement == "resident":
        together, staged_peak = peaks
        assert together > 2.8 * largest
        assert staged_peak < 1.8 * largest


def test_nano_is_verified_on_the_gpu() -> None:
    report = verify("nano", device=CUDA, dtype=torch.bfloat16)
    assert [f for f in report.findings if f.status != "ok"] == []
