"""Training of the nano model, at a tiny size on procedural material."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from swifti2v.config import parse_config, read_yaml
from swifti2v.errors import ConfigError, InputError
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.training.data.motion_prompts import draw_prompt
from swifti2v.training.engine.draws import Draw
from swifti2v.training.engine.run_config import PhaseConfig
from swifti2v.training.engine.run_log import StepMetrics
from swifti2v.training.nano.assembly import round_weights
from swifti2v.training.nano.budget import MINUTES_SHARE, limit_minutes, limit_steps
from swifti2v.training.nano.config import NanoConfig
from swifti2v.training.nano.material import make_procedural_material
from swifti2v.training.nano.models import (
    PatchLinear,
    make_stage1_transformer,
    make_stage2_transformer,
)
from swifti2v.training.nano.text_encoder import TextTask, label_prompt
from swifti2v.training.nano.training import NanoTraining, train_nano
from tests.helpers.regression import losses, make_trainer

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "num_frames": 17,
    "height": 64,
    "width": 64,
    "max_text_length": 40,
    "num_procedural_clips": 2,
    "text": {"width": 32, "num_layers": 1, "run": {"batch_size": 2}},
    "stage1": {
        "size": {"num_heads": 2, "num_layers": 2},
        "run": {"batch_size": 2},
        "num_frames": {9: 0.5, 17: 0.5},
        "num_drawn_frames": {1: 0.75, 4: 0.25},
    },
    "stage2": {
        "size": {"num_heads": 2, "num_layers": 2},
        "run": {"batch_size": 2},
        "crop": 32,
        "redraw": {"num_clips": 2},
        "phases": [
            {"name": "clips", "steps": 3, "num_frames": {17: 1.0}},
            {
                "name": "transition",
                "steps": 3,
                "num_frames": {9: 0.5, 17: 0.5},
                "mix": {"clips": 0.3, "pictures": 0.3, "transition": 0.4},
            },
        ],
    },
}
TINY = parse_config(NanoConfig, SETTINGS, "tests")
MATERIAL = make_procedural_material(height=64, width=64, num_frames=17, num_clips=2, seed=0)
PARTS = ("text", "stage1", "stage2")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole training of three steps for each phase."""
    output = tmp_path_factory.mktemp("nano") / "out"
    train_nano(limit_steps(TINY, 3), output)
    return output


def read_metrics(output: Path, part: str) -> list[dict[str, Any]]:
    lines = (output / "training" / part / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_part_trains(straight: Path) -> None:
    for part in PARTS:
        metrics = read_metrics(straight, part)
        assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
        assert all(np.isfinite(line["loss"]) for line in metrics)
        assert len({line["loss"] for line in metrics}) == len(metrics)
    assert [line["phase"] for line in read_metrics(straight, "stage2")] == (
        ["clips"] * 3 + ["transition"] * 3
    )
    before = yaml_of(straight)
    assert parse_config(NanoConfig, before, "tests") == limit_steps(TINY, 3)


def yaml_of(output: Path) -> dict[str, Any]:
    return read_yaml(output / "config.yaml")


def test_the_trained_model_generates(straight: Path) -> None:
    pipe = SwiftI2VPipeline.from_pretrained(
        straight / "model", device="cpu", torch_dtype=torch.float32
    )
    frames = pipe(Image.fromarray(MATERIAL.stills[0]), "zoom in", num_inference_steps=1).frames
    assert frames.shape == (17, 64, 64, 3)


def weights_of(output: Path) -> dict[str, Tensor]:
    files = sorted((output / "model").rglob("*.safetensors"))
    assert len(files) >= 3
    return {
        f"{file.relative_to(output)}:{name}": value
        for file in files
        for name, value in load_file(file).items()
    }


def stop_at(part: str, step: int) -> Callable[[str, StepMetrics], None]:
    def on_step(own: str, metrics: StepMetrics) -> None:
        if (own, metrics.step) == (part, step):
            raise KeyboardInterrupt

    return on_step


def test_stopped_in_every_part_it_ends_with_the_same_weights(
    straight: Path, tmp_path: Path
) -> None:
    config, output = limit_steps(TINY, 3), tmp_path / "out"
    for part, step in (
        ("text", 2), ("stage1", 2), ("stage2", 1), ("stage2", 4),
    ):  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            train_nano(config, output, resume=True, on_step=stop_at(part, step))
    seen: list[str] = []
    train_nano(config, output, resume=True, on_step=lambda part, _: seen.append(part))
    assert seen == ["stage2"] * 2
    for part in PARTS:
        own, other = ([m["loss"] for m in read_metrics(at, part)] for at in (output, straight))
        assert own == other
    stopped, whole = weights_of(output), weights_of(straight)
    assert stopped.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(stopped[name], value), name


def test_a_finished_training_is_not_repeated(straight: Path) -> None:
    config, seen = limit_steps(TINY, 3), Counter[str]()
    again = train_nano(config, straight, resume=True, on_step=lambda part, _: seen.update([part]))
    assert not seen
    assert again == straight / "model"
    with pytest.raises(InputError, match="--resume"):
        train_nano(config, straight)
    changed = replace(config.stage2, run=replace(config.stage2.run, seed=9))
    with pytest.raises(InputError, match=r"other settings: stage2\.run\.seed is"):
        train_nano(replace(config, stage2=changed), straight, resume=True)


def test_lengths_that_no_clip_has_are_left_out_or_refused(tmp_path: Path) -> None:
    phases = TINY.stage2.phases
    longer = replace(phases[0], num_frames={17: 0.5, 33: 0.5})
    too_long = replace(phases[0], num_frames={33: 1.0})
    for phase, lengths in ((longer, {17: 0.5}), (too_long, None)):
        config = replace(TINY, stage2=replace(TINY.stage2, phases=(phase, phases[1])))
        if lengths is None:
            with pytest.raises(InputError, match=r"phase clips has num_frames \[33\]"):
                NanoTraining(config, tmp_path, MATERIAL, torch.device("cpu"))
        else:
            training = NanoTraining(config, tmp_path, MATERIAL, torch.device("cpu"))
            assert training.lengths[0] == lengths


def test_the_text_encoder_learns_to_tell_motions_apart(tmp_path: Path) -> None:
    task = TextTask(TINY.text, torch.device("cpu"))
    own = Draw(seed=0, step=0, batch_size=40, indices=tuple(range(40)))
    batch = task.load_batch(own)
    drawn = [draw_prompt(rng) for rng in own.samples()]
    assert batch.ids == tuple(prompt.text for prompt in drawn)
    assert batch.labels.tolist() == [list(label_prompt(prompt)) for prompt in drawn]
    optimizer = replace(TINY.text.phases[0].optimizer, learning_rate=5e-3, decay="constant")
    phases = (PhaseConfig(steps=100, optimizer=optimizer),)
    make_trainer(tmp_path, task, phases, batch_size=16, ema_decay=None).run()
    assert sum(losses(tmp_path)[-5:]) < 0.6 * sum(losses(tmp_path)[:5])


def test_impossible_settings_are_refused() -> None:
    longer = {"phases": [{"steps": 1, "num_frames": {10: 1.0}}]}
    for values, match in (
        ({"height": 90}, "height 90"),
        ({"height": 392}, "height 392"),  # a multiple of 8 that is no whole token of Stage I
        ({"num_frames": 10}, "num_frames 10"),
        ({"stage2": {"crop": 100}}, "multiple of 16"),
        ({"stage2": {"crop": 512}}, "larger than the clips"),
        ({"stage2": {"phases": [{"steps": 1, "mix": {"uncarried": 1.5}}]}}, "uncarried is 1.5"),
        ({"stage2": longer}, "4k \\+ 1"),
        ({"stage2": {"phases": [{"steps": 1, "mix": {"clips": 0}}]}}, "mix is"),
        ({"stage2": {"phases": [{"steps": 1, "minutes": 1}]}}, "minutes or steps"),
        ({"stage1": {"size": {"num_heads": 1}}}, "1 heads"),
        ({"stage1": {"size": {"num_layers": 0}}}, "0 layers"),
        ({"stage1": {"num_drawn_frames": {}}}, "num_drawn_frames is"),
        ({"stage1": {"num_drawn_frames": {0: 1.0}}}, "at least one frame"),
        ({"stage1": {"num_frames": {}}}, "stage1: num_frames is"),
        ({"stage1": {"num_frames": {33: 0.5, 34: 0.5}}}, "4k \\+ 1"),
        ({"stage1": {"aspects": {}}}, "aspects is"),
        ({"stage1": {"aspects": {1.5: 0.5, 20: 0.5}}}, r"must be in \[0.1, 10\]"),
        ({"text": {"width": 33}}, "multiple of 32"),
        ({"text": {"phases": [{"steps": 1, "minutes": 1}]}}, "minutes or steps"),
        ({"text": {"run": {"seed": -1}}}, "seed is -1"),
        ({"colour": 1}, "colour"),
    ):
        with pytest.raises((ConfigError, InputError), match=match):
            parse_config(NanoConfig, values, "tests")


def test_budgets_are_shared_out() -> None:
    config = limit_minutes(NanoConfig(), 100)
    assert config.stage2.redraw.num_clips == 56
    assert limit_minutes(NanoConfig(), 1).stage2.redraw.num_clips == 1
    assert limit_minutes(NanoConfig(), 500).stage2.redraw == NanoConfig().stage2.redraw
    phases = {
        "text": config.text.phases,
        "stage1": config.stage1.phases,
        "stage2": config.stage2.phases,
    }
    assert phases.keys() == MINUTES_SHARE.keys()
    for part, own in phases.items():
        assert sum(phase.minutes or 0 for phase in own) == pytest.approx(
            100 * MINUTES_SHARE[part]  # type: ignore[index]
        )
        assert all(phase.steps is None for phase in own)
    assert sum(MINUTES_SHARE.values()) == pytest.approx(1)
    limited = limit_steps(TINY, 7).stage2.phases
    assert [phase.steps for phase in limited] == [7, 7]
    assert [phase.mix for phase in limited] == [phase.mix for phase in TINY.stage2.phases]


def test_the_published_run_loads_and_is_the_default() -> None:
    path = Path(__file__).parents[4] / "src/swifti2v/configs/nano.yaml"
    config = parse_config(NanoConfig, read_yaml(path), str(path))
    assert config.held_out
    assert replace(config, held_out=()) == NanoConfig()


def test_rounding_keeps_the_small_parts_exact() -> None:
    model = make_stage2_transformer(TINY.stage2.size, TINY.text.width)
    rounded = round_weights(model)
    dtypes = {name: value.dtype for name, value in rounded.named_parameters()}
    assert dtypes["proj_out.weight"] == torch.bfloat16
    assert dtypes["scale_shift_table"] == torch.float32
    assert next(model.parameters()).dtype == torch.float32


def test_stage1_trains_at_the_size_of_the_model_and_of_other_aspects() -> None:
    sizes = NanoConfig().low_sizes()
    assert next(iter(sizes)) == (96, 160)  # the default size of the output by the downscale
    assert sum(sizes.values()) == pytest.approx(1)
    for (height, width), share in sizes.items():
        assert height % 8 == width % 8 == 0  # whole tokens
        assert 0.85 < height * width / (96 * 160) < 1.15
        assert share > 0
    by_aspect = {round(width / height, 1): share for (height, width), share in sizes.items()}
    assert set(by_aspect) >= {1.7, 1.0, 0.6}
    small = NanoConfig().low_sizes(0.25)
    assert next(iter(small)) == (24, 40)
    assert all(height % 8 == width % 8 == 0 for height, width in small)
    one = replace(NanoConfig(), stage1=replace(NanoConfig().stage1, aspects={1.0: 0.4, 1.01: 0.6}))
    assert list(one.low_sizes().values()) == [pytest.approx(1.0)]  # the same after rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_are_those_of_the_convolution(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    own = PatchLinear(6, 10, kernel_size=(1, 2, 2), stride=(1, 2, 2))
    plain = torch.nn.Conv3d(6, 10, kernel_size=(1, 2, 2), stride=(1, 2, 2))
    plain.load_state_dict(own.state_dict())
    latents = torch.randn(2, 6, 3, 8, 4, requires_grad=True)
    found, expected = own(latents), plain(latents)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(expected)
    for name in ("weight", "bias"):
        gradients = [
            torch.autograd.grad(out, getattr(layer, name), upstream, retain_graph=True)[0]
            for layer, out in ((own, found), (plain, expected))
        ]
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = own(latents)
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)
    output.float().square().sum().backward()
    for tensor in (*own.parameters(), latents):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("make", [make_stage1_transformer, make_stage2_transformer])
def test_new_transformers_read_their_patches_as_a_product(make: Any) -> None:
    model = make(TINY.stage1.size, TINY.text.width)
    assert isinstance(model.patch_embedding, PatchLinear)
    assert not model.proj_out.weight.any()
    assert not model.proj_out.bias.any()
    channels = {make_stage1_transformer: (388, 197), make_stage2_transformer: (1536, 768)}[make]
    assert (model.config["in_channels"], model.config["out_channels"]) == channels


def test_a_model_of_one_step_does_not_read_the_noise() -> None:
    model: Any = make_stage2_transformer(TINY.stage2.size, TINY.text.width, reads_noise=False)
    embedding = model.patch_embedding
    assert not embedding.weight[:, :768].any()
    reference = torch.randn(1, 768, 2, 4, 4)
    inputs = [torch.cat([torch.randn(1, 768, 2, 4, 4), reference], dim=1) for _ in range(2)]
    first, second = (embedding(hidden) for hidden in inputs)
    assert torch.equal(first, second)
    plain = torch.nn.Conv3d(1536, 128, kernel_size=(1, 2, 2), stride=(1, 2, 2))
    plain.load_state_dict(embedding.state_dict())
    torch.testing.assert_close(first, plain(inputs[0]), atol=1e-5, rtol=1e-5)
    first.square().sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    assert not gradient[:, :768].any()
    assert gradient[:, 768:].any()
