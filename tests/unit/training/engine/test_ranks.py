"""Several processes: they agree with one, divided or copied, and stop together."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from swifti2v.errors import ConfigError
from swifti2v.training.engine.averages import trained_weights
from swifti2v.training.engine.ranks import divide_model, join_ranks
from tests.helpers.regression import (
    ALONE,
    ROOT,
    AdapterTask,
    Network,
    NoisyNumbersTask,
    WindowsTask,
    losses,
    make_trainer,
    read_lines,
    run_in_subprocess,
)
from tests.helpers.training_clips import save_counting_clip


def launcher(num_ranks: int) -> tuple[object, ...]:
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks)


LAUNCHER = launcher(2)
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
        for run in (name, f"{name}/micro", f"{name}/synced", f"{name}/continued"):
            assert losses(two_ranks / run) == pytest.approx(alone, rel=1e-5)
        norms = [
            [line["grad_norm"] for line in read_lines(two_ranks / run)[:6]]
            for run in (name, "alone")
        ]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)

    def test_gradients_sent_once_a_step_are_those_sent_after_each_micro_batch(
        self, two_ranks, name
    ):
        once, each = (read_lines(two_ranks / name / run) for run in ("micro", "synced"))
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in once] == pytest.approx([s[key] for s in each], rel=1e-6)

    def test_a_float32_lora_on_a_bfloat16_base_is_that_of_one(self, two_ranks, name, tmp_path):
        alone = make_trainer(tmp_path, AdapterTask(), precision="bfloat16", num_micro_batches=2)
        alone.run(max_steps=6)
        own = losses(two_ranks / name / "adapter")
        assert own[0] == pytest.approx(losses(tmp_path)[0], rel=1e-6)
        assert own == pytest.approx(losses(tmp_path), rel=5e-4)
        trained = dict(trained_weights(alone.model))
        weights = torch.load(two_ranks / name / "adapter.pt")
        assert weights.keys() == trained.keys()
        start = dict(trained_weights(AdapterTask().model))
        for key, value in weights.items():
            assert value.dtype == torch.float32
            # Six steps of Adam move a weight by some .05; rounding of gradients turns few of them.
            assert (value - start[key]).norm() > 0
            error, change = (value - trained[key]).norm(), (trained[key] - start[key]).norm()
            assert error < 0.05 * change

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
def test_two_copies_on_two_ranks_each_are_one(tmp_path):
    make_trainer(tmp_path / "continued").run(max_steps=3)
    alone = make_trainer(tmp_path / "alone")
    alone.run(max_steps=6)
    run_in_subprocess("-W", "error", *launcher(4), SCRIPT, "hybrid", tmp_path)
    for run in ("hybrid", "continued"):
        assert losses(tmp_path / run) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    for name, value in torch.load(tmp_path / "hybrid.pt").items():
        torch.testing.assert_close(value, alone.model.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_ranks_share_the_looking_into_clips(tmp_path):
    names = [f"{number}.mkv" for number in range(6)]
    for name in names:
        save_counting_clip(tmp_path / name, 9)
    rows = [{"video": name, "prompt": "it brightens"} for name in names]
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_in_subprocess("-W", "error", *launcher(2), SCRIPT, "look", tmp_path)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [f"0:{n}" for n in names]
    indexes = list((tmp_path / "run" / "probes").glob("*.index.jsonl"))
    lines = [json.loads(line) for index in indexes for line in index.read_text().splitlines()]
    assert len(lines) == 2  # each rank wrote its own
    assert sum(len(line["entries"]) for line in lines) == len(names)  # none was read twice


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
