import logging
import math
import os
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend

from swifti2v.config import AttentionConfig, GenerationConfig, SpeedConfig, parse_config
from swifti2v.errors import ConfigError, LoadingError, ShapeError
from swifti2v.models.attention import use_attention
from swifti2v.models.lora.merge import merge_lora
from swifti2v.models.runtime.placement import is_streamed, place
from swifti2v.models.runtime.speed import (
    CACHE_VARIABLE,
    CompiledForward,
    attention_order,
    order_backends,
    prepare_speed,
    warn_of_torch,
)
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.weights.quantization import (
    FLOAT8,
    Quantized,
    is_quantized,
    quantize,
    quantize_rows,
    refuse_float8,
)
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from tests.helpers.tiny import SETTINGS, SIZE, tiny_components

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 24, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 64, "num_layers": 3, "rope_max_seq_len": 32,
}  # fmt: skip
wan: Any = diffusers.WanTransformer3DModel


def stage1_model() -> Any:
    """Inputs as of Wan2.1-I2V: condition channels, image tokens, one noise level for the clip."""
    torch.manual_seed(0)
    return wan(in_channels=12, image_dim=8, added_kv_proj_dim=48, **SIZES).eval()


def stage2_model() -> Any:
    """Inputs as of Wan2.2-TI2V-5B, widened for the reference: a noise level for every frame."""
    torch.manual_seed(0)
    base = wan(in_channels=4, **SIZES).eval()
    model = SegmentTransformer3DModel.from_base(base)
    with torch.no_grad():
        model.patch_embedding.weight.normal_(std=0.1)
    return model


@torch.no_grad()
def run_stage1(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    output: torch.Tensor = model(
        hidden_states=torch.randn(1, 12, 3, 4, 6), timestep=torch.tensor([625.0]),
        # Behind the image's tokens diffusers takes exactly 512 of the text.
        encoder_hidden_states=torch.randn(1, 512, 16),
        encoder_hidden_states_image=torch.randn(1, 257, 8), return_dict=False,
    )[0]  # fmt: skip
    return output


@torch.no_grad()
def run_stage2(model: Any, num_given: int = 0) -> torch.Tensor:
    torch.manual_seed(1)
    sigma = torch.tensor([[0.0, 0.0, 0.9, 0.9, 0.9]])
    output: torch.Tensor = model(
        torch.randn(1, 8, 5, 4, 6), sigma, torch.randn(1, 7, 16), num_given=num_given
    )
    return output


MODELS = {"stage1": (stage1_model, run_stage1), "stage2": (stage2_model, run_stage2)}


@pytest.fixture(params=MODELS)
def case(request):
    make, run = MODELS[request.param]
    return make(), run


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("backend", ["auto", "flash", "efficient", "math"])
def test_the_kernel_of_attention_changes_rounding_alone(case, backend):
    model, run = case
    plain = run(model)
    with attention_order(backend, CPU):
        assert distance(run(model), plain) < 1e-5


def test_cudnn_comes_first_on_hopper_and_nowhere_else():
    assert order_backends("auto", (9, 0))[0] is SDPBackend.CUDNN_ATTENTION
    for capability in (None, (8, 0), (8, 9), (10, 0), (12, 0)):
        assert order_backends("auto", capability)[0] is SDPBackend.FLASH_ATTENTION
    for name in ("auto", "cudnn", "math"):
        order = order_backends(name, (9, 0))
        assert len(order) == len(set(order)) == 4  # nothing is given up, only tried later


def test_given_frames_are_left_out_exactly():
    model = stage2_model()
    plain, lean = run_stage2(model), run_stage2(model, num_given=2)
    torch.testing.assert_close(lean, plain[:, :, 2:], atol=2e-6, rtol=1e-5)


def test_leaving_out_is_the_same_with_local_attention():
    model = stage2_model()
    use_attention(model, AttentionConfig(kind="gclf", window=(1, 2), pool=None), 2, 3)
    plain, lean = run_stage2(model), run_stage2(model, num_given=2)
    torch.testing.assert_close(lean, plain[:, :, 2:], atol=2e-6, rtol=1e-5)


def test_every_block_but_the_last_sees_all_frames():
    model = stage2_model()
    seen: list[int] = []
    for block in model.blocks:
        block.ffn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    run_stage2(model, num_given=2)
    assert seen == [30, 30, 18]  # 6 tokens a frame


@pytest.mark.parametrize("num_given", [-1, 5])
def test_one_frame_at_least_is_predicted(num_given):
    with pytest.raises(ShapeError, match="one at least"):
        run_stage2(stage2_model(), num_given)


@pytest.mark.parametrize(("linear", "limit"), [("int8", 0.02), ("float8", 0.08)])
def test_8_bit_layers_stay_near(case, linear, limit):
    model, run = case
    plain = run(model)
    quantize(model, linear, CPU)
    assert 0 < distance(run(model), plain) < limit


def test_8_bit_layers_are_in_the_right_places_and_halve_the_weights():
    model = stage2_model().to(torch.bfloat16)
    block = model.blocks[1]
    before = sum(p.nbytes for p in block.parameters())
    quantize(model, "float8", CPU)
    names = {n for n, m in model.named_modules() if isinstance(m, Quantized)}
    assert names
    assert all(name.startswith("blocks.1.") for name in names)  # neither the first nor the last
    assert sum(p.nbytes for p in block.parameters()) < 0.65 * before  # norms and biases stay
    everywhere = stage2_model()
    quantize(everywhere, "int8", CPU)
    inside = {n.split(".")[1] for n, m in everywhere.named_modules() if isinstance(m, Quantized)}
    assert inside == {"0", "1", "2"}


@pytest.mark.parametrize(("dtype", "steps"), [(torch.int8, 127), (FLOAT8, 448)])
def test_every_row_has_a_scale_of_its_own(dtype, steps):
    torch.manual_seed(0)
    matrix = torch.randn(8, 64) * torch.logspace(-6, 3, 8)[:, None]
    matrix[3] = 0
    values, scale = quantize_rows(matrix, dtype)
    torch.testing.assert_close(scale[:, 0] * steps, matrix.abs().amax(1).clamp(min=1e-12))
    error = (values.float() * scale - matrix).abs().amax(1)
    largest = matrix.abs().amax(1)
    assert (error <= largest * (0.5 / 127 if dtype == torch.int8 else 2**-4) + 1e-12).all()


def test_loras_come_before_8_bits_and_8_bits_come_once():
    model = stage2_model()
    lora = {
        "diffusion_model.blocks.1.ffn.0.lora_down.weight": torch.ones(2, 48),
        "diffusion_model.blocks.1.ffn.0.lora_up.weight": torch.ones(64, 2),
    }
    merge_lora(model, lora)
    quantize(model, "int8", CPU)
    with pytest.raises(LoadingError):
        merge_lora(model, lora)
    with pytest.raises(ConfigError, match="already"):
        quantize(model, "int8", CPU)


def test_a_gpu_without_8_bit_floating_point_is_told_what_works():
    message = refuse_float8("GeForce RTX 3090", (8, 6))
    assert "RTX 3090" in message
    assert "int8" in message


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(case, monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    model, run = case
    plain = run(model)
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", with_backend("aot_eager"))
    prepare_speed(model, SpeedConfig(compile=True), CPU)
    compiled: Any = model.blocks[0].forward
    assert distance(run(model), plain) < 1e-5
    assert isinstance(compiled, CompiledForward)
    assert not compiled._fallback.is_taken


@pytest.mark.slow
def test_a_failing_compiler_is_told_once_and_done_without(case, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    model, run = case
    plain = run(model)

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", with_backend(broken))
    prepare_speed(model, SpeedConfig(compile=True), CPU)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(model), plain)
        assert torch.equal(run(model), plain)
    warnings = [r for r in caplog.records if r.name == "swifti2v.models.runtime.speed"]
    assert len(warnings) == 1
    assert "no compiler here" in warnings[0].getMessage()


def test_an_error_of_the_model_is_no_failure_of_the_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    model = stage2_model()
    prepare_speed(model, SpeedConfig(compile=True), CPU)
    model.blocks[0].ffn = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="shapes"):
        run_stage2(model)


@pytest.mark.slow
@pytest.mark.parametrize("speed", [SpeedConfig(compile=True), SpeedConfig(linear="int8")])
def test_levers_and_streamed_weights_go_together(speed, monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", with_backend("aot_eager"))
    resident, streamed = stage2_model(), stage2_model()
    forwards = []
    for model in (resident, streamed):
        prepare_speed(model, speed, CPU)
        forwards.append(model.blocks[0].forward)
    components = tiny_components()
    components.stage2_transformer = streamed
    place(components, CPU, "streamed")

    torch.testing.assert_close(run_stage2(streamed), run_stage2(resident), atol=1e-6, rtol=1e-5)

    assert is_streamed(streamed)
    if speed.compile:
        compiled: Any = forwards[1]
        assert not compiled._fallback.is_taken


def with_backend(backend: Any) -> Any:
    """``torch.compile`` without the minutes of a C++ compiler."""
    compile_ = torch.compile

    def compile_with(forward: Any, **options: Any) -> Any:
        return compile_(forward, backend=backend, **options)

    return compile_with


def test_compiled_code_is_kept_where_the_user_says_else_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    prepare_speed(stage2_model(), SpeedConfig(compile=True), CPU)
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "swifti2v" / "compiled")
    monkeypatch.setenv(CACHE_VARIABLE, "/elsewhere")
    prepare_speed(stage2_model(), SpeedConfig(compile=True), CPU)
    assert os.environ[CACHE_VARIABLE] == "/elsewhere"


@pytest.mark.parametrize(
    ("version", "is_slow"),
    [
        ("2.9.0+cu128", True),
        ("2.9.1", True),
        ("2.10.0", False),
        ("2.90.0", False),
        ("3.9.0", False),
    ],
)
def test_a_slow_pytorch_is_warned_of(version, is_slow):
    warning = warn_of_torch(version)
    assert (warning is not None) == is_slow
    assert warning is None or version in warning


def test_a_pipeline_refuses_a_speed_it_was_not_loaded_with():
    settings = SETTINGS | {"stage1": {**SETTINGS["stage1"], "speed": {"linear": "int8"}}}
    config = parse_config(GenerationConfig, settings, "test")
    pipe = SwiftI2VPipeline(tiny_components(), config)
    with pytest.raises(ConfigError, match=r"stage1\.speed\.linear is int8.*plain"):
        pipe.require_fit(config)


def test_a_pipeline_is_loaded_with_8_bits_and_makes_nearly_the_same_frames(tmp_path):
    config = parse_config(GenerationConfig, SETTINGS, "test")
    plain = SwiftI2VPipeline(tiny_components(), config)
    plain.save_pretrained(tmp_path)
    pipe = SwiftI2VPipeline.from_pretrained(
        tmp_path, device="cpu", speed={"stage2": SpeedConfig(linear="int8")}
    )
    assert is_quantized(pipe.components.stage2_transformer)
    assert not is_quantized(pipe.components.stage1_transformer)
    photo = Image.fromarray(np.full((SIZE, SIZE, 3), 90, np.uint8))
    frames, expected = (
        own(photo, "zoom in", generator=1).frames.astype(float) for own in (pipe, plain)
    )
    assert 0 < np.abs(frames - expected).mean() < 2
    with pytest.raises(ConfigError, match="cannot be saved"):
        pipe.save_pretrained(tmp_path / "again")


def test_a_model_without_a_layer_for_8_bits_is_refused():
    model = tiny_components().stage2_transformer  # one block, sides of 24
    with pytest.raises(ConfigError, match="three blocks or more"):
        quantize(model, "float8", CPU)


def test_quantized_products_are_those_of_the_kept_numbers():
    torch.manual_seed(0)
    model = stage2_model()
    quantize(model, "float8", CPU)
    layer = next(m for m in model.modules() if isinstance(m, Quantized))
    tokens = torch.randn(2, 5, layer.in_features)
    rows, scale = quantize_rows(tokens.flatten(0, 1), FLOAT8)
    weight = layer.weight.double() * layer.scale.double()
    expected = (rows.double() * scale.double()) @ weight.t() + layer.bias.double()
    found = layer(tokens).flatten(0, 1).double()
    assert float((found - expected).norm() / expected.norm()) < 2 * 2**-8 / math.sqrt(3)
