"""Several processes: they agree with one, divided or copied, and stop together."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from swifti2v.errors import ConfigError
from swifti2v.training.engine.ranks import divide_model, join_ranks
from tests.helpers.regression import (
    ALONE,
    ROOT,
    Network,
    NoisyNumbersTask,
    WindowsTask,
    losses,
    make_trainer,
    read_lines,
    run_in_subprocess,
)

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
SCRIPT = ROOT / "tests/helpers/regression_ranks.py"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes, and of one to compare with; see ``regression_ranks.py``."""
    directory = tmp_path_factory.mktemp("ranks")
    for name in ("sharded", "replicated"):
        make_trainer(directory / name / "continued").run(max_steps=3)
    make_trainer(directory / "alone").run()
    for name in ("sharded", "replicated"):
        run_in_subprocess("-W", "error", *LAUNCHER, SCRIPT, "train", directory / name)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded", "replicated"])
class TestTwoRanks:
    def test_validation_and_noise_levels_are_those_of_one(self, two_ranks, name, tmp_path):
        make_trainer(tmp_path, NoisyNumbersTask(), validation_steps=4).run(max_steps=6)
        lines = [read_lines(at, "validation.jsonl") for at in (tmp_path, two_ranks / name)]
        assert [line["step"] for line in lines[1]] == [0, 4]
        for own, other in zip(*lines, strict=True):
            assert own["bias"] == pytest.approx(other["bias"], rel=1e-5)
            assert own["output"] == pytest.approx(other["output"], rel=1e-5)
        for seen in (two_ranks / name).glob("validation/*/seen.txt"):
            assert seen.read_text() == "measured\n"  # by one of them
        levels = (tmp_path / "noise_levels.json").read_text()
        assert json.loads(levels)["step"] == 6
        assert (two_ranks / name / "noise_levels.json").read_text() == levels

    def test_losses_are_those_of_one(self, two_ranks, name):
        alone = losses(two_ranks / "alone")[:6]
        for run in (name, f"{name}/micro", f"{name}/continued"):
            assert losses(two_ranks / run) == pytest.approx(alone, rel=1e-5)
        norms = [
            [line["grad_norm"] for line in read_lines(two_ranks / run)[:6]]
            for run in (name, "alone")
        ]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)

    def test_losses_in_bfloat16_are_those_of_one(self, two_ranks, name, tmp_path):
        """Losses of one rank that divides a step as two do: gradients are rounded piece by piece.

        Rounding inputs to bfloat16, as FSDP does by default, changes the first loss by 0.2%.
        """
        make_trainer(tmp_path, WindowsTask(), precision="bfloat16", num_micro_batches=2).run(
            max_steps=6
        )
        own, alone = losses(two_ranks / name / "windows"), losses(tmp_path)
        assert own[0] == pytest.approx(alone[0], rel=1e-6)
        # Shards sum the norm in another order, and bfloat16 makes more of the last bit.
        assert own == pytest.approx(alone, rel=5e-4)

    def test_a_checkpoint_of_two_continues_on_one(self, two_ranks, name, tmp_path):
        copy = shutil.copytree(two_ranks / name, tmp_path / name)
        make_trainer(copy, NoisyNumbersTask(seed=1)).run(resume=True)
        assert losses(copy) == pytest.approx(losses(two_ranks / "alone"), rel=1e-5)

    def test_all_stop_when_one_has_no_finite_loss(self, two_ranks, name):
        latest = two_ranks / name / "bad" / "checkpoints" / "latest"
        assert latest.read_text() == "step-00000003"
        for rank, samples in ((0, "3/0, 3/1, 3/2, 3/3"), (1, "3/4, 3/5, 3/6, 3/7")):
            message = (two_ranks / name / f"bad-{rank}.txt").read_text()
            assert "loss is nan at step 4" in message
            assert samples in message


@pytest.mark.slow
def test_all_end_when_one_fails_alone(tmp_path):
    """It saves nothing: the others would not take part."""
    message = run_in_subprocess(*LAUNCHER, SCRIPT, "fail", tmp_path, code=1)
    assert "a file cannot be read" in message
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000004"


def test_replicas_need_ranks():
    with (
        pytest.raises(ConfigError, match="num_replicas is 2 but this is one process"),
        join_ranks(torch.device("cpu"), 2),
    ):
        pass


def test_a_launcher_of_ranks_that_do_not_divide_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with (
        pytest.raises(ConfigError, match="num_replicas is 2; it must divide the 3 ranks"),
        join_ranks(torch.device("cpu"), 2),
    ):
        pass


def test_a_process_alone_keeps_its_weights_whole():
    model = Network()
    divide_model(model, ALONE)
    assert {(type(v), v.dtype) for v in model.parameters()} == {(torch.nn.Parameter, torch.float32)}
    assert ALONE.is_first
    assert ALONE.mean(torch.tensor(3.0)) == 3
    ALONE.wait()
    with join_ranks(torch.device("cpu")) as ranks:
        assert ranks == ALONE
