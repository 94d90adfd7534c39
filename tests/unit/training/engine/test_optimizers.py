"""Optimizers: each learns, each continues bitwise, and small updates survive in bfloat16."""

import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from swifti2v.errors import ConfigError, InputError
from swifti2v.training.engine.optimizers import (
    CompactAdamW,
    OptimizerConfig,
    build_optimizer,
    round_stochastically,
    scale_learning_rate,
    set_learning_rate,
)

VARIANTS = [
    ("adamw", "float32"),
    ("adamw", "bfloat16_stochastic"),
    ("adamw_8bit", "float32"),
    ("adamw_8bit", "bfloat16_stochastic"),
]
INPUTS, OUTPUTS = 256, 64  # rows of one 8-bit block


def make_config(kind: Any, weights: Any, **values: Any) -> OptimizerConfig:
    if kind == "adamw_8bit":
        pytest.importorskip("torchao")
    return OptimizerConfig(kind=kind, weights=weights, **values)


class Regression:
    """Learn a linear map from its values; batches depend on the step alone."""

    def __init__(self, config: OptimizerConfig) -> None:
        torch.manual_seed(0)
        dtype = torch.float32 if config.weights == "float32" else torch.bfloat16
        self.target = torch.randn(INPUTS, OUTPUTS) / INPUTS**0.5
        self.model = nn.Linear(INPUTS, OUTPUTS).to(dtype)
        self.config, self.dtype = config, dtype
        self.optimizer = build_optimizer(self.model.named_parameters(), config, seed=3)

    def train(self, start: int, stop: int) -> float:
        """Mean squared error of the last step."""
        for step in range(start, stop):
            x = torch.randn(512, INPUTS, generator=torch.Generator().manual_seed(step))
            output = self.model(x.to(self.dtype)).float()
            loss = (output - x @ self.target).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            set_learning_rate(self.optimizer, scale_learning_rate(self.config, step, step / stop))
            self.optimizer.step()
        return float(loss.detach())

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict()], file)
        return file.getvalue()

    def load(self, content: bytes) -> None:
        model, optimizer = torch.load(io.BytesIO(content), weights_only=True)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)


@pytest.mark.parametrize(("kind", "weights"), VARIANTS)
def test_each_learns_a_linear_map(kind, weights):
    config = make_config(kind, weights, learning_rate=1e-2, warmup_steps=5, decay="cosine")
    run = Regression(config)
    first, last = run.train(0, 1), run.train(1, 200)
    # bfloat16 cannot hold the map better than to about 1/256: a loss of a few 1e-5.
    assert first > 1
    assert last < 1e-3


@pytest.mark.parametrize(("kind", "weights"), VARIANTS)
def test_each_continues_bitwise(kind, weights):
    config = make_config(kind, weights, learning_rate=1e-3, warmup_steps=5)
    whole = Regression(config)
    whole.train(0, 8)
    middle = whole.save()
    whole.train(8, 16)

    resumed = Regression(config)
    resumed.train(0, 1)  # state that the checkpoint must replace
    torch.manual_seed(99)  # and a process whose own generator is somewhere else
    resumed.load(middle)
    before = torch.get_rng_state()
    resumed.train(8, 16)
    assert torch.equal(torch.get_rng_state(), before)
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)
    middle_weight = torch.load(io.BytesIO(middle), weights_only=True)[0]["weight"]
    assert not torch.equal(middle_weight, whole.model.weight)


def push(weights: Tensor, num_steps: int, optimizer: torch.optim.Optimizer) -> None:
    """Updates of one learning rate each: a constant gradient."""
    for _ in range(num_steps):
        weights.grad = torch.ones_like(weights)
        optimizer.step()


def test_plain_bfloat16_stalls_where_stochastic_rounding_does_not():
    plain, stochastic = (nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2))
    push(plain, 200, torch.optim.AdamW([plain], lr=1e-5, weight_decay=0))
    config = OptimizerConfig(learning_rate=1e-5, weights="bfloat16_stochastic")
    push(stochastic, 200, build_optimizer([("bias", stochastic)], config))
    assert (plain == 1).all()
    # 4096 x 200 updates of odds 1/391: 2,100 steps of 1/256, known to 2.2% (one sigma).
    assert float(1 - stochastic.detach().float().mean()) == pytest.approx(200e-5, rel=0.1)


def test_8_bits_round_stochastically_too():
    config = make_config("adamw_8bit", "bfloat16_stochastic", learning_rate=1e-5)
    weights = nn.Parameter(torch.ones(16, 256, dtype=torch.bfloat16))
    optimizer = build_optimizer([("weight", weights)], config)
    push(weights, 200, optimizer)
    assert optimizer.state[weights]["exp_avg"].codes.dtype == torch.uint8
    assert float(1 - weights.detach().float().mean()) == pytest.approx(200e-5, rel=0.1)


def test_the_second_moment_forgets_at_its_rate():
    weights = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = CompactAdamW([weights], lr=0.0, betas=(0.9, 0.999), eps=1e-8, seed=0)
    push(weights, 1, optimizer)
    first = optimizer.state[weights]["exp_avg_sq"].float().mean()
    for _ in range(500):
        weights.grad = torch.zeros_like(weights)
        optimizer.step()
    last = optimizer.state[weights]["exp_avg_sq"].float().mean()
    assert float(last / first) == pytest.approx(0.999**500, rel=0.03)
    assert (weights == 1).all()  # lr 0: a weight that bfloat16 holds is not moved by its rounding


@settings(max_examples=100, deadline=None)
@given(value=st.floats(width=32, allow_subnormal=False), seed=st.integers(0, 100))
def test_rounding_gives_a_neighbour_of_the_value(value, seed):
    generator = torch.Generator().manual_seed(seed)
    exact = torch.full((32,), value)
    rounded = round_stochastically(exact, generator)
    assert rounded.dtype == torch.bfloat16
    if not math.isfinite(value):
        assert torch.equal(rounded.isnan(), exact.isnan())
        assert torch.equal(rounded.isinf(), exact.isinf())
        return
    lower = (exact.view(torch.int32) & -65536).view(torch.float32)
    upper = (lower.view(torch.int32) + 65536).view(torch.float32)  # away from zero
    assert ((rounded.float() == lower) | (rounded.float() == upper)).all()
    if lower[0] == value:
        assert (rounded.float() == value).all()


def test_rounding_is_exact_on_average():
    exact = torch.linspace(-3, 3, 64).expand(4096, -1)
    rounded = round_stochastically(exact, torch.Generator().manual_seed(0)).float()
    # One sigma of the mean is below (1/64) / 2 / sqrt(4096) = 1.2e-4.
    assert torch.allclose(rounded.mean(0), exact[0], atol=6e-4, rtol=0)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("kind", "weights"), VARIANTS)
def test_shards_are_updated_like_whole_weights(kind, weights):
    config = make_config(kind, weights, learning_rate=1e-3)
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    mesh = init_device_mesh("cpu", (1,))
    whole = nn.Parameter(torch.ones(OUTPUTS, INPUTS, dtype=dtype))
    shard = nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [Shard(0)]))
    gradient = torch.randn(OUTPUTS, INPUTS).to(dtype)
    optimizers = [build_optimizer([("w", p)], config) for p in (whole, shard)]
    for _ in range(3):
        whole.grad = gradient.clone()
        shard.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    assert isinstance(shard, DTensor)
    assert isinstance(optimizers[1].state[shard]["exp_avg"], DTensor)
    assert torch.equal(whole, shard.full_tensor())
    assert not torch.equal(whole, torch.ones_like(whole))


@pytest.mark.parametrize(
    ("shape", "is_8bit"),
    [
        ((16, 256), True),
        ((2, 4, 512), True),
        ((15, 256), False),
        ((64, 128), False),
        ((8192,), False),
    ],
)
def test_8_bits_are_for_large_tensors_of_whole_rows(shape, is_8bit):
    config = make_config("adamw_8bit", "float32")
    weights = nn.Parameter(torch.ones(shape))
    optimizer = build_optimizer([("weight", weights)], config)
    push(weights, 1, optimizer)
    for name in ("exp_avg", "exp_avg_sq"):
        assert hasattr(optimizer.state[weights][name], "codes") == is_8bit


def test_a_parameter_without_a_gradient_is_left_alone():
    used, unused = (nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = CompactAdamW([unused, used], lr=0.1)
    push(used, 1, optimizer)
    assert (unused == 1).all()
    assert unused not in optimizer.state
    assert (used < 1).all()


def test_compact_agrees_with_torch_where_nothing_is_rounded():
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 8), torch.randn(5, 4, 8)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    values = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
    group = [{"params": [ours], "weight_decay": 0.1}]
    optimizers = [
        CompactAdamW(group, **values),  # type: ignore[arg-type]
        torch.optim.AdamW([theirs], weight_decay=0.1, **values),  # type: ignore[arg-type]
    ]
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6, rtol=0)  # sums in another order
    assert not torch.allclose(ours, start, atol=1e-3)


def test_biases_norms_and_tables_are_not_decayed():
    model = nn.ParameterDict(
        {
            "weight": nn.Parameter(torch.ones(2, 2)),
            "bias": nn.Parameter(torch.ones(2)),
            "scale_shift_table": nn.Parameter(torch.ones(1, 6, 2)),
            "frozen": nn.Parameter(torch.ones(2, 2), requires_grad=False),
        }
    )
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(weight_decay=0.5))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {
        id(model["weight"]): 0.5, id(model["bias"]): 0.0, id(model["scale_shift_table"]): 0.0,
    }  # fmt: skip
    only_biases = build_optimizer([("bias", model["bias"])], OptimizerConfig())
    assert len(only_biases.param_groups) == 1


@pytest.mark.parametrize(
    ("decay", "progress", "share"),
    [
        ("constant", 0.0, 1), ("constant", 1.0, 1),
        ("linear", 0.25, 0.75), ("linear", 1.0, 0),
        ("cosine", 0.0, 1), ("cosine", 0.5, 0.515), ("cosine", 1.0, 0.03),
        ("cosine_tail", 0.49, 1), ("cosine_tail", 0.75, 0.515), ("cosine_tail", 1.0, 0.03),
    ],
)  # fmt: skip
def test_learning_rate_falls_as_its_decay_says(decay, progress, share):
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay=decay)
    assert scale_learning_rate(config, 9, progress) == pytest.approx(2.0 * share)
    assert scale_learning_rate(config, 4, progress) == pytest.approx(1.0 * share)
    assert scale_learning_rate(config, 0, progress) == pytest.approx(0.2 * share)


def test_weights_of_another_dtype_are_refused():
    half, single = (nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.bfloat16, torch.float32))
    with pytest.raises(ConfigError, match=r"weights is float32, but bias is torch\.bfloat16"):
        build_optimizer([("bias", half)], OptimizerConfig())
    with pytest.raises(ConfigError, match=r"load the trained weights as torch\.bfloat16"):
        build_optimizer([("bias", single)], OptimizerConfig(weights="bfloat16_stochastic"))
    half.requires_grad_(False)
    assert build_optimizer([("frozen", half), ("bias", single)], OptimizerConfig())


def test_nothing_to_train_is_refused():
    with pytest.raises(InputError, match="no parameter requires a gradient"):
        build_optimizer([], OptimizerConfig())


def test_a_missing_torchao_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "torchao.optim.subclass_8bit", None
    )  # what Python does for a missing one
    with pytest.raises(InputError, match=r"pip install 'swifti2v\[quant\]'"):
        build_optimizer([("bias", nn.Parameter(torch.ones(2)))], OptimizerConfig(kind="adamw_8bit"))


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 0.0}, {"learning_rate": math.inf}, {"warmup_steps": 0}, {"eps": 0.0},
        {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}, {"max_grad_norm": math.nan},
    ],
)  # fmt: skip
def test_bad_settings_are_named(values):
    (name,) = values
    with pytest.raises(ConfigError, match=name):
        OptimizerConfig(**values)


def test_adamw_takes_every_setting():
    config = OptimizerConfig(learning_rate=0.1, betas=(0.5, 0.6), eps=0.1, weight_decay=0.3)
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    models[1].load_state_dict(models[0].state_dict())
    groups = [
        {"params": [models[1].weight], "weight_decay": 0.3},
        {"params": [models[1].bias], "weight_decay": 0.0},
    ]
    optimizers = [
        build_optimizer(models[0].named_parameters(), config),
        torch.optim.AdamW(groups, lr=0.1, betas=(0.5, 0.6), eps=0.1),
    ]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(torch.arange(6.0).reshape(2, 3)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(*(model.weight for model in models))
    torch.testing.assert_close(*(model.bias for model in models))
