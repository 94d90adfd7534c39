"""The sum of all layers in float32: inside the blocks, with every other lever, and what it costs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swifti2v.config import AttentionConfig, SpeedConfig
from swifti2v.errors import ConfigError
from swifti2v.models.attention import use_attention
from swifti2v.models.runtime.placement import is_streamed, place
from swifti2v.models.runtime.speed import CACHE_VARIABLE, prepare_speed, require_prepared
from swifti2v.planning.costs import Count
from swifti2v.planning.models import Models
from tests.helpers.tiny import tiny_components
from tests.unit.models.runtime.test_speed import (
    CPU,
    MODELS,
    distance,
    run_stage2,
    stage2_model,
    with_backend,
)

FLOAT32 = SpeedConfig(residual="float32")


@pytest.fixture(params=MODELS)
def stage(request):
    """Functions that make a deep model of a stage, and run a model in any number type."""
    make, run = MODELS[request.param]
    return lambda: deepen(make()), run


def deepen(model: Any) -> Any:
    """Weights with which every layer adds something; they survive a rounding to bfloat16."""
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if name.startswith("blocks.") and "norm" not in name:
            weight.data.normal_(std=0.15, generator=generator)
        weight.data = weight.data.bfloat16().float()
    return model.requires_grad_(False)


def halve(model: Any) -> Any:
    """In bfloat16, as it is loaded: norms, tables and time embedding stay float32."""
    keep = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}
    for name, weight in model.named_parameters():
        if not keep & set(name.split(".")):
            weight.data = weight.data.bfloat16()
    return model


def run_halved(run: Any, model: Any) -> Tensor:
    """Float32 output of a model of bfloat16 weights, for the inputs of ``run``."""

    def narrow(_: Any, args: Any, kwargs: Any) -> Any:
        names = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_image")
        # Stage II takes its noise levels second, and they stay as they are.
        positional = tuple(
            value.bfloat16() if isinstance(value, Tensor) and place != 1 else value
            for place, value in enumerate(args)
        )
        return positional, {k: v.bfloat16() if k in names else v for k, v in kwargs.items()}

    handle = model.register_forward_pre_hook(narrow, with_kwargs=True)
    output: Tensor = run(model).float()
    handle.remove()
    return output


def test_a_model_in_float32_computes_as_before(stage):
    make, run = stage
    model = make()
    plain = run(model)
    prepare_speed(model, FLOAT32, CPU)
    torch.testing.assert_close(run(model), plain, atol=1e-5, rtol=1e-5)


def test_in_bfloat16_the_error_is_smaller(stage):
    make, run = stage
    reference = run(make())
    errors = []
    for speed in (SpeedConfig(), FLOAT32):
        model = halve(make())
        prepare_speed(model, speed, CPU)
        errors.append(distance(run_halved(run, model), reference))
    rounded, kept = errors
    assert 0 < kept < 0.9 * rounded < 0.05


def test_tokens_are_float32_between_blocks_and_layers_compute_in_bfloat16(stage):
    make, run = stage
    model, seen = halve(make()), []
    prepare_speed(model, FLOAT32, CPU)
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    inputs = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and "time_embedder" not in str(layer):
            layer.register_forward_pre_hook(
                lambda own, args: inputs.append((own.weight.dtype, args[0].dtype))
            )
    run_halved(run, model)
    assert seen == [(torch.float32, torch.float32)] * len(model.blocks)
    assert inputs
    assert all(weight == given for weight, given in inputs)


@pytest.mark.parametrize(
    "attention",
    [AttentionConfig(), AttentionConfig(kind="gclf", window=(1, 2), pool=None),
     AttentionConfig(context="read_only")],
)  # fmt: skip
def test_it_goes_with_given_frames_and_every_attention(attention):
    model = halve(deepen(stage2_model()))
    prepare_speed(model, FLOAT32, CPU)
    use_attention(model, attention, rows=2, columns=3, num_given=2)
    whole = run_halved(run_stage2, model)
    targets = run_halved(lambda m: run_stage2(m, num_given=2), model)
    torch.testing.assert_close(targets, whole[:, :, 2:], atol=0.02, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("others", [{"linear": "int8"}, {"compile": True}])
def test_it_goes_with_other_levers_and_streamed_weights(stage, others, monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", with_backend("aot_eager"))
    make, run = stage
    alone, both = halve(make()), halve(make())
    prepare_speed(alone, FLOAT32, CPU)
    prepare_speed(both, SpeedConfig(residual="float32", **others), CPU)
    forward: Any = both.blocks[0].forward
    components = tiny_components()
    components.stage1_transformer = both
    place(components, CPU, "streamed")
    assert distance(run_halved(run, both), run_halved(run, alone)) < 0.03
    assert is_streamed(both)
    if others.get("compile"):
        assert not forward._fallback.is_taken


def test_a_model_that_was_loaded_without_it_is_refused():
    with pytest.raises(ConfigError, match=r"stage2\.speed\.residual is float32, but .* with model"):
        require_prepared(SpeedConfig(), FLOAT32, "stage2")


@pytest.mark.slow
@pytest.mark.parametrize("role", ["stage1_transformer", "stage2_transformer"])
def test_the_plan_counts_its_memory_and_no_other_work(role):
    def count(speed: SpeedConfig) -> Count:
        models = Models("nano", torch.bfloat16, {role: speed})
        config = models.get(role).config
        text = torch.empty(1, 128, config["text_dim"], dtype=torch.bfloat16, device="meta")
        shape = (1, config["in_channels"], 5, 48, 80)
        latents = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        stage1 = {"timestep": torch.empty(1, device="meta"), "return_dict": False}
        stage2 = {"sigma": torch.empty(1, 5, device="meta")}
        more: Any = stage1 if role == "stage1_transformer" else stage2
        return models.count_layers(
            role, lambda m: m(hidden_states=latents, encoder_hidden_states=text, **more), least=2
        )

    plain, kept = count(SpeedConfig()), count(FLOAT32)
    assert kept.flops == plain.flops
    assert kept.peak_bytes >= plain.peak_bytes
    if role == "stage1_transformer":  # Stage II's peak lies at its wide input
        assert kept.peak_bytes > plain.peak_bytes
