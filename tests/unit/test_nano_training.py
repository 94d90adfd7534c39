"""Training of the nano model, at a tiny size on procedural material."""

import contextlib
import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from swifti2v.config import parse_config, read_yaml
from swifti2v.errors import ConfigError, InputError, LoadingError, NumericalError
from swifti2v.models.codec import BlockCodec
from swifti2v.models.text import encode_prompt
from swifti2v.models.vae import StreamingEncoder
from swifti2v.pipelines.stage1 import Stage1Pipeline
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.sampling import plan_sigmas
from swifti2v.shapes import LatentShape
from swifti2v.training.camera_motion import CAMERA_MOTIONS, CameraMotion, View, render_motion
from swifti2v.training.data import make_procedural_material
from swifti2v.training.initialization import fit_output_layer, initialize_stage2
from swifti2v.training.motion_phases import (
    FeatureLayout,
    initialize_stage1,
    make_phases,
    measure_displacement,
)
from swifti2v.training.nano import limit_minutes, limit_steps, round_weights, train_nano
from swifti2v.training.nano_codec import encode_window, fit_codec, measure_residual, weigh_channels
from swifti2v.training.nano_config import NanoConfig
from swifti2v.training.optimization import (
    OptimizationConfig,
    Randomness,
    StepMetrics,
    has_checkpoint,
    optimize,
    scale_learning_rate,
)
from swifti2v.training.stage1 import (
    PhasesObjective,
    Stage1Objective,
    make_stage1_transformer,
    train_phases,
)
from swifti2v.training.stage1_batches import Stage1Batches
from swifti2v.training.stage2 import Stage2Objective, make_stage2_transformer, train_stage2
from swifti2v.training.text_encoder import MotionClassifier, make_tokenizer

TINY = parse_config(
    NanoConfig,
    {
        "num_frames": 17,
        "height": 64,
        "width": 64,
        "max_text_length": 40,
        "num_procedural_clips": 2,
        "text": {"width": 32, "num_layers": 1, "batch_size": 2},
        "stage1": {
            "size": {"num_heads": 2, "num_layers": 2},
            "num_fit_batches": 2,
        },
        "stage2": {
            "size": {"num_heads": 2, "num_layers": 2},
            "batch_size": 2,
            "crop": 32,
            "num_fit_batches": 2,
        },
    },
    "tests",
)
MATERIAL = make_procedural_material(height=64, width=64, num_frames=17, num_clips=2, seed=0)


@pytest.fixture(scope="module")
def codec() -> BlockCodec:
    return fit_codec(MATERIAL.clips)


def test_every_part_trains_and_the_model_generates(tmp_path: Path) -> None:
    seen: list[str] = []
    config = limit_steps(TINY, 3)
    output = tmp_path / "out"
    model_dir = train_nano(config, output, on_step=lambda part, _: seen.append(part))
    assert seen == ["text"] * 3 + ["phases"] * 3 + ["stage1"] * 3 + ["stage2"] * 3
    for part in ("text", "stage1/phases", "stage1", "stage2"):
        lines = (output / "training" / part / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
        assert [line["step"] for line in metrics] == [1, 2, 3]
        assert all(np.isfinite(line["loss"]) for line in metrics)
    pipe = SwiftI2VPipeline.from_pretrained(model_dir, device="cpu", torch_dtype=torch.float32)
    image = Image.fromarray(MATERIAL.stills[0])
    frames = pipe(image, "zoom in", num_inference_steps=1).frames
    assert frames.shape == (17, 64, 64, 3)
    with pytest.raises(InputError, match="--resume"):
        train_nano(config, output)
    with pytest.raises(ConfigError, match="stage2"):
        train_nano(replace(config, stage2=replace(config.stage2, seed=9)), output, resume=True)
    again = train_nano(config, output, resume=True, on_step=lambda part, _: seen.append(part))
    assert len(seen) == 12  # nothing left to train
    assert again == model_dir


def test_a_stopped_stage_continues_to_the_same_weights(codec: BlockCodec, tmp_path: Path) -> None:
    config = limit_steps(TINY, 3)
    place = torch.device("cpu")
    straight = train_stage2(config, MATERIAL.clips, codec, tmp_path / "straight", place)

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_stage2(config, MATERIAL.clips, codec, tmp_path / "stopped", place, stop)
    assert has_checkpoint(tmp_path / "stopped")
    continued = train_stage2(config, MATERIAL.clips, codec, tmp_path / "stopped", place)
    for name, value in straight.state_dict().items():
        # Rounding differs with the memory's alignment; Adam turns it into parts of a step (4e-5).
        torch.testing.assert_close(value, continued.state_dict()[name], atol=3e-4, rtol=0)
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("straight", "stopped")
    ]
    losses = [[line["loss"] for line in run] for run in lines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(losses[0])) == 3  # no batch is drawn twice


def test_codec_statistics_scale_the_material(codec: BlockCodec) -> None:
    mean = torch.tensor(codec.config["latents_mean"])
    assert mean.nonzero().flatten().tolist() == [0, 256, 320]
    latents = StreamingEncoder(codec).encode(torch.zeros(1, 3, 1, 64, 64))
    assert latents.isfinite().all()
    assert min(codec.config["latents_std"]) > 0
    weight = weigh_channels(codec, 8.0)
    torch.testing.assert_close(weight.mean(), torch.tensor(1.0))
    assert weight[0] == weight.max()  # brightness counts most


def test_a_window_is_encoded_as_the_streaming_encoder_does(codec: BlockCodec) -> None:
    video = torch.rand(1, 3, 9, 64, 64) * 2 - 1
    encoder = StreamingEncoder(codec)
    pieces = [video[:, :, :1], video[:, :, 1:5], video[:, :, 5:]]
    streamed = torch.cat([encoder.encode(piece) for piece in pieces], dim=2)
    assert torch.equal(encode_window(codec, video), streamed)


def test_small_versions_lose_high_frequencies() -> None:
    energy = measure_residual(MATERIAL.clips, 4)[:64].reshape(8, 8)
    assert energy[3:, 3:].mean() > 0
    assert energy[0, 0] < energy[1:3, 1:3].max()


@pytest.fixture
def batches(codec: BlockCodec) -> Stage1Batches:
    torch.manual_seed(0)
    encoder = MotionClassifier(TINY.text).encoder
    return Stage1Batches(codec, encoder, MATERIAL.stills, TINY, Randomness(0))


def make_started_stage1() -> tuple[WanTransformer3DModel, FeatureLayout]:
    torch.manual_seed(0)
    transformer = make_stage1_transformer(TINY.stage1.size, TINY.text.width)
    return transformer, initialize_stage1(transformer)


def test_stage1_is_trained_on_the_condition_the_pipeline_gives(
    batches: Stage1Batches, codec: BlockCodec
) -> None:
    pipeline = Stage1Pipeline(make_started_stage1()[0], codec)
    photo = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    config = TINY.to_generation_config().stage1
    whole = pipeline.prepare_condition(photo, LatentShape(384, 5, 2, 2), config)
    latents = encode_window(codec, photo)
    torch.testing.assert_close(batches.prepare_condition(latents, (1, 2, 3, 4)), whole)
    torch.testing.assert_close(batches.prepare_condition(latents, (2, 4)), whole[:, :, [0, 2, 4]])


def test_a_batch_moves_over_one_view_in_all_ways(batches: Stage1Batches) -> None:
    batch = batches.draw((1, 4))
    assert batch.latents.shape == batch.noise.shape == (7, 384, 3, 2, 2)
    photos = batch.latents[:, :, 0]
    torch.testing.assert_close(photos, photos[:1].expand_as(photos))
    last = batch.latents[:, :, 2]
    different = (last[:, None] - last[None]).abs().amax(dim=(2, 3, 4)) > 1e-3
    assert torch.equal(different, ~torch.eye(7, dtype=torch.bool))
    still = CAMERA_MOTIONS.index("static")
    torch.testing.assert_close(  # coefficients of a plane that does not change in time
        batch.latents[still, 0, 1], batch.latents[still, 0, 2]
    )
    drawn = [batches.draw_frames() for _ in range(50)]
    assert all(len(frames) == 2 and frames[0] < frames[1] for frames in drawn)
    assert {frame for frames in drawn for frame in frames} == set(batches.all_frames())


def test_stage1_trains_on_frames_and_whole_clips(batches: Stage1Batches) -> None:
    seen: list[int] = []
    transformer = make_started_stage1()[0]
    transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    objective = Stage1Objective(transformer, batches)
    with torch.no_grad():
        losses = [objective().item() for _ in range(40)]
    assert set(seen) == {3, 5}
    assert 2 <= seen.count(5) <= 20  # a quarter
    assert min(losses) > 0


@pytest.mark.parametrize("motion", CAMERA_MOTIONS)
@settings(max_examples=20)
@given(time=st.floats(0, 1))
def test_displacement_tells_where_a_place_was(motion: CameraMotion, time: float) -> None:
    # A picture whose values are its coordinates: red the row, green the column.
    side = torch.linspace(-1, 1, 256, dtype=torch.float64)
    row, column = torch.meshgrid(side, side, indexing="ij")
    picture = torch.stack([row, column, row])
    view = View(size=0.5, center=(0.1, -0.1))
    frames = render_motion(picture, motion, [0.0, time], view, (64, 96))
    tokens = torch.nn.functional.avg_pool2d(frames[:2].transpose(0, 1), 8)  # [2, 2, 8, 12]
    step = tokens[0, :, 1, 1] - tokens[0, :, 0, 0]
    away = (tokens[1] - tokens[0]) / step[:, None, None]
    expected = measure_displacement(motion, time, (8, 12)).double()
    torch.testing.assert_close(away, expected, atol=1e-5, rtol=0)


def test_phases_are_those_of_the_rotary_embedding() -> None:
    """A query with the phases, rotated, is the query without them rotated at the other place."""
    rope = make_started_stage1()[0].rope
    cosines, sines = (table[0, :, 0] for table in rope(torch.zeros(1, 1, 1, 12, 20)))  # [L, 64]
    phases = make_phases("pan right", [1.0], (12, 20))  # 2.4 columns
    for axis, start in enumerate((rope.t_dim, rope.t_dim + rope.h_dim)):
        for index in range(3):
            feature, phase = start + 2 * index, 6 * axis + 2 * index
            here = torch.complex(cosines[:, feature], sines[:, feature])
            turned = here * torch.complex(phases[:, phase], phases[:, phase + 1])
            turn = 10000 ** (-2 * index / 20) * (2.4 if axis else 0.0)
            torch.testing.assert_close(
                turned, here * torch.polar(torch.ones(()), torch.tensor(turn)), atol=1e-4, rtol=0
            )


def test_attention_with_phases_fetches_the_displaced_content() -> None:
    transformer, layout = make_started_stage1()
    rows, columns = grid = (6, 10)
    num_places = rows * columns
    content = torch.randn(num_places, layout.num_content)
    tokens = torch.zeros(2, num_places, layout.width)  # the photo and one later frame
    tokens[0, :, : layout.num_content] = content
    tokens[..., layout.constants] = torch.tensor([5.0, -5, -5, 5])
    tokens[0, :, layout.constants] = torch.tensor([5.0, -5, 5, -5])
    rotary = transformer.rope(torch.zeros(1, 1, 2, rows, columns))
    block: Any = transformer.blocks[1]
    # 0.12 of the size: 1.2 columns, 0.72 rows; both round to one token.
    shifts: dict[CameraMotion, int] = {"pan right": 1, "tilt down": columns, "pan left": -1}
    for motion, shift in shifts.items():
        tokens[..., layout.phases] = make_phases(motion, [0.0, 1.0], grid).reshape(2, -1, 12)
        with torch.no_grad():
            normed = block.norm1(tokens.reshape(1, -1, layout.width))
            fetched = block.attn1(normed, None, None, rotary)[0, num_places:]
        places = torch.arange(num_places).reshape(grid)[2:4, 3:7].flatten()
        for features, expected in ((layout.moved, places + shift), (layout.still, places)):
            found = (fetched[places, features] @ content.T).argmax(dim=1)
            assert torch.equal(found, expected)


def test_features_of_a_token_do_not_overlap() -> None:
    for width, num_content in ((128, 29), (192, 50), (256, 72), (512, 72)):
        layout = FeatureLayout(width)
        parts = (layout.moved, layout.still, layout.phases, layout.chart, layout.constants)
        used = [*range(layout.moved.start), *(i for part in parts for i in range(width)[part])]
        assert layout.num_content == num_content
        assert len(set(used)) == len(used)
        assert max(used) == width - 1
        assert len(set(layout.channels)) == num_content


def test_other_shapes_have_no_structured_start() -> None:
    flat = make_stage1_transformer(replace(TINY.stage1.size, num_layers=1), TINY.text.width)
    with pytest.raises(ConfigError, match="at least 2 blocks"):
        initialize_stage1(flat)


def test_training_lowers_the_error_of_the_phases(batches: Stage1Batches, tmp_path: Path) -> None:
    transformer, layout = make_started_stage1()
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    config = limit_steps(TINY, 30)
    batches.config = config
    steps: list[StepMetrics] = []
    train_phases(transformer, layout, batches, tmp_path, steps.append)
    assert steps[-1].loss < 0.25 * steps[0].loss
    objective = PhasesObjective(transformer, layout, batches)
    assert objective().item() < 0.25 * steps[0].loss  # what was learnt is in the whole model
    changed = {
        name for name, value in transformer.state_dict().items() if not value.equal(before[name])
    }
    assert changed
    learnt = ("blocks.0.", "condition_embedder.text_embedder.")
    assert all(name.startswith(learnt) for name in changed)


def test_ridge_fit_explains_part_of_the_motion(codec: BlockCodec) -> None:
    """With the true phases in block 0's output it beats a still clip, and a fit without them."""
    config = replace(TINY, height=64, width=320)  # 2 x 10 tokens
    errors = []
    for has_phases in (True, False):
        torch.manual_seed(0)
        encoder = MotionClassifier(TINY.text).encoder
        batches = Stage1Batches(codec, encoder, MATERIAL.stills, config, Randomness(0))
        transformer, layout = make_started_stage1()
        objective = Stage1Objective(transformer, batches)
        phases = batches.phases(batches.all_frames()) * has_phases

        def write_phases(
            _: nn.Module,
            __: object,
            tokens: Tensor,
            phases: Tensor = phases,
            layout: FeatureLayout = layout,
        ) -> Tensor:
            tokens[..., layout.phases] = phases
            return tokens

        transformer.blocks[0].register_forward_hook(write_phases)
        fit_output_layer(transformer, (objective.draw_fit_sample() for _ in range(16)))
        with torch.no_grad():
            samples = [objective.draw_fit_sample() for _ in range(4)]
            left = [
                (cast(Tensor, s.forward()) - s.residual).square().mean().item() for s in samples
            ]
            errors.append(sum(left) / sum(s.residual.square().mean().item() for s in samples))
    assert errors[0] < min(0.97, errors[1])


def test_a_prompt_does_not_change_stage2(codec: BlockCodec) -> None:
    torch.manual_seed(0)
    model = make_stage2_transformer(TINY)
    sigmas = torch.tensor(plan_sigmas(4)[:-1])
    initialize_stage2(model, torch.rand(384), sigmas)
    nn.init.normal_(model.proj_out.weight)
    hidden_states = torch.randn(1, 768, 3, 4, 4)
    sigma = torch.tensor([[0.0, 0.9, 0.9]])
    tokenizer, encoder = make_tokenizer(), MotionClassifier(TINY.text).encoder
    prompt = encode_prompt(encoder, tokenizer, ["zoom in"], TINY.max_text_length)
    with torch.no_grad():
        with_prompt = model(hidden_states, sigma, prompt)
        without = model(hidden_states, sigma, torch.zeros(1, 1, TINY.text.width))
    # Rounding only: attention to one token or to many equal ones.
    torch.testing.assert_close(with_prompt, without, atol=1e-4, rtol=1e-4)


def test_stage2_starts_with_clean_frames_flagged() -> None:
    torch.manual_seed(0)
    model = make_stage2_transformer(TINY)
    sigmas = torch.tensor(plan_sigmas(4)[:-1])
    initialize_stage2(model, torch.rand(384), sigmas)
    embedder = model.condition_embedder
    levels = torch.cat([torch.zeros(1), sigmas]) * 1000
    features = embedder.act_fn(embedder.time_embedder(embedder.timesteps_proj(levels)))
    flag = embedder.time_proj(features)[:, 127]
    torch.testing.assert_close(flag, torch.tensor([3.0, -3, -3, -3, -3]), atol=1e-2, rtol=0)


def test_ridge_fit_beats_the_reference(codec: BlockCodec) -> None:
    torch.manual_seed(0)
    model = make_stage2_transformer(TINY)
    energy = measure_residual(MATERIAL.clips, 4)
    initialize_stage2(model, energy, torch.tensor(plan_sigmas(4)[:-1]))
    objective = Stage2Objective(model, codec, MATERIAL.clips, TINY, Randomness(0))
    before = [objective().item() for _ in range(4)]  # the output is zero: the reference as it is
    fit_output_layer(model, (objective.draw_fit_sample() for _ in range(60)))
    objective.randomness = Randomness(0)
    after = [objective().item() for _ in range(4)]
    assert sum(after) < sum(before)


def quadratic(model: nn.Linear, randomness: Randomness) -> Tensor:
    outputs: Tensor = model(randomness.normal_like(torch.empty(8, 2)))
    return (outputs - 1).square().mean()


def test_the_average_of_weights_is_what_remains(tmp_path: Path) -> None:
    results = []
    for decay in (0.999, None):
        torch.manual_seed(0)
        model, randomness = nn.Linear(2, 1), Randomness(0)
        config = OptimizationConfig(steps=400, learning_rate=0.05, ema_decay=decay)
        optimize(
            model,
            partial(quadratic, model, randomness),
            config,
            randomness,
            tmp_path / str(decay),
        )
        assert not model.training
        results.append(model.weight.detach().clone())
        assert (model.weight.abs() < 0.1).all()
        assert abs(model.bias.item() - 1) < 0.1
    assert not torch.equal(*results)


def test_a_stop_within_a_step_changes_nothing(tmp_path: Path) -> None:
    config = OptimizationConfig(steps=20)
    weights = []
    for stops in ((), (5, 9, 17)):
        torch.manual_seed(0)
        model, calls = nn.Linear(2, 1), 0
        for _ in range(len(stops) + 1):
            randomness = Randomness(0)

            def loss(
                model: nn.Linear = model,
                randomness: Randomness = randomness,
                stops: tuple[int, ...] = stops,
            ) -> Tensor:
                nonlocal calls
                value = quadratic(model, randomness)
                calls += 1
                if calls in stops:
                    raise KeyboardInterrupt
                return value

            with contextlib.suppress(KeyboardInterrupt):
                optimize(model, loss, config, randomness, tmp_path / str(len(stops)))
        weights.append(model.weight.detach().clone())
        assert len((tmp_path / str(len(stops)) / "metrics.jsonl").read_text().splitlines()) == 20
    torch.testing.assert_close(weights[0], weights[1], atol=1e-7, rtol=0)


def test_nan_stops_and_keeps_the_last_good_weights(tmp_path: Path) -> None:
    model, randomness = nn.Linear(2, 1), Randomness(0)
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        return quadratic(model, randomness) * (float("nan") if calls == 3 else 1.0)

    config = OptimizationConfig(steps=9)
    with pytest.raises(NumericalError, match="step 3"):
        optimize(model, loss, config, randomness, tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    config, randomness = OptimizationConfig(steps=1), Randomness(0)
    model = nn.Linear(2, 1)
    optimize(model, lambda: quadratic(model, randomness), config, randomness, tmp_path)
    with pytest.raises(LoadingError, match="cannot be continued"):
        optimize(nn.Linear(3, 1), lambda: torch.zeros(()), config, randomness, tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(LoadingError, match="damaged"):
        optimize(model, lambda: torch.zeros(()), config, randomness, tmp_path)


def test_a_budget_in_minutes_ends(tmp_path: Path) -> None:
    model, randomness = nn.Linear(2, 1), Randomness(0)
    config = OptimizationConfig(minutes=0.2 / 60)
    steps: list[StepMetrics] = []
    optimize(
        model, lambda: quadratic(model, randomness), config, randomness, tmp_path, steps.append
    )
    assert len(steps) > 2
    assert steps[-2].seconds <= 0.2 <= steps[-1].seconds + 1e-3  # rounded to milliseconds


def test_learning_rate_rises_stays_and_falls() -> None:
    config = OptimizationConfig(steps=1000, learning_rate=2.0)
    rates = [scale_learning_rate(config, step, step / 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(2 / 50)
    assert set(rates[49:500]) == {2.0}
    assert all(a >= b for a, b in pairwise(rates[500:]))
    assert rates[-1] == pytest.approx(0.06)
    cosine = replace(config, decay="cosine")
    assert scale_learning_rate(cosine, 500, 0.5) == pytest.approx(2 * (0.03 + 0.97 / 2))
    linear = replace(config, decay="linear")
    assert scale_learning_rate(linear, 750, 0.75) == pytest.approx(0.5)


def test_impossible_settings_are_refused() -> None:
    for values, match in (
        ({"height": 90}, "height 90"),
        ({"num_frames": 10}, "num_frames 10"),
        ({"num_frames": 5}, "num_drawn_frames 2"),
        ({"stage2": {"crop": 100}}, "multiple of 16"),
        ({"stage2": {"crop": 512}}, "larger than the clips"),
        ({"stage1": {"size": {"num_heads": 1}}}, "1 heads"),
        ({"stage1": {"size": {"num_layers": 1}}}, "at least 2"),
        ({"stage1": {"drawn_share": 1.5}}, "drawn_share 1.5"),
        ({"text": {"width": 33}}, "multiple of 32"),
        ({"text": {"optimization": {"steps": 1, "minutes": 1}}}, "minutes or steps"),
        ({"stage1": {"optimization": {"steps": 0}}}, "above 0"),
        ({"colour": 1}, "colour"),
    ):
        with pytest.raises((ConfigError, InputError), match=match):
            parse_config(NanoConfig, values, "tests")


def test_budgets_are_shared_out() -> None:
    config = limit_minutes(NanoConfig(), 100)
    budgets = [part.optimization for part in (config.text, config.stage1, config.stage2)]
    budgets.insert(1, config.stage1.phases)
    assert [budget.minutes for budget in budgets] == [5.0, 10.0, 35.0, 50.0]
    assert all(budget.steps is None for budget in budgets)
    assert limit_steps(config, 7).stage2.optimization.steps == 7


def test_the_published_run_loads_and_is_the_default() -> None:
    path = Path(__file__).parents[2] / "configs" / "nano.yaml"
    config = parse_config(NanoConfig, read_yaml(path), str(path))
    assert config.held_out
    assert replace(config, held_out=()) == NanoConfig()


def test_rounding_keeps_the_small_parts_exact() -> None:
    model = make_stage2_transformer(TINY)
    rounded = round_weights(model)
    dtypes = {name: value.dtype for name, value in rounded.named_parameters()}
    assert dtypes["proj_out.weight"] == torch.bfloat16
    assert dtypes["scale_shift_table"] == torch.float32
    assert next(model.parameters()).dtype == torch.float32
