"""Optimizers of the trainer: AdamW in float32, in bfloat16 with stochastic rounding, in 8 bits."""

import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from swifti2v.config import settings
from swifti2v.errors import ConfigError, InputError

FINAL_SHARE = 0.03
"""End of the cosines, as a part of the peak."""
BLOCK_8BIT = 256
"""Values that share a float32 scale in 8-bit moments, as in torchao."""
MIN_8BIT = 4096
"""Smaller tensors keep their moments in the dtype of the weights, as in bitsandbytes and torchao."""


@settings
class OptimizerConfig:
    """Settings of the update of weights."""

    learning_rate: float = 1e-5
    """Peak, reached after ``warmup_steps``."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Betas of AdamW."""
    eps: float = 1e-8
    """Epsilon of AdamW."""
    weight_decay: float = 0.01
    """Weight decay of matrices and kernels; biases, norms and modulation tables have none."""
    warmup_steps: int = 100
    """Steps of linear rise; 1 means none."""
    decay: Literal["constant", "cosine", "cosine_tail", "linear"] = "constant"
    """Decay after the warm-up: none; a cosine down to 3% over the whole budget; constant for its
    first half, then that cosine; or linear to 0."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to it."""
    kind: Literal["adamw", "adamw_8bit"] = "adamw"
    """Moments in the dtype of the weights, or in 8 bits (needs torchao)."""
    weights: Literal["float32", "bfloat16_stochastic"] = "float32"
    """Precision of the trained weights. In bfloat16 an update smaller than about 1/256 of its
    weight is lost by plain rounding; stochastic rounding keeps it on average."""

    def __post_init__(self) -> None:
        above = {
            "learning_rate": self.learning_rate,
            "eps": self.eps,
            "warmup_steps": self.warmup_steps,
            "max_grad_norm": self.max_grad_norm,
        }
        for name, value in above.items():
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; it must be above 0 and finite")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are {self.betas}; both must be in [0, 1)")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay is {self.weight_decay}; it must be 0 or above")


def scale_learning_rate(config: OptimizerConfig, step: int, progress: float) -> float:
    """Learning rate of a step, counted from 0, with a part in [0, 1] of the budget used."""
    peak = config.learning_rate * min(1.0, (step + 1) / config.warmup_steps)
    if config.decay == "linear":
        return peak * (1 - progress)
    start = {"constant": 1.0, "cosine": 0.0, "cosine_tail": 0.5}[config.decay]
    if config.decay == "constant" or progress < start:
        return peak
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - start) / (1 - start)))
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * cosine)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Give all groups a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, *, seed: int = 0
) -> Optimizer:
    """Make the optimizer of the parameters that require a gradient.

    A continued training gives bitwise the same weights as one without a stop: all that an update
    depends on is in ``state_dict``, stochastic rounding too, whose noise is a function of ``seed``
    (the same on all ranks), the step and the shard. Weights may be whole tensors or shards of
    FSDP2.

    Raises:
        InputError: No parameter requires a gradient, or torchao is not installed.
        ConfigError: A parameter is not in the dtype of ``config.weights``.
    """
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    if not named:
        raise InputError("no parameter requires a gradient; there is nothing to train")
    dtype = torch.float32 if config.weights == "float32" else torch.bfloat16
    for name, parameter in named:
        if parameter.dtype != dtype:
            raise ConfigError(
                f"weights is {config.weights}, but {name} is {parameter.dtype}; load the trained "
                f"weights as {dtype}"
            )
    groups = _group(named, config.weight_decay)
    if config.kind == "adamw" and config.weights == "float32":
        # The fused kernel makes no temporary tensors of the size of the weights.
        return torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
        )
    return CompactAdamW(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        seed=seed,
        has_8bit_moments=config.kind == "adamw_8bit",
    )


class CompactAdamW(Optimizer):
    """AdamW computed in float32 and kept in less: bfloat16 weights, bfloat16 or 8-bit moments.

    What is bfloat16 is rounded stochastically. The second moment needs that as much as the weights
    do: with ``beta2`` 0.999 its decay of a thousandth a step is below the resolution of bfloat16.
    The noise comes from the seed (the same on all ranks), the parameter's step and place, and its
    shard, so no generator has to be saved, and replicas of a shard stay equal; another number of
    shards draws other noise.

    8-bit moments are torchao's state tensors (blocks of 256 values with a scale). Tensors of fewer
    than 4096 values, or with rows that are no multiple of 256, keep theirs in the dtype of the
    weights. A group of parameters may have its own ``weight_decay``.

    Raises:
        InputError: 8 bits are asked for and torchao is not installed.

    Source:
        Zamirai et al., Revisiting BFloat16 Training, arXiv:2010.06192 (stochastic rounding);
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        seed: int = 0,
        has_8bit_moments: bool = False,
    ) -> None:
        self._state_8bit = _import_state_8bit() if has_8bit_moments else None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "seed": seed}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        generators: dict[torch.device, torch.Generator] = {}
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is None:
                    continue
                device = parameter.device
                generator = generators.setdefault(device, torch.Generator(device))
                self._update(parameter, group, place, generator)
        return loss

    def _update(
        self, parameter: Tensor, group: dict[str, Any], place: int, generator: torch.Generator
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = self._new_moment(parameter, signed=True)
            state["exp_avg_sq"] = self._new_moment(parameter, signed=False)
        state["step"] += 1
        step = int(state["step"])
        generator.manual_seed(_mix(group["seed"], step, place, _shard(parameter)))
        assert parameter.grad is not None
        weight, mean, square, gradient = (
            _local(t) for t in (parameter, state["exp_avg"], state["exp_avg_sq"], parameter.grad)
        )
        beta1, beta2 = group["betas"]
        gradient = gradient.float()
        exact_mean = _read(mean).lerp(gradient, 1 - beta1)
        exact_square = _read(square).lerp(gradient.square(), 1 - beta2)
        _write(mean, exact_mean, generator)
        _write(square, exact_square, generator)
        denominator = exact_square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        exact = weight.float() * (1 - group["lr"] * group["weight_decay"])
        exact.addcdiv_(exact_mean, denominator, value=-group["lr"] / (1 - beta1**step))
        _write(weight, exact, generator)

    def _new_moment(self, parameter: Tensor, *, signed: bool) -> Tensor:
        shard = _local(parameter)
        rows = parameter.shape[0] if parameter.ndim > 1 else parameter.numel()
        # Whole rows of blocks: the same choice on any number of ranks, whose shards are rows.
        is_large = parameter.numel() >= MIN_8BIT and parameter.numel() // rows % BLOCK_8BIT == 0
        is_whole = shard.numel() > 0 and shard.numel() % BLOCK_8BIT == 0
        if self._state_8bit is None or not (is_large and is_whole):
            return torch.zeros_like(parameter)
        moment: Tensor = self._state_8bit.zeros(
            shard.shape, signed, BLOCK_8BIT, shard.device, dtype=shard.dtype
        )
        if not isinstance(parameter, DTensor):
            return moment
        sharded: Tensor = DTensor.from_local(
            moment,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return sharded


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round to bfloat16, up or down with odds that make the mean exact.

    Args:
        values: Float32, any shape; NaN and infinity stay what they are.
        generator: On the same device.

    Returns:
        Bfloat16, one of the two neighbours of each value; a value that bfloat16 holds is kept.
    """
    noise = torch.randint(
        0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    # bfloat16 is the upper half of float32: noise below carries over with the lower half's odds.
    rounded = ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


def _group(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Decayed and undecayed parameters, each with its weight decay."""
    decayed = [p for name, p in named if p.ndim > 1 and "table" not in name]
    kept = [p for name, p in named if p.ndim <= 1 or "table" in name]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _import_state_8bit() -> Any:
    try:
        return importlib.import_module("torchao.optim.subclass_8bit").OptimState8bit
    except ImportError as error:
        raise InputError(
            f"adamw_8bit needs torchao ({error}); pip install 'swifti2v[quant]', or set kind adamw"
        ) from None


def _read(moment: Tensor) -> Tensor:
    """A moment in float32."""
    return moment.dequantize() if hasattr(moment, "codes") else moment.float()


def _write(target: Tensor, exact: Tensor, generator: torch.Generator) -> None:
    """Keep a float32 result in the precision of its place."""
    is_rounded = target.dtype == torch.bfloat16 and not hasattr(target, "codes")
    target.copy_(round_stochastically(exact, generator) if is_rounded else exact)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard(tensor: Tensor) -> int:
    """Number of this rank's shard: replicas of a shard have the same."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh, shard = tensor.device_mesh, 0
    for axis, placement in enumerate(tensor.placements):
        if placement.is_shard():
            shard = shard * mesh.size(axis) + mesh.get_local_rank(axis)
    return shard


def _mix(seed: int, step: int, place: int, shard: int) -> int:
    """One seed from four numbers; odd constants keep neighbours apart."""
    mixed = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9
    mixed += place * 0x94D049BB133111EB + shard * 0xD6E8FEB86659FD93
    mixed %= 1 << 64
    return (mixed ^ (mixed >> 31)) % (1 << 63)
