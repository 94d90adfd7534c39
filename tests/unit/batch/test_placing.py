"""Host memory that a batch asks a cluster for."""

from typing import Any

import pytest

from swifti2v.batch.placing import predict_host_bytes
from swifti2v.batch.rows import ClipRow, Machine
from swifti2v.jobs.layers import resolve_config
from swifti2v.planning.devices import DEVICES
from swifti2v.planning.plans import make_plan
from swifti2v.planning.stored import find_costs
from swifti2v.units import GB


def row(name: str, **options: Any) -> ClipRow:
    return ClipRow(id=name, image="a.png", prompt="pan left", seed=0, **options)


def predict(*rows: ClipRow, is_cpu: bool = False, **machine: Any) -> int:
    return predict_host_bytes(rows, Machine(**machine), is_cpu=is_cpu)


def test_the_clip_that_takes_most_decides():
    small = row("small", changes={"num_frames": 33, "width": 160, "height": 96})
    large = row("large", changes={"num_frames": 81, "width": 640, "height": 384})
    alone = [predict(clip, is_cpu=True) for clip in (small, large)]
    assert 0 < alone[0] < alone[1]
    assert predict(small, large, row("like", changes=small.changes), is_cpu=True) == alone[1]
    assert predict() == 0


def test_a_gpu_is_asked_for_what_the_plan_says():
    config = resolve_config("paper")
    plan = make_plan(find_costs("paper", config, "bfloat16"), DEVICES["h100"], "bfloat16")
    assert predict(row("a", model="paper")) == pytest.approx(plan.options[0].host_bytes, abs=1)


def test_weights_that_wait_in_host_memory_count():
    clip = row("a", model="paper")
    resident, streamed = predict(clip), predict(clip, placement="streamed")
    assert resident < 10 * GB < 40 * GB < streamed
    assert predict(clip, memory="24") >= streamed  # a budget may need them there
