"""Checkpoints of a training: whole or not there, the last ones kept, damage told."""

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import UMT5Config, UMT5EncoderModel

from swifti2v.errors import ConfigError, LoadingError, StorageError
from swifti2v.training.engine.checkpoints import (
    CheckpointWriter,
    find_latest,
    load_tensors,
    read_state,
)
from swifti2v.training.engine.ranks import save_model
from tests.helpers.regression import (
    ALONE,
    ROOT,
    STEPS,
    TWO_PHASES,
    NoisyNumbersTask,
    NumbersTask,
    assert_same,
    losses,
    make_trainer,
    run_in_subprocess,
)
from tests.helpers.regression_killed import NUM_STEPS, make_long_trainer


def tensors(value: float, num_blocks: int = 2) -> dict[str, Any]:
    blocks = {f"block{k}": torch.full((2, 3), value + k) for k in range(num_blocks)}
    return {"model": blocks, "optimizer": {"state": {}, "groups": [{"lr": value}]}, "average": {}}


def save(directory: Path, step: int, num_kept: int = 2, is_async: bool = False) -> Path:
    writer = CheckpointWriter(directory, ALONE, num_kept, is_async=is_async)
    writer.save(step, tensors(step), {"step": step})
    writer.finish()
    return directory / f"step-{step:08d}"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    assert find_latest(tmp_path) is None
    path = save(tmp_path, 7)
    assert find_latest(tmp_path) == path == tmp_path / "step-00000007"
    assert read_state(path) == {"step": 7}
    loaded = tensors(0)
    load_tensors(path, loaded, ALONE)
    assert torch.equal(loaded["model"]["block1"], torch.full((2, 3), 8.0))
    assert loaded["optimizer"] == {"state": {}, "groups": [{"lr": 7}]}


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(steps=st.lists(st.integers(0, 6), min_size=1, max_size=8), num_kept=st.integers(1, 3))
def test_the_newest_is_never_removed(tmp_path_factory, steps, num_kept):
    """Also after going back to an older one and on from there."""
    directory = tmp_path_factory.mktemp("checkpoints")
    for step in steps:
        path = save(directory, step, num_kept)
        assert find_latest(directory) == path
        assert read_state(path) == {"step": step}
        earlier = [name for name in names(directory) if "step-" in name and name < path.name]
        assert len(earlier) <= num_kept - 1
        assert not list(directory.glob("*.writing"))
    rising = sorted(set(steps))
    if rising == steps:
        assert names(directory) == ["latest", *(f"step-{s:08d}" for s in rising[-num_kept:])]


def test_weights_may_change_while_a_checkpoint_is_written(tmp_path):
    writer, own = CheckpointWriter(tmp_path, ALONE, 2, is_async=True), tensors(1)
    for step in (1, 2):  # the second one reuses the first one's copy
        own["model"]["block0"].fill_(step)
        writer.save(step, own, {"step": step})
        own["model"]["block0"].fill_(-1)
    writer.finish()
    for step in (1, 2):
        loaded = tensors(0)
        load_tensors(tmp_path / f"step-{step:08d}", loaded, ALONE)
        assert torch.equal(loaded["model"]["block0"], torch.full((2, 3), float(step)))
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_a_checkpoint_is_in_place_as_soon_as_it_is_asked_after_its_end(tmp_path):
    writer = CheckpointWriter(tmp_path, ALONE, 2, is_async=True)
    writer.save(3, tensors(3), {"step": 3})
    end = time.monotonic() + 30
    while find_latest(tmp_path) is None:
        writer.poll()
        assert time.monotonic() < end
        time.sleep(0.01)
    assert names(tmp_path) == ["latest", "step-00000003"]
    writer.finish()  # nothing is left to do


@settings(max_examples=8, deadline=None)
@given(
    stops=st.lists(st.integers(1, STEPS - 1), min_size=1, max_size=2),
    checkpoint_steps=st.sampled_from([None, 1, 3]),
    is_async=st.booleans(),
)
def test_a_run_that_is_stopped_anywhere_ends_as_one_that_is_not(
    tmp_path_factory, stops, checkpoint_steps, is_async
):
    directory = tmp_path_factory.mktemp("runs")
    straight = make_trainer(directory / "straight", checkpoint_minutes=None)
    straight.run()
    how: Any = {"checkpoint_steps": checkpoint_steps, "async_checkpoints": is_async}
    for stop in sorted(stops):
        make_trainer(directory / "stopped", **how).run(resume=True, max_steps=stop)
    continued = make_trainer(directory / "stopped", NumbersTask(seed=1), **how)
    continued.run(resume=True)
    assert_same(continued, straight)


def test_the_last_ones_are_kept(tmp_path):
    make_trainer(tmp_path, checkpoint_steps=2, num_checkpoints=3).run(max_steps=9)
    assert names(tmp_path / "checkpoints") == [
        "latest",
        *(f"step-{step:08d}" for step in (6, 8, 9)),
    ]


def test_what_an_interrupted_save_left_is_overwritten(tmp_path):
    (tmp_path / "step-00000003.writing").mkdir(parents=True)
    (tmp_path / "step-00000003.writing" / "__0_0.distcp").write_bytes(b"half")
    assert find_latest(tmp_path) is None
    save(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step-00000003"]


@contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """No file can be larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    wide: Any = {"width": 100}
    make_trainer(tmp_path, NumbersTask(**wide)).run(max_steps=4)
    trainer = make_trainer(tmp_path, NumbersTask(**wide), checkpoint_steps=2)
    with small_disk(60_000), pytest.raises(StorageError, match="File too large") as caught:
        trainer.run(resume=True)
    message = str(caught.value)
    assert "step-00000006 cannot be written" in message
    assert "--resume" in message
    assert "\n" not in message
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000004"
    continued = make_trainer(tmp_path, NumbersTask(seed=1, **wide))
    continued.run(resume=True)
    straight = make_trainer(tmp_path / "straight", NumbersTask(**wide))
    straight.run()
    assert_same(continued, straight)


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(StorageError, match=r"step-00000010 cannot be written"):
        make_trainer(tmp_path).run()


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20] if path.suffix != ".json" else b"{")


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json"])
@pytest.mark.parametrize("is_gone", [True, False])
def test_a_damaged_checkpoint_is_refused(tmp_path, name, is_gone):
    make_trainer(tmp_path).run(max_steps=3)
    path = tmp_path / "checkpoints" / "step-00000003"
    if is_gone:
        (path / name).unlink()
    else:
        damage(path / name)
    with pytest.raises(LoadingError, match=r"step-00000003.*damaged") as caught:
        make_trainer(tmp_path).run(resume=True)
    assert "\n" not in str(caught.value)


def test_latest_may_name_an_older_one(tmp_path):
    make_trainer(tmp_path, checkpoint_steps=3).run(max_steps=7)
    (tmp_path / "checkpoints/latest").write_text("step-00000006\n")
    continued = make_trainer(tmp_path, NumbersTask(seed=1), num_checkpoints=1)
    continued.run(resume=True)
    straight = make_trainer(tmp_path / "straight")
    straight.run()
    assert_same(continued, straight)


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_another_model_is_refused(tmp_path, num_blocks):
    path = save(tmp_path, 1)
    with pytest.raises(LoadingError, match=r"of another model.*latest") as caught:
        load_tensors(path, tensors(0, num_blocks), ALONE)
    assert f"block{max(num_blocks, 2) - 1}" in str(caught.value)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    make_trainer(tmp_path).run(max_steps=3)
    with pytest.raises(LoadingError, match="batch_size 8 in phase 1; this one has 4"):
        make_trainer(tmp_path, batch_size=4).run(resume=True)
    for task in (NumbersTask(width=5), NumbersTask(num_blocks=3), NumbersTask(num_blocks=1)):
        with pytest.raises(LoadingError, match="cannot be continued from"):
            make_trainer(tmp_path, task).run(resume=True)
    with pytest.raises(LoadingError, match="average"):
        make_trainer(tmp_path, ema_decay=None).run(resume=True)
    make_trainer(tmp_path / "two", phases=TWO_PHASES).run()
    with pytest.raises(LoadingError, match="in phase 3"):
        make_trainer(tmp_path / "two").run(resume=True)
    continued = make_trainer(tmp_path)  # refusals changed nothing
    continued.run(resume=True)
    straight = make_trainer(tmp_path / "straight")
    straight.run()
    assert_same(continued, straight)


def test_a_number_of_ranks_that_does_not_divide_the_batch_is_refused(tmp_path):
    make_trainer(tmp_path).run(max_steps=3)
    three = replace(ALONE, world_size=3)
    with pytest.raises(ConfigError, match=r"batch_size 8 .* 3 ranks; change .* number of ranks"):
        make_trainer(tmp_path, ranks=three)


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    make_trainer(tmp_path).run(max_steps=3)
    path = tmp_path / "checkpoints/step-00000003/state.json"
    state = json.loads(path.read_text())
    del state["noise_levels"]
    path.write_text(json.dumps(state))
    with pytest.raises(LoadingError, match="step-00000003 lacks noise_levels: another version"):
        make_trainer(tmp_path).run(resume=True)


def test_noise_levels_are_counted_through_stops(tmp_path):
    straight = make_trainer(tmp_path / "straight", NoisyNumbersTask())
    straight.run()
    for num_steps in (1, 4, 10):
        stopped = make_trainer(tmp_path / "stopped", NoisyNumbersTask(), num_micro_batches=2)
        stopped.run(resume=True, max_steps=num_steps)
        assert stopped.noise_levels.counts.sum() == 8 * num_steps
    files = [tmp_path / name / "noise_levels.json" for name in ("straight", "stopped")]
    assert files[0].read_text() == files[1].read_text()
    written = json.loads(files[0].read_text())
    assert written == {"step": 10, "counts": straight.noise_levels.to_dict()}
    make_trainer(tmp_path / "none").run(max_steps=1)
    assert not (tmp_path / "none" / "noise_levels.json").exists()


def test_weights_that_cannot_be_written_are_told_and_can_be_written_later(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UMT5EncoderModel(UMT5Config(vocab_size=64, d_model=64, d_ff=64, num_layers=1))
    with small_disk(10_000), pytest.raises(StorageError, match=r"out cannot be written.*--resume"):
        save_model(UMT5EncoderModel, model, tmp_path / "out", ALONE)
    save_model(UMT5EncoderModel, model, tmp_path / "out", ALONE)
    again = UMT5EncoderModel.from_pretrained(tmp_path / "out")
    assert torch.equal(again.shared.weight, model.shared.weight)


def frozen_task() -> NumbersTask:
    task = NumbersTask()
    task.model.blocks.requires_grad_(False)
    task.model.out.bias.requires_grad_(False)
    return task


def test_frozen_weights_are_neither_averaged_nor_saved(tmp_path):
    straight = make_trainer(tmp_path / "straight", frozen_task())
    straight.run()
    assert straight.average.weights.keys() == {"out.weight"}
    make_trainer(tmp_path / "stopped", frozen_task()).run(max_steps=5)
    state = FileSystemReader(tmp_path / "stopped/checkpoints/step-00000005").read_metadata()
    tensors = {name for name in state.state_dict_metadata if "param_groups" not in name}
    assert tensors == {
        "model.out.weight",
        "average.out.weight",
        *(f"optimizer.state.out.weight.{name}" for name in ("step", "exp_avg", "exp_avg_sq")),
    }
    continued = make_trainer(tmp_path / "stopped", frozen_task())
    continued.run(resume=True)
    assert_same(continued, straight)
    start = NumbersTask().model.state_dict()
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, start[name]) == (name != "out.weight")
    nothing = NumbersTask()
    nothing.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no weight of the model can be trained"):
        make_trainer(tmp_path / "nothing", nothing)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use the subprocesses' number of threads, which decides the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path, one_thread):
    """SIGKILL at any time, also while a checkpoint is written."""
    script = ROOT / "tests/helpers/regression_killed.py"
    result = json.loads(run_in_subprocess(script, tmp_path / "killed"))
    assert result == {"in_save": 2, "anywhere": 2, "status": 0}
    straight = make_long_trainer(tmp_path / "straight")
    straight.run()
    killed = make_long_trainer(tmp_path / "killed", seed=1)
    killed.run(resume=True, max_steps=NUM_STEPS)
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, killed.model.state_dict()[name])
        assert torch.equal(straight.average.weights[name], killed.average.weights[name])
