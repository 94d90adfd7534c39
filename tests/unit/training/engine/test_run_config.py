"""Settings of any training: what cannot work is refused, budgets are counted."""

import pytest

from swifti2v.errors import ConfigError
from swifti2v.training.engine.run_config import PhaseConfig, RunConfig


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batch_size": 0}, "run.batch_size is 0"),
        ({"num_micro_batches": 0}, "run.num_micro_batches is 0"),
        ({"num_checkpoints": 0}, "run.num_checkpoints is 0"),
        ({"num_replicas": 0}, "run.num_replicas is 0"),
        ({"checkpoint_steps": 0}, "run.checkpoint_steps is 0"),
        ({"checkpoint_minutes": -1.0}, "run.checkpoint_minutes is -1"),
        ({"validation_steps": 0}, "run.validation_steps is 0"),
        ({"ema_decay": 1.0}, "run.ema_decay is 1.0"),
        ({"num_workers": -1}, "run.num_workers is -1"),
        ({"seed": -1}, "run.seed is -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, match):
    with pytest.raises(ConfigError, match=match):
        RunConfig(**change)


@pytest.mark.parametrize("budget", [{}, {"steps": 1, "minutes": 1.0}, {"steps": 0}])
def test_a_phase_has_one_budget(budget):
    with pytest.raises(ConfigError, match="phase main"):
        PhaseConfig(**budget)


def test_progress_is_the_used_part_of_the_budget():
    assert PhaseConfig(steps=8).progress(2, 999.0) == 0.25
    assert PhaseConfig(minutes=2.0).progress(999, 30.0) == 0.25
