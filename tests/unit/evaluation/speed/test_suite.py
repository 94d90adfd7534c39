import json
import time
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.errors import ConfigError, ShapeError
from swifti2v.evaluation.speed.device_cap import OUTSIDE, capped, find_fraction
from swifti2v.evaluation.speed.models import (
    Subject,
    TokenTimestepTransformer,
    distance,
    make_random,
)
from swifti2v.evaluation.speed.rows import Machine, Row, add_ratios, to_dict, to_markdown
from swifti2v.evaluation.speed.suite import PARTS, USUAL, require_parts, run_parts
from swifti2v.evaluation.speed.timing import Protocol, Timing, measure, peak_memory
from swifti2v.evaluation.speed.vaes import narrow_vae
from swifti2v.models.loading.architectures import Architecture
from swifti2v.models.transformer import SegmentTransformer3DModel
from tests.helpers.tiny import TRANSFORMER

CPU = torch.device("cpu")
ONCE = Protocol(warmups=0, repeats=1)
SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9}


def test_the_median_counts_and_the_first_run_is_told():
    pauses = iter([0.05, 0.0, 0.001, 0.03, 0.002])

    def run() -> float:
        pause = next(pauses)
        time.sleep(pause)
        return pause

    timing, last = measure(run, CPU, Protocol(warmups=2, repeats=3))
    assert last == 0.002
    assert timing.cold_seconds >= 0.05 > timing.seconds >= 0.002
    assert timing.spread > 1  # 30 ms and 1 ms around a median of some


def test_the_peak_is_what_a_block_needs_and_not_what_was_needed_before():
    torch.ones(2**25).sum()  # 128 MiB, gone again
    kept = [torch.ones(2**21) for _ in range(8)]  # 64 MiB, which the C library may hold on to
    del kept
    with peak_memory(CPU) as peaks:
        torch.ones(2**23).sum()  # 32 MiB
    if peaks.peak_bytes is None:
        pytest.skip("this system does not tell")
    assert 2**25 * 0.9 < peaks.peak_bytes < 2**27


def row(case: str, seconds: float, **values: Any) -> Row:
    timing = Timing(seconds=seconds, spread=0.1, cold_seconds=2 * seconds, peak_bytes=2**20)
    return Row(case=case, variant=f"{seconds}", timing=timing, **values)


@given(seconds=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=6))
def test_ratios_are_to_the_first_of_the_case(seconds):
    rows = [row(case, own) for case in ("one", "other") for own in seconds]
    for position, each in enumerate(add_ratios(rows)):
        own = seconds[position % len(seconds)]
        assert each.ratio == pytest.approx(seconds[0] / own)
        assert each.timing.seconds == own


def test_rows_as_a_table_and_as_plain_values():
    rows = add_ratios([row("a", 2.0, flops=4e12, error=0.01), row("a", 1.0, note="why")])
    machine = Machine.here(CPU)
    table = to_markdown(rows, machine, ["swifti2v", "bench"]).splitlines()
    assert table[0].startswith("`swifti2v bench`: ")
    assert torch.__version__ in table[0]
    assert table[4] == "| a | 2.0 | 2 | 10% | 4 | 1.00 | 2 | 1 | 1.0e-02 |  |"
    assert len({line.count("|") for line in table[2:]}) == 1
    values = json.loads(json.dumps(to_dict(rows, machine, [])))
    assert [each["ratio"] for each in values["rows"]] == [1, 2]


def test_random_weights_are_normal_and_norms_are_one():
    sizes = {**TRANSFORMER, "num_layers": 2, "in_channels": 8, "out_channels": 4}
    architecture = Architecture(SegmentTransformer3DModel, sizes)
    model = make_random(architecture, "test", torch.bfloat16, CPU)
    again = make_random(architecture, "test", torch.float32, CPU)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name].to(value.dtype))
        if "norm" in name and name.endswith("weight"):
            assert (value == 1).all()
        elif value.numel() > 100:
            assert value.float().std() == pytest.approx(0.02, rel=0.3)
    assert model.scale_shift_table.dtype == torch.float32  # as when loaded
    output = model(torch.randn(1, 8, 2, 4, 4).bfloat16(), torch.zeros(1, 2), torch.randn(1, 3, 16))
    assert output.isfinite().all()
    assert output.any()


def test_random_weights_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr("swifti2v.evaluation.speed.models.free_bytes", lambda _: 1000)
    sizes = {**TRANSFORMER, "in_channels": 8, "out_channels": 4}
    with pytest.raises(ConfigError, match="random weights of test take"):
        make_random(Architecture(SegmentTransformer3DModel, sizes), "test", torch.float32, CPU)


@torch.no_grad()
def test_the_rival_computes_what_ours_does():
    torch.manual_seed(0)
    sizes = {**TRANSFORMER, "num_layers": 2, "in_channels": 8, "out_channels": 4}
    ours = SegmentTransformer3DModel(**sizes).eval()
    theirs = TokenTimestepTransformer.from_segment_transformer(ours)
    sigma = torch.tensor([[0.0, 0.9, 0.9]])
    inputs = torch.randn(1, 8, 3, 4, 4), sigma, torch.randn(1, 5, 16)
    assert distance(theirs(*inputs), ours(*inputs)) < 1e-5
    with pytest.raises(ConfigError, match="renumbered"):
        theirs(*inputs, temporal_positions=[0, 4, 5])


def test_the_narrow_vae_is_wan22s_with_fewer_channels():
    architecture = narrow_vae()
    assert issubclass(architecture.kind, AutoencoderKLWan)
    vae = architecture.make_empty("vae")
    assert vae.config["z_dim"] == 48
    assert vae.config["decoder_base_dim"] == 64


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "clip" else ())
        for name in USUAL
        if name not in ("levers", "vae", "lengths")
    ],
)
def test_parts_run_on_nano(part):
    subject = Subject.make("nano", CPU, torch.float32, [("test", SMALL)])
    seen: list[Row] = []
    rows = run_parts([part], subject, ONCE, seen.append, against=True)
    assert [each.variant for each in rows] == [each.variant for each in seen]
    assert rows[0].ratio == 1
    assert all(each.timing.seconds > 0 for each in rows)
    assert (rows[0].flops or 0) > 1e6


@pytest.mark.slow
def test_levers_are_near_float32_and_exact_ones_at_rounding():
    subject = Subject.make("nano", CPU, torch.float32, [("test", SMALL)])
    from swifti2v.evaluation.speed import transformers

    chosen = ("given frames left out", "int8 weights", "float8 products")
    with pytest.MonkeyPatch.context() as patch:
        levers = {name: transformers.LEVERS[name] for name in chosen}
        patch.setattr(transformers, "LEVERS", levers)
        rows = list(transformers.pull_levers(subject, ONCE))
    errors = {each.variant: each.error for each in rows}
    assert errors["all off, float32"] == 0
    exact, *rounded = (errors[name] for name in chosen)
    assert exact is not None
    assert exact < 1e-5
    for error in rounded:
        assert error is not None
        assert 1e-5 < error < 0.2


def test_unknown_parts_and_impossible_caps_are_refused():
    with pytest.raises(ConfigError, match=r"part wheels is unknown; use kernels"):
        require_parts(["clip", "wheels"])
    require_parts(list(PARTS))
    with pytest.raises(ConfigError, match="this machine has none"), capped(10**9, CPU):
        pass
    for cap in (OUTSIDE, 80 * 10**9):
        with pytest.raises(ConfigError, match="not between"):
            find_fraction(cap, 80 * 10**9)
    assert find_fraction(24564 * 2**20, 80 * 10**9) == pytest.approx(0.3128, abs=1e-4)


def test_sizes_that_do_not_fit_are_refused_before_anything_runs():
    subject = Subject.make("nano", CPU, torch.float32, [("test", {"height": 70})])
    with pytest.raises(ShapeError):
        run_parts(["stage2"], subject, ONCE, lambda _: None, against=False)
