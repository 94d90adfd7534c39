"""A small task for the trainer: a network learns a function of random numbers."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.training.adapters import AdapterConfig, add_adapter
from swifti2v.training.engine.draws import Draw
from swifti2v.training.engine.optimizers import OptimizerConfig
from swifti2v.training.engine.ranks import Ranks
from swifti2v.training.engine.run_config import PhaseConfig, RunConfig
from swifti2v.training.engine.session import Session
from swifti2v.training.engine.trainer import Trainer
from swifti2v.training.stages.noise_levels import NoiseLevelConfig, draw_step_sigmas

ROOT = Path(__file__).parents[2]
ALONE = Ranks.alone(torch.device("cpu"))
STEPS = 10
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=3, decay="cosine", betas=(0.8, 0.9))
TWO_PHASES = (
    PhaseConfig(name="first", steps=3, optimizer=OPTIMIZER),
    PhaseConfig(name="second", steps=4, optimizer=replace(OPTIMIZER, learning_rate=0.5)),
)


@dataclass(frozen=True, kw_only=True)
class NumbersBatch:
    ids: tuple[str, ...]
    num_replaced: int
    inputs: Tensor
    phase: int


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = values + torch.tanh(self.linear(values))
        return result


class Network(nn.Module):
    """Its blocks are divided one by one, as those of a transformer."""

    _repeated_blocks = ("Block",)

    def __init__(self, width: int = 6, num_blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.out = nn.Linear(width, 1)

    def forward(self, values: Tensor) -> Tensor:
        for block in self.blocks:
            values = block(values)
        result: Tensor = self.out(values)
        return result


class NumbersTask:
    """The sum of the inputs; phase k adds k.

    Args:
        width: Of the inputs.
        bad_step: Samples of this step have no finite loss.
        seed: Of the weights.
    """

    def __init__(
        self, width: int = 6, bad_step: int | None = None, seed: int = 0, num_blocks: int = 2
    ) -> None:
        torch.manual_seed(seed)
        self.model = Network(width, num_blocks)
        self.width, self.bad_step = width, bad_step
        self.phase = -1
        self.entered: list[int] = []
        self.validated: list[tuple[str, dict[str, Tensor], bool]] = []

    def enter_phase(self, phase: int) -> None:
        self.phase = phase
        self.entered.append(phase)

    def load_batch(self, draw: Draw) -> NumbersBatch:
        numbers = [rng.standard_normal(self.width, dtype=np.float32) for rng in draw.samples()]
        return NumbersBatch(
            ids=tuple(f"{draw.step}/{index}" for index in draw.indices),
            num_replaced=sum(index == 3 for index in draw.indices),
            inputs=torch.from_numpy(np.stack(numbers)),
            phase=self.phase,
        )

    def loss(self, batch: NumbersBatch, draw: Draw) -> Tensor:
        output = self.model(batch.inputs)[:, 0]
        wanted = batch.inputs.sum(dim=1) + 10.0 * batch.phase + 0.1 * draw.noise_like(output)
        error = (output - wanted).square()
        if draw.step == self.bad_step:
            # Of the step's last sample alone: with several ranks, the others see none.
            is_bad = torch.tensor([index == draw.batch_size - 1 for index in draw.indices])
            error = torch.where(is_bad, error * torch.nan, error)
        return cast(Tensor, error)

    def validate(self, directory: Path) -> dict[str, float]:
        with (directory / "seen.txt").open("a") as seen:
            seen.write("measured\n")
        weights = {n: v.detach().clone() for n, v in self.model.named_parameters()}
        self.validated.append((directory.name, weights, self.model.training))
        bias = self.model.out.bias.detach().sum()
        output = self.model(torch.ones(2, self.width)).sum()
        return {"bias": float(bias), "output": float(output)}


class WindowsTask(NumbersTask):
    """A small Stage II transformer: noise levels, rotary tables and modulation reach every block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model: Any = SegmentTransformer3DModel(
            patch_size=(1, 1, 1), in_channels=4, out_channels=4, rope_max_seq_len=32,
            num_attention_heads=2, attention_head_dim=24, text_dim=8, freq_dim=32, ffn_dim=64,
            num_layers=2,
        )  # fmt: skip
        for name, value in self.model.named_parameters():
            if "norm" in name:  # as trained ones are: no values that bfloat16 holds
                value.data += 0.3 * torch.rand_like(value)

    def loss(self, batch: NumbersBatch, draw: Draw) -> Tensor:
        clean = batch.inputs[:, :4, None, None, None].expand(-1, -1, 3, 4, 4)
        noise = draw.noise_like(clean)
        sigma = draw.uniforms()[:, None].expand(-1, 3)
        level = sigma[:, None, :, None, None]
        output = self.model(clean + level * noise, sigma, torch.ones(len(sigma), 2, 8))
        return cast(Tensor, (output - noise).square().flatten(1).mean(dim=1))


class AdapterTask(WindowsTask):
    """A float32 LoRA on the same transformer, which is frozen and bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.model.to(torch.bfloat16)
        add_adapter(self.model, AdapterConfig(rank=2))


class NoisyNumbersTask(NumbersTask):
    """The same with noise levels, which change nothing here."""

    def draw_sigma(self, draw: Draw) -> Tensor:
        return draw_step_sigmas(NoiseLevelConfig(), draw)


def alone_in(directory: Path) -> Session:
    """A run of this process alone."""
    return Session(directory=directory, ranks=ALONE)


def make_trainer(
    directory: Path,
    task: Any = None,
    phases: Sequence[PhaseConfig] | None = None,
    ranks: Ranks = ALONE,
    **settings: Any,
) -> Trainer:
    config = RunConfig(**{"batch_size": 8, "precision": "float32", **settings})
    own = (PhaseConfig(steps=STEPS, optimizer=OPTIMIZER),)
    return Trainer(task or NumbersTask(), config, phases or own, directory, ranks)


def read_lines(directory: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in read_lines(directory)]


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, averages and moments by name."""
    state = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    state |= {f"average.{name}": value for name, value in trainer.average.weights.items()}
    for number, own in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{number}.{name}": value for name, value in own.items()}
    return {name: value.clone() for name, value in state.items()}


TIMES = (
    "seconds",
    "step_seconds",
    "wait_seconds",
    "seconds_left",
    "samples_per_second",
    "tokens_per_second",
    "mfu",
)


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_same(trainer: Trainer, other: Trainer) -> None:
    """Bit by bit: weights, averages, moments, counts and metrics."""
    own, others = whole_state(trainer), whole_state(other)
    assert own.keys() == others.keys()
    assert [name for name in own if not torch.equal(own[name], others[name])] == []
    assert trainer.step == other.step
    first, second = (without_times(read_lines(t.directory)) for t in (trainer, other))
    assert first == second


def run_in_subprocess(*command: object, code: int = 0) -> str:
    """Output of a command, on stderr if it has to fail with ``code``."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout
