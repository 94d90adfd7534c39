"""Models that stay loaded, within a budget."""

from pathlib import Path

import pytest

from swifti2v.jobs.load import load, weight_bytes
from swifti2v.jobs.loaded_models import LoadedModels
from swifti2v.jobs.request import ClipRequest
from swifti2v.jobs.resolve import Resolved, resolve
from tests.helpers.command_line import copy_model, save_photo
from tests.helpers.tiny import SIZE


@pytest.fixture
def ask(model, tmp_path):
    photo = save_photo(tmp_path / "photo.png", SIZE, SIZE)

    def resolve_for(name: str) -> Resolved:
        other = copy_model(model, tmp_path / name)
        return resolve(
            ClipRequest(
                command="generate",
                output=Path("out.mp4"),
                image=photo,
                prompt="zoom",
                model=str(other),
                seed=1,
            )
        )

    return resolve_for


@pytest.mark.slow
def test_the_least_recently_used_model_leaves(ask, tmp_path):
    a, b, c = (ask(name) for name in "abc")
    size = weight_bytes(load(a).components)
    models = LoadedModels(2 * size + size // 2)
    first = models.get(a)
    assert models.get(b) is not first
    assert models.get(a) is first
    models.get(c)
    assert [Path(name).name for name in models.names] == ["a", "c"]
    assert models.get(a) is first


def test_a_model_over_the_budget_is_held_alone(ask):
    models = LoadedModels(1)
    first = models.get(ask("a"))
    assert models.get(ask("a")) is first
    models.get(ask("b"))
    assert len(models.names) == 1
