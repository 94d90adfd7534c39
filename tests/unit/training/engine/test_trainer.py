"""The training loop: what is stopped and continued, divided or accumulated, stays the same."""

import gc
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swifti2v.errors import ConfigError, NumericalError
from swifti2v.training.engine.draws import Draw
from swifti2v.training.engine.optimizers import OptimizerConfig
from swifti2v.training.engine.run_config import PhaseConfig
from swifti2v.training.engine.run_log import StepMetrics
from tests.helpers.regression import (
    OPTIMIZER,
    STEPS,
    TWO_PHASES,
    NumbersBatch,
    NumbersTask,
    WindowsTask,
    assert_same,
    losses,
    make_trainer,
    read_lines,
)


class StopError(Exception):
    pass


def stop_at(step: int, error: type[BaseException] = StopError) -> Callable[[StepMetrics], None]:
    def on_step(metrics: StepMetrics) -> None:
        if metrics.step == step:
            raise error

    return on_step


def test_it_learns_and_writes_a_line_a_step(tmp_path):
    trainer = make_trainer(tmp_path)
    seen: list[StepMetrics] = []
    trainer.run(on_step=seen.append)
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [metrics.loss for metrics in seen] == losses(tmp_path)
    assert len(set(losses(tmp_path))) == STEPS
    assert {line["num_replaced"] for line in lines} == {1}
    assert lines[0]["lr"] == pytest.approx(0.01 / 3)
    assert all(line["grad_norm"] > 0 and line["seconds"] >= 0 for line in lines)
    assert {line["phase"] for line in lines} == {"main"}


def test_it_learns(tmp_path):
    optimizer = OptimizerConfig(learning_rate=0.05, warmup_steps=1)
    make_trainer(tmp_path, phases=(PhaseConfig(steps=60, optimizer=optimizer),)).run()
    assert sum(losses(tmp_path)[-5:]) < 0.2 * sum(losses(tmp_path)[:5])


@pytest.mark.parametrize("weights", ["float32", "bfloat16_stochastic"])
@pytest.mark.parametrize("num_before", [1, 5, 9])
def test_five_and_five_steps_are_ten(tmp_path, num_before, weights):
    optimizer = replace(OPTIMIZER, weights=weights)
    phases = (PhaseConfig(steps=STEPS, optimizer=optimizer),)
    own: Any = {"precision": "float32" if weights == "float32" else "bfloat16"}
    straight = make_trainer(tmp_path / "straight", phases=phases, **own)
    straight.run()
    make_trainer(tmp_path / "stopped", phases=phases, **own).run(max_steps=num_before)
    continued = make_trainer(tmp_path / "stopped", NumbersTask(seed=1), phases, **own)
    continued.run(resume=True)
    assert_same(continued, straight)


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_a_callback_that_raises_stops_after_a_checkpoint(tmp_path, error):
    straight = make_trainer(tmp_path / "straight")
    straight.run()
    for step in (1, 4, 7):
        with pytest.raises(error):
            make_trainer(tmp_path / "stopped").run(resume=True, on_step=stop_at(step, error))
    continued = make_trainer(tmp_path / "stopped")
    continued.run(resume=True)
    assert_same(continued, straight)


class InterruptedTask(NumbersTask):
    """Ctrl-C comes in the middle of its n-th loss, after another micro-batch's gradient."""

    def __init__(self, interrupted: int) -> None:
        super().__init__()
        self.calls, self.interrupted = count(), interrupted

    def loss(self, batch: NumbersBatch, draw: Any) -> Tensor:
        if next(self.calls) == self.interrupted:
            raise KeyboardInterrupt
        return super().loss(batch, draw)


@pytest.mark.parametrize("interrupted", [1, 7])
def test_an_interruption_within_a_step_leaves_no_trace(tmp_path, interrupted):
    settings: dict[str, Any] = {"num_micro_batches": 2}
    straight = make_trainer(tmp_path / "straight", **settings)
    straight.run()
    stopped = make_trainer(tmp_path / "stopped", InterruptedTask(interrupted), **settings)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert stopped.step == interrupted // 2
    continued = make_trainer(tmp_path / "stopped", **settings)
    continued.run(resume=True)
    assert_same(continued, straight)
    stopped.run()  # the same one goes on, too
    assert_same(stopped, straight)


def test_an_interruption_while_weights_change_keeps_the_last_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, checkpoint_steps=3)
    calls = count(1)

    def interrupt(*_: object) -> None:
        if next(calls) == 5:
            raise KeyboardInterrupt  # weights are changed, the step is not counted yet

    trainer.optimizer.register_step_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000003"
    continued = make_trainer(tmp_path)
    continued.run(resume=True)
    straight = make_trainer(tmp_path / "straight")
    straight.run()
    assert_same(continued, straight)


def test_checkpoints_do_not_change_the_training(tmp_path):
    trainers = []
    cases: tuple[dict[str, Any], ...] = ({}, {"checkpoint_steps": 1}, {"checkpoint_steps": 3})
    for number, settings in enumerate(cases):
        trainers.append(make_trainer(tmp_path / str(number), phases=TWO_PHASES, **settings))
        trainers[-1].run()
    assert_same(trainers[1], trainers[0])
    assert_same(trainers[2], trainers[0])


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_gradients_are_clipped_and_reported_unclipped(tmp_path, max_norm):
    phases = (PhaseConfig(steps=3, optimizer=replace(OPTIMIZER, max_grad_norm=max_norm)),)
    trainer = make_trainer(tmp_path, phases=phases, num_micro_batches=2)
    norms = []

    def measure(*_: object) -> None:
        gradients = [
            value.grad.flatten() for value in trainer.model.parameters() if value.grad is not None
        ]
        norms.append(float(torch.cat(gradients).norm()))

    trainer.optimizer.register_step_pre_hook(measure)
    trainer.run()
    before = [line["grad_norm"] for line in read_lines(tmp_path)]
    assert min(before) > 0.01
    assert norms == pytest.approx([min(norm, max_norm) for norm in before], rel=1e-3)


@pytest.mark.parametrize("settings", [{"num_micro_batches": 2}, {"num_micro_batches": 8}])
def test_accumulation_equals_one_batch(tmp_path, settings):
    make_trainer(tmp_path / "one").run()
    make_trainer(tmp_path / "many", **settings).run()
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_the_time_left_is_that_of_the_steps_left(tmp_path):
    seen: list[StepMetrics] = []
    make_trainer(tmp_path / "phases", phases=TWO_PHASES).run(on_step=seen.append)
    for metrics, (phase_step, num_left) in zip(
        seen, [(1, 6), (2, 5), (3, 4), (1, 3), (2, 2), (3, 1), (4, 0)], strict=True
    ):
        begun = seen[2].seconds if metrics.phase == "second" else 0
        pace = (metrics.seconds - begun) / phase_step
        # Seconds are rounded to milliseconds.
        assert metrics.seconds_left == pytest.approx(num_left * pace, abs=8e-3)
    own: list[StepMetrics] = []
    make_trainer(tmp_path / "stopped").run(max_steps=3, on_step=own.append)
    assert own[-1].seconds_left == 0
    assert own[0].seconds_left == pytest.approx(2 * own[0].step_seconds, abs=2e-3)
    minutes = (PhaseConfig(minutes=1, optimizer=OPTIMIZER),)
    make_trainer(tmp_path / "minutes", phases=minutes).run(max_steps=1, on_step=own.append)
    assert own[-1].seconds_left == 0  # max_steps ends it


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_size 8 is not a multiple of 3 micro-batches"):
        make_trainer(tmp_path, num_micro_batches=3)


def test_workers_load_the_same(tmp_path):
    for number in (0, 2):
        trainer = make_trainer(tmp_path / str(number), phases=TWO_PHASES, num_workers=number)
        trainer.run()
    assert losses(tmp_path / "2") == losses(tmp_path / "0")


class Shredder:
    """An object in a cycle that must be freed by the process that made it, as a decoder's threads."""

    def __init__(self, log: Path) -> None:
        self.cycle, self.log = self, log

    def __del__(self) -> None:
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n")


class CollectingTask(NumbersTask):
    def load_batch(self, draw: Draw) -> NumbersBatch:
        gc.collect()
        return super().load_batch(draw)


def test_workers_free_nothing_that_this_process_left(tmp_path):
    task, log = CollectingTask(), tmp_path / "freed.txt"
    gc.disable()
    try:
        Shredder(log)
        trainer = make_trainer(tmp_path / "run", task, num_workers=1)
        trainer.run(max_steps=2)
    finally:
        gc.enable()
    assert set(log.read_text().split()) == {str(os.getpid())}


def test_phases_change_data_and_optimizer(tmp_path):
    task = NumbersTask()
    trainer = make_trainer(tmp_path, task, TWO_PHASES)
    first = trainer.optimizer
    trainer.run()
    assert task.entered == [0, 1]
    assert trainer.optimizer is not first
    lines = read_lines(tmp_path)
    assert [line["phase"] for line in lines] == ["first"] * 3 + ["second"] * 4
    assert lines[3]["loss"] > 5 * lines[2]["loss"]  # what is wanted is 10 more
    rates = [line["lr"] for line in lines]
    assert rates[:3] == pytest.approx([0.01 / 3, 0.0067 * 0.7575, 0.01 * 0.2725], rel=0.02)
    assert rates[3] == pytest.approx(0.5 / 3)


@pytest.mark.parametrize("num_before", [2, 3, 5, 7])
def test_phases_continue_where_they_were(tmp_path, num_before):
    straight = make_trainer(tmp_path / "straight", phases=TWO_PHASES)
    straight.run()
    make_trainer(tmp_path / "stopped", phases=TWO_PHASES).run(max_steps=num_before)
    continued = make_trainer(tmp_path / "stopped", phases=TWO_PHASES)
    continued.run(resume=True)
    if num_before < 7:
        assert_same(continued, straight)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, continued.model.state_dict()[name])


def test_phases_with_weights_of_different_precision_are_refused(tmp_path):
    other = OptimizerConfig(weights="bfloat16_stochastic")
    phases = (TWO_PHASES[0], PhaseConfig(name="second", steps=4, optimizer=other))
    with pytest.raises(ConfigError, match="bfloat16_stochastic, float32"):
        make_trainer(tmp_path, phases=phases)


def test_a_budget_in_minutes_ends_and_counts_over_stops(tmp_path):
    phases = (PhaseConfig(minutes=0.3 / 60, optimizer=OPTIMIZER),)
    make_trainer(tmp_path, phases=phases).run(max_steps=2)
    trainer = make_trainer(tmp_path, phases=phases)
    trainer.run(resume=True)
    seconds = [line["seconds"] for line in read_lines(tmp_path)]
    assert len(seconds) > 2
    assert seconds == sorted(seconds)
    assert seconds[-2] <= 0.3 <= seconds[-1] + 1e-3  # rounded to milliseconds
    make_trainer(tmp_path, phases=phases).run(resume=True)
    assert len(read_lines(tmp_path)) == len(seconds)  # nothing left


def test_a_checkpoint_after_so_many_minutes(tmp_path):
    phases = (PhaseConfig(minutes=0.3 / 60, optimizer=OPTIMIZER),)
    settings: dict[str, Any] = {"checkpoint_minutes": 0.1 / 60, "num_checkpoints": 100}
    make_trainer(tmp_path, phases=phases, **settings).run()
    assert 2 <= len(list((tmp_path / "checkpoints").glob("step-*"))) <= 5


def test_the_average_follows_the_weights(tmp_path):
    task = NumbersTask()
    trainer = make_trainer(tmp_path, task, ema_decay=0.5)
    expected = {n: v.detach().clone() for n, v in task.model.named_parameters()}
    decays = []

    def follow(metrics: StepMetrics) -> None:
        decay = min(0.5, (1 + metrics.step) / (10 + metrics.step))
        decays.append(decay)
        for name, value in task.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach()

    trainer.run(on_step=follow)
    assert decays[0] == pytest.approx(2 / 11)
    assert decays[-1] == 0.5
    own = {n: v.detach().clone() for n, v in task.model.named_parameters()}
    with trainer.average.applied():
        for name, value in task.model.named_parameters():
            torch.testing.assert_close(value.detach(), expected[name])
            assert not torch.equal(value, own[name])
    assert all(torch.equal(v, own[n]) for n, v in task.model.named_parameters())
    trainer.take_average()
    assert not task.model.training
    for name, value in task.model.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name])


def test_without_an_average_the_weights_are_what_remains(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=None)
    trainer.run()
    own = {n: v.detach().clone() for n, v in trainer.model.named_parameters()}
    with trainer.average.applied():
        assert all(torch.equal(v, own[n]) for n, v in trainer.model.named_parameters())
    trainer.take_average()
    assert all(torch.equal(v, own[n]) for n, v in trainer.model.named_parameters())


def test_validation_measures_the_average_and_gives_the_weights_back(tmp_path):
    task = NumbersTask()
    trainer = make_trainer(tmp_path, task, validation_steps=4, ema_decay=0.5)
    averages: dict[str, dict[str, Tensor]] = {}

    def keep(metrics: StepMetrics) -> None:
        name = f"step-{metrics.step:08d}"
        averages[name] = {n: v.clone() for n, v in trainer.average.weights.items()}

    trainer.run(on_step=keep)
    assert [name for name, _, _ in task.validated] == [f"step-{n:08d}" for n in (0, 4, 8)]
    for name, weights, is_training in task.validated:
        assert not is_training
        assert (tmp_path / "validation" / name / "seen.txt").exists()
        for key, value in averages.get(name, {}).items():
            assert torch.equal(weights[key], value)
    lines = read_lines(tmp_path, "validation.jsonl")
    assert [line["step"] for line in lines] == [0, 4, 8]
    assert len({line["bias"] for line in lines}) == 3
    silent = make_trainer(tmp_path / "silent", ema_decay=0.5)
    silent.run()
    assert_same(trainer, silent)


@pytest.mark.parametrize("num_before", [3, 4, 5])
def test_validation_is_repeated_by_no_stop(tmp_path, num_before):
    make_trainer(tmp_path, validation_steps=4).run(max_steps=num_before)
    make_trainer(tmp_path, validation_steps=4).run(resume=True)
    assert [line["step"] for line in read_lines(tmp_path, "validation.jsonl")] == [0, 4, 8]


class UnluckyTask(NumbersTask):
    """Its second validation fails."""

    def validate(self, directory: Path) -> dict[str, float]:
        if directory.name == "step-00000004":
            raise StopError
        return super().validate(directory)


def test_a_validation_that_failed_is_done_again(tmp_path):
    with pytest.raises(StopError):
        make_trainer(tmp_path, UnluckyTask(), validation_steps=4).run()
    continued = make_trainer(tmp_path, validation_steps=4)
    continued.run(resume=True)
    assert [line["step"] for line in read_lines(tmp_path, "validation.jsonl")] == [0, 4, 8]
    straight = make_trainer(tmp_path / "straight", validation_steps=4)
    straight.run()
    assert_same(continued, straight)


@pytest.mark.parametrize("bad_step", [0, 3])
def test_nan_stops_and_keeps_the_last_good_step(tmp_path, bad_step):
    message = rf"loss is nan at step {bad_step + 1} \(samples {bad_step}/0, .*{bad_step}/7\)"
    with pytest.raises(NumericalError, match=message):
        make_trainer(tmp_path, NumbersTask(bad_step=bad_step)).run()
    assert (tmp_path / "checkpoints/latest").read_text() == f"step-{bad_step:08d}"
    continued = make_trainer(tmp_path, NumbersTask(seed=1))  # the sample is repaired
    continued.run(resume=True)
    straight = make_trainer(tmp_path / "straight")
    straight.run()
    assert_same(continued, straight)


class SteepTask(NumbersTask):
    """A finite loss with an infinite gradient."""

    def loss(self, batch: NumbersBatch, draw: Any) -> Tensor:
        output: Tensor = self.model(batch.inputs)[:, 0]
        error: Tensor = (output - output.detach()).abs().sqrt()
        return error


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    with pytest.raises(NumericalError, match="norm of the gradient is"):
        make_trainer(tmp_path, SteepTask()).run()


@pytest.mark.parametrize("is_on", [False, True])
def test_gradient_checkpointing_is_turned_on_where_asked(tmp_path, is_on):
    task = WindowsTask()
    make_trainer(tmp_path, task, gradient_checkpointing=is_on)
    assert task.model.is_gradient_checkpointing == is_on


def test_gradient_checkpointing_needs_a_model_that_has_it(tmp_path):
    with pytest.raises(ConfigError, match="Network has no gradient checkpointing"):
        make_trainer(tmp_path, gradient_checkpointing=True)


def test_bfloat16_is_near_float32_and_keeps_float32_weights(tmp_path):
    make_trainer(tmp_path / "float32").run()
    trainer = make_trainer(tmp_path / "bfloat16", precision="bfloat16")
    trainer.run()
    assert {value.dtype for value in trainer.model.parameters()} == {torch.float32}
    exact, rounded = losses(tmp_path / "float32"), losses(tmp_path / "bfloat16")
    assert rounded == pytest.approx(exact, rel=0.03)
    assert rounded != exact


def test_norms_in_float32_give_no_warning(tmp_path):
    class NormTask(NumbersTask):
        def loss(self, batch: NumbersBatch, draw: Any) -> Tensor:
            half = batch.inputs.bfloat16().requires_grad_()
            normed = self.norm(half).float()
            own: Tensor = normed.square().mean(dim=1) + super().loss(batch, draw)
            return own

        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.RMSNorm(self.width)

    make_trainer(tmp_path, NormTask(), precision="bfloat16").run(max_steps=2)


class OneAtATime(NumbersTask):
    """Refuses to read a micro-batch while another one waits to be used."""

    num_waiting = 0

    def load_batch(self, draw: Draw) -> NumbersBatch:
        assert self.num_waiting == 0
        self.num_waiting += 1
        return super().load_batch(draw)

    def loss(self, batch: NumbersBatch, draw: Draw) -> Tensor:
        self.num_waiting -= 1
        return super().loss(batch, draw)


def test_micro_batches_are_read_one_at_a_time(tmp_path):
    make_trainer(tmp_path, OneAtATime(), num_micro_batches=4).run()
    lines = read_lines(tmp_path)
    assert [line["num_replaced"] for line in lines] == [1] * STEPS  # all of a step are counted
    assert all(line["wait_seconds"] > 0 for line in lines)
