"""The photo's detail is carried on a GPU as on a CPU, up to rounding."""

import pytest
import torch

from swifti2v.config import Stage2Config
from swifti2v.media import downscale, frames_to_video
from swifti2v.pipelines.transition import MotionReference, make_reference
from tests.helpers.evaluation_clips import panning_clip

pytestmark = pytest.mark.gpu


def test_carried_detail_is_that_of_the_cpu_and_repeats_itself():
    clip = panning_clip(5, 4)
    low, photo, config = (
        MotionReference(downscale(clip, 4)),
        frames_to_video(clip[:1]),
        Stage2Config(reference_detail="carried"),
    )
    expected = make_reference(low, photo, config)
    first, second = (make_reference(low, photo.cuda(), config).cpu() for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, atol=1e-2, rtol=0)  # TF32 may resize
