"""Arithmetic of a step: against torch's own counter, and against the published 2K model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.planning.devices import DEVICES
from swifti2v.training.adapters import AdapterConfig, add_adapter
from swifti2v.training.engine.memory import ParameterCount
from swifti2v.training.engine.work import (
    DEVICE_NAMES,
    WorkMeter,
    count_flops,
    find_peak,
    measure_peak,
)
from tests.helpers.regression import make_trainer, read_lines
from tests.unit.training.engine.test_memory import make

CPU = torch.device("cpu")


def call(model: nn.Module, num_given: int = 0) -> Tensor:
    latents, text = torch.randn(2, 8, 3, 16, 16), torch.randn(2, 7, 16)
    if isinstance(model, SegmentTransformer3DModel):
        output: Tensor = model(latents, torch.full((2, 3), 0.5), text, num_given=num_given)
        return output
    whole: Any = model(
        hidden_states=latents,
        timestep=torch.tensor([500.0, 500.0]),
        encoder_hidden_states=text,
        return_dict=False,
    )
    own: Tensor = whole[0]
    return own


@pytest.mark.parametrize(
    ("kind", "has_adapter", "num_given"),
    [
        (SegmentTransformer3DModel, False, 0),
        (SegmentTransformer3DModel, False, 2),
        (SegmentTransformer3DModel, True, 0),
        (WanTransformer3DModel, False, 0),
        (WanTransformer3DModel, True, 0),
    ],
)
def test_flops_are_those_that_torch_counts(
    kind: type[nn.Module], has_adapter: bool, num_given: int
) -> None:
    model = make(kind)
    if has_adapter:
        add_adapter(model, AdapterConfig(rank=4))
    # Fused attention on a CPU is not counted by torch.
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        WorkMeter(model).measure() as work,
    ):
        loss: Any = call(model, num_given).square().mean()
        loss.backward()
    assert work.tokens == 2 * 3 * 8 * 8
    # The embeddings of time, and for an adapter its own products, are a percent at this size.
    assert work.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_flops_of_a_window_of_the_5b_model() -> None:
    with torch.device("meta"):
        config = SegmentTransformer3DModel().config
    everything = ParameterCount(5_000_000_000, 5_000_000_000)
    flops = count_flops(config, 17_600, 1, everything)
    assert flops / 3 == pytest.approx(270.98e12, rel=1e-3)  # counted for one forward pass
    assert count_flops(config, 17_600, 4, everything) == 4 * flops
    frozen = count_flops(config, 17_600, 1, ParameterCount(5_000_000_000, 0))
    assert 2 / 3 < frozen / flops < 0.85  # attention has no weights


def test_calls_outside_the_block_and_of_other_models_do_not_count() -> None:
    model = make(SegmentTransformer3DModel)
    meter = WorkMeter(model)
    with meter.measure() as first:
        call(model)
    call(model)
    with meter.measure() as both:
        call(model)
        call(model)
    assert both.tokens == 2 * first.tokens
    assert both.flops == 2 * first.flops > 0
    with WorkMeter(nn.Linear(2, 2)).measure() as nothing:
        pass
    assert (nothing.tokens, nothing.flops) == (0, 0)


def test_checkpointed_blocks_count_once() -> None:
    model = make(SegmentTransformer3DModel)
    meter = WorkMeter(model)
    works = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.enable_gradient_checkpointing()
        with meter.measure() as work:
            loss: Any = call(model).square().mean()
            loss.backward()
        works.append(work)
    assert works[0] == works[1]


def test_a_cpu_has_no_peak_but_can_be_measured() -> None:
    assert find_peak(CPU, torch.bfloat16) == 0
    assert measure_peak(CPU, torch.float32, size=64) > 0


def test_known_devices_have_the_peak_of_their_data_sheet() -> None:
    peaks = {part: DEVICES[name].peak for part, name in DEVICE_NAMES.items()}
    assert peaks == {
        "H200": 989.4e12,
        "H100 80GB HBM3": 989.4e12,
        "A100": 312e12,
        "L40S": 362e12,
        "RTX 4090": 165.2e12,
    }


def test_a_model_without_video_tokens_counts_none(tmp_path: Path) -> None:
    make_trainer(tmp_path).run(max_steps=2)
    for line in read_lines(tmp_path):
        assert line["tokens_per_second"] == line["flops"] == line["mfu"] == 0
