"""Ablations: runs of equal cost, measured on the same clips, finished ones kept."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from swifti2v.config import Stage2Config, parse_config, read_yaml
from swifti2v.errors import ConfigError, InputError
from swifti2v.evaluation.baselines import carried_baseline, lanczos_baseline
from swifti2v.evaluation.metrics.fidelity import clip_psnr
from swifti2v.media import Frames
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.segments import plan_segments
from swifti2v.training.ablations import costs as ablation_costs
from swifti2v.training.ablations.clips import cut_test_clips, cut_test_motions
from swifti2v.training.ablations.runs import AblationConfig, Ablations, Arm, mean_window_length
from swifti2v.training.ablations.table import make_ablation_table
from swifti2v.training.nano.material import Material
from swifti2v.training.nano.material_source import TransitionClip
from swifti2v.training.windows import WindowConfig, draw_window

pytestmark = pytest.mark.slow

SIDE, NUM_FRAMES = 64, 17
TABLES = sorted((Path(__file__).parents[4] / "src/swifti2v/configs/tables").glob("*.yaml"))
SETTINGS: dict[str, Any] = {
    "seeds": [0, 1],
    "latent_frames": 30,
    "size": {"num_heads": 2, "num_layers": 1},
    "crop": 32,
    "run": {"batch_size": 2, "precision": "float32", "ema_decay": 0.9},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
    "objective": {"noise": {"distribution": "inference"}},
    "stage2": {"sampling": {"parameterization": "reference_residual", "num_inference_steps": 1}},
    "redraw": {"num_clips": 1},
    "num_test_motions": 1,
    "num_test_crops": 1,
    "arms": [
        {"name": "base", "also_sampled": {"one frame at a time": {"segment_size": 1}}},
        {"name": "M = 1", "stage2": {"segment_size": 1},
         "objective": {"windows": {"segment_sizes": [1]}}},
    ],
}  # fmt: skip

BLIND = {"anchor": "generated", "shows_anchor": False, "reference_start": "motion"}


def config(**changes: Any) -> AblationConfig:
    return parse_config(AblationConfig, {**SETTINGS, **changes}, "test")


def clip(seed: int, num_frames: int = NUM_FRAMES, side: int = SIDE) -> Frames:
    """Coarse and fine noise that moves to the right."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.integers(0, 150, (side // 8, side // 8, 3)), np.ones((8, 8, 1)))
    picture = (coarse + rng.integers(0, 100, (side, side, 3))).astype(np.uint8)
    return np.stack([np.roll(picture, frame, axis=1) for frame in range(num_frames)])


def material(*seeds: int) -> Material:
    clips = tuple(clip(seed) for seed in seeds)
    pictures = tuple(clip(seed + 50, 1, 2 * SIDE)[0] for seed in seeds)
    return Material(clips=clips, stills=tuple(one[0] for one in clips), pictures=pictures)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, float)}


@pytest.fixture(scope="module")
def pipe() -> SwiftI2VPipeline:
    """The model that ships, asked for small and short clips."""
    nano = SwiftI2VPipeline.from_pretrained("nano", device="cpu")
    small = nano.configure(num_frames=NUM_FRAMES, height=SIDE, width=SIDE, num_inference_steps=1)
    return SwiftI2VPipeline(nano.components, small)


@pytest.fixture
def ablations(tmp_path: Path, pipe: SwiftI2VPipeline) -> Ablations:
    tests = cut_test_clips(material(7), NUM_FRAMES, 32, 2, 4)
    return Ablations(config(), tmp_path, material(0, 1), (), tests, pipe)


@settings(max_examples=30, deadline=None)
@given(
    segment_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True),
    context_sizes=st.lists(st.integers(0, 3), min_size=1, max_size=2, unique=True),
    num_latent_frames=st.integers(2, 21),
)
def test_the_mean_window_is_the_one_that_is_drawn(
    segment_sizes: list[int], context_sizes: list[int], num_latent_frames: int
) -> None:
    windows = WindowConfig(segment_sizes=tuple(segment_sizes), context_sizes=tuple(context_sizes))
    rng = np.random.default_rng(0)
    drawn = [
        len(draw_window(windows, Stage2Config(), num_latent_frames, rng).window) for _ in range(300)
    ]
    mean = mean_window_length(windows, num_latent_frames, Stage2Config())
    spread = np.std(drawn) / math.sqrt(len(drawn))
    assert abs(np.mean(drawn) - mean) <= 5 * spread + 1e-9


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pipe: SwiftI2VPipeline) -> Ablations:
    """The first run of the table is done, and its weights are sampled in one more way."""
    tests = cut_test_clips(material(7), NUM_FRAMES, 32, 2, 4)
    made = Ablations(config(), tmp_path_factory.mktemp("table"), material(0, 1), (), tests, pipe)
    arm, seed = made.runs()[0]
    made.run(replace(arm, also_sampled={"again": {}, **arm.also_sampled}), seed)
    return made


def read_rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def assert_equal_cost(ablations: Ablations, arm: Arm, seed: int) -> None:
    run = ablations.output_dir / "runs" / f"{'base' if arm.name == 'base' else 'M___1'}-{seed}"
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    segment_size = 3 if arm.name == "base" else 1
    plan = plan_segments(5, segment_size, 1)
    a_step = 2 * sum(len(segment.window) for segment in plan) / len(plan)
    assert (steps - 1) * a_step < 30 <= steps * a_step


def test_a_run_sees_as_many_latent_frames_as_asked_for(trained: Ablations) -> None:
    assert_equal_cost(trained, *trained.runs()[0])


def test_every_run_sees_as_many_latent_frames(ablations: Ablations) -> None:
    for arm, seed in ablations.runs():
        ablations.run(arm, seed)
        assert_equal_cost(ablations, arm, seed)


def test_rows_of_a_run_are_not_made_twice(trained: Ablations) -> None:
    path = trained.run(*trained.runs()[0])
    first = path.read_text()
    rows = json.loads(first)
    assert {row["arm"] for row in rows} == {"base", "again", "one frame at a time"}
    assert len({row["clip"] for row in rows}) == 2
    assert all(row["agreement_db"] > 20 and row["psnr_db"] > 10 for row in rows)
    path.write_text("[]")
    assert trained.run(*trained.runs()[0]).read_text() == "[]"  # kept as it is
    path.write_text(first)


def test_rows_of_a_run_repeat(ablations: Ablations) -> None:
    arm, seed = ablations.runs()[0]
    path = ablations.run(arm, seed)
    rows = read_rows(path)
    path.unlink()
    again = read_rows(ablations.run(arm, seed))
    for row, other in zip(rows, again, strict=True):
        assert numbers(row) == pytest.approx(numbers(other), rel=1e-2, abs=1e-2, nan_ok=True)


def test_another_way_to_sample_has_the_same_weights(trained: Ablations) -> None:
    """M = 1 in sampling only, against the same asked of the pipeline by hand."""
    rows = read_rows(trained.run(*trained.runs()[0]))
    values = {
        name: [row["psnr_db"] for row in rows if row["arm"] == name]
        for name in ("base", "again", "one frame at a time")
    }
    assert values["base"] == values["again"]
    assert values["one frame at a time"] != values["base"]


def test_rows_without_a_model_are_the_baselines_and_need_no_training(ablations: Ablations) -> None:
    rows = {}
    for method in ("lanczos", "flow_warp", "carried"):
        path = ablations.run(Arm(name=method, made_by=method), 0)
        rows[method] = json.loads(path.read_text())
    assert not (ablations.output_dir / "runs").exists()
    for index, test in enumerate(ablations.tests):
        enlarged = lanczos_baseline(test.low, 32, 32)
        assert rows["lanczos"][index]["psnr_db"] == clip_psnr(enlarged[1:], test.truth[1:])
        carried = carried_baseline(test.low, test.truth[0])
        assert rows["carried"][index]["psnr_db"] == clip_psnr(carried[1:], test.truth[1:])
        # The motion is sub-pixel at the small size, and the fine noise cannot be enlarged.
        assert rows["flow_warp"][index]["coherence"] > rows["lanczos"][index]["coherence"]


def test_the_roles_of_the_photo_are_trained_and_sampled(ablations: Ablations) -> None:
    """Each is another training: none of the rows repeats the base's."""
    arms = (
        Arm(name="super-resolution", stage2=BLIND),
        Arm(name="no anchor", stage2={"shows_anchor": False}),
        Arm(name="no hybrid", stage2={"reference_start": "motion"}),
        Arm(name="carried", stage2={"reference_detail": "carried"}),
    )
    base = json.loads(ablations.run(ablations.config.arms[0], 0).read_text())[0]["psnr_db"]
    values = [json.loads(ablations.run(arm, 0).read_text())[0]["psnr_db"] for arm in arms]
    assert len({base, *values}) == 5


def test_costs_are_those_of_the_way_a_row_is_made(
    tmp_path: Path, pipe: SwiftI2VPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(ablation_costs, "NATIVE_MODEL", str(tmp_path / "model"))
    arms = [
        {"name": "base", "also_sampled": {"one frame at a time": {"segment_size": 1}}},
        {"name": "one window", "stage2": {"segment_size": None}},
        {"name": "flow", "made_by": "flow_warp"},
    ]
    table = config(arms=arms, size={"num_heads": 2, "num_layers": 2})
    starting = Ablations(table, tmp_path, material(0), (), cut_test_clips(
        material(7), NUM_FRAMES, 32, 1, 4), pipe)  # fmt: skip
    costs = {
        cost.arm: cost
        for cost in ablation_costs.CostMeter(
            table, pipe, starting.make_transformer(0), clip(3)
        ).measure()
    }
    assert list(costs) == ["base", "one frame at a time", "one window", "flow"]
    by_work = sorted(costs, key=lambda name: costs[name].flops)
    assert by_work[0] == "flow"
    assert by_work[-1] == "one frame at a time"  # windows overlap most
    # Peaks of a window of five frames and of one of all five: the same clip in other pieces.
    assert costs["one window"].native_peak_bytes >= costs["base"].native_peak_bytes
    assert costs["one frame at a time"].native_peak_bytes < costs["base"].native_peak_bytes
    assert costs["flow"].native_peak_bytes == 0
    for cost in costs.values():
        assert cost.first_frames_seconds > 0
        assert min(cost.seconds.values()) > 0
        assert 0 < cost.flops < cost.native_flops * 10
    text = ablation_costs.render_costs([asdict(cost) for cost in costs.values()], "one window")
    assert re.search(r"^\| one window \|.*\| 1\.00 \|$", text, re.MULTILINE)
    assert len({line.count("|") for line in text.splitlines()[2:]}) == 1


def test_what_is_not_trained_takes_no_settings_of_training() -> None:
    with pytest.raises(ConfigError, match="made by lanczos and is not trained"):
        config(arms=[{"name": "a", "made_by": "lanczos", "stage2": {"segment_size": 1}}])


def test_motions_are_tested_from_their_own_small_clip_and_from_stage_1s() -> None:
    frames, low = clip(3), clip(4, side=SIDE // 4)
    redrawn = TransitionClip("pan", frames, low, "pan left")
    own, drawn = cut_test_motions([redrawn], 32, 4)
    assert (own.group, drawn.group) == ("motions", "Stage I")
    assert np.array_equal(own.truth, drawn.truth)
    assert own.truth.shape == (NUM_FRAMES, 32, 32, 3)
    assert drawn.low.shape == (NUM_FRAMES, 8, 8, 3)
    places = [
        (top, left)
        for top in range(0, 33, 4)
        for left in range(0, 33, 4)
        if np.array_equal(frames[:, top : top + 32, left : left + 32], own.truth)
    ]
    ((top, left),) = places
    assert np.array_equal(low[:, top // 4 : top // 4 + 8, left // 4 : left // 4 + 8], drawn.low)


def test_short_held_out_clips_are_refused() -> None:
    with pytest.raises(InputError, match="has 17 frames, the test needs 33"):
        cut_test_clips(material(0), 33, 32, 1, 4)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_tables_that_come_along_are_tables(path: Path) -> None:
    """They hold out the same files, and every trained row differs from the first."""
    table = parse_config(AblationConfig, read_yaml(path), str(path))
    assert set(table.held_out) >= {"swifti2v_page_14", "snake"}
    ways = [
        (arm.made_by, table.arm_objective(arm), table.arm_stage2(arm), arm.mix)
        for arm in table.arms
    ]
    assert all(way != other for index, way in enumerate(ways) for other in ways[:index])


def test_a_row_may_be_named_once() -> None:
    arms = [{"name": "base"}, {"name": "other", "also_sampled": {"base": {}}}]
    with pytest.raises(ConfigError, match="name each row once"):
        config(arms=arms)


def test_unknown_changes_of_an_arm_are_refused() -> None:
    with pytest.raises(ConfigError, match="segment_sise"):
        config(arms=[{"name": "base", "stage2": {"segment_sise": 1}}])
    with pytest.raises(ConfigError, match="context_size is -1"):
        config(arms=[{"name": "base", "also_sampled": {"other": {"context_size": -1}}}])


def test_shards_make_the_table_of_one_process(
    tmp_path: Path, pipe: SwiftI2VPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swifti2v.media import VideoWriter

    model, data = tmp_path / "model", tmp_path / "data"
    monkeypatch.setattr(ablation_costs, "NATIVE_MODEL", str(model))
    pipe.save_pretrained(model)
    data.mkdir()
    for seed, name in enumerate(("one", "two", "test")):
        with VideoWriter(data / f"{name}.mkv", width=SIDE, height=SIDE, fps=16) as writer:
            writer.write(clip(seed))
    Image.fromarray(clip(9, 1, 2 * SIDE)[0]).save(data / "photo.png")
    arms = [*SETTINGS["arms"], {"name": "redrawn", "mix": {"clips": 0.5, "transition": 0.5}}]
    table = config(arms=arms, model=str(model), held_out=["test"])
    whole = make_ablation_table(table, tmp_path / "whole", data).read_text()
    done: list[tuple[str, int]] = []
    for index in (1, 2):
        path = make_ablation_table(
            table, tmp_path / "parts", data, (index, 2), lambda arm, seed: done.append((arm, seed))
        )
    for name in ("base-0.json", "M___1-1.json", "redrawn-1.json"):
        rows, others = (
            json.loads((tmp_path / folder / "rows" / name).read_text())
            for folder in ("whole", "parts")
        )
        for row, other in zip(rows, others, strict=True):
            # The ridge regression at the start makes much of the last bits of its sums.
            assert numbers(row) == pytest.approx(numbers(other), rel=1e-2, abs=1e-2, nan_ok=True)
    assert path.read_text().count("|") == whole.count("|")
    assert sorted(done) == sorted((arm["name"], seed) for arm in arms for seed in (0, 1))
    for part in ("clips", "motions", "Stage I", "Cost of a clip"):
        assert f"**{part}**" in whole
    (data / "photo.png").unlink()
    with pytest.raises(InputError, match=r"1 sample gone \(photo.png\); restore it, or choose"):
        make_ablation_table(table, tmp_path / "parts", data)
    with pytest.raises(InputError, match="other settings: latent_frames is"):
        make_ablation_table(replace(table, latent_frames=60), tmp_path / "parts", data)
