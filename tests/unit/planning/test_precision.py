import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from swifti2v.planning.devices import DEVICES, Device, Precision, Rates
from swifti2v.planning.precision import choose_cpu_precision, cpu_name


def cpu_with(gain: float, calls: list[str]) -> Any:
    plain = Rates(linear=1e11, attention=5e10, convolution=1e11, traffic=1e10, transfer=1e10)

    def measure(device: torch.device, precision: Precision) -> Device:
        calls.append(precision)
        factor = gain if precision == "bfloat16" else 1
        rates = replace(plain, linear=factor * plain.linear, attention=factor * plain.attention)
        return replace(DEVICES["rtx4090"], rates={precision: rates}, is_cpu=True)

    return measure


@pytest.mark.parametrize(("gain", "chosen"), [(4, "bfloat16"), (1.1, "float32"), (0.2, "float32")])
def test_bfloat16_is_taken_where_it_is_clearly_faster(tmp_path, gain, chosen):
    assert choose_cpu_precision(tmp_path / "cpu.json", cpu_with(gain, [])) == chosen


def test_a_cpu_is_measured_once(tmp_path):
    calls: list[str] = []
    cache = tmp_path / "new" / "cpu.json"
    answers = {choose_cpu_precision(cache, cpu_with(4, calls)) for _ in range(3)}
    assert answers == {"bfloat16"}
    assert calls == ["float32", "bfloat16"]
    (key,) = json.loads(cache.read_text())
    assert cpu_name() in key
    assert torch.__version__ in key


@pytest.mark.parametrize("content", ["", "[]", "not json", '{"another CPU": "float32"}'])
def test_what_is_unknown_or_damaged_is_measured_again(tmp_path, content):
    cache = tmp_path / "cpu.json"
    cache.write_text(content)
    assert choose_cpu_precision(cache, cpu_with(4, [])) == "bfloat16"
    assert "bfloat16" in cache.read_text()
