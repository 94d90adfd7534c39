import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from swifti2v.errors import InputError, MediaError
from swifti2v.jobs.work_dir import WorkDir
from swifti2v.pipelines.transition import MotionReference

PLAN: dict[str, Any] = {
    "seed": 1,
    "prompt": "zoom",
    "config": {"num_frames": 17, "stage2": {"segment_size": 3}},
}

plans = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3),
    max_leaves=6,
)


def latents(seed: int, num_frames: int = 3) -> torch.Tensor:
    return torch.randn(1, 4, num_frames, 2, 2, generator=torch.Generator().manual_seed(seed))


def started(path: Path, plan: Mapping[str, Any] = PLAN, resume: bool = False) -> WorkDir:
    work_dir = WorkDir(path, resume=resume)
    work_dir.require_same(plan)
    work_dir.start(plan)
    return work_dir


def test_nothing_is_made_before_the_start(tmp_path):
    WorkDir(tmp_path / "run", resume=False).require_same(PLAN)

    assert list(tmp_path.iterdir()) == []


def test_latents_and_motion_reference_come_back_exactly(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    work_dir = started(tmp_path / "run")
    work_dir.save_motion_reference(MotionReference(frames))
    work_dir.save_segment(0, latents(0))
    work_dir.save_segment(2, latents(2)[..., ::2])

    again = started(tmp_path / "run", resume=True)

    motion = again.load_motion_reference()
    assert motion is not None
    np.testing.assert_array_equal(motion.frames, frames)
    assert motion.displacement is None
    for index, expected in ((0, latents(0)), (2, latents(2)[..., ::2])):
        stored = again.load_segment(index)
        assert stored is not None
        assert torch.equal(stored, expected)
    assert again.load_segment(1) is None


@settings(max_examples=30, deadline=None)
@given(plan=st.dictionaries(st.sampled_from(["seed", "prompt", "config"]), plans, min_size=1))
def test_a_plan_equals_itself_after_storing(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("work") / "run"
    started(path, plan)

    WorkDir(path, resume=True).require_same(plan)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({**PLAN, "seed": 2}, "seed is 1 there and 2 now"),
        ({**PLAN, "prompt": "pan"}, "prompt is 'zoom' there and 'pan' now"),
        ({**PLAN, "fit": "pad"}, "fit is None there and 'pad' now"),
        ({"seed": 1, "prompt": "zoom"}, "config is .* there and None now"),
        (
            {**PLAN, "config": {"num_frames": 17, "stage2": {"segment_size": 4}}},
            "config.stage2.segment_size is 3 there and 4 now",
        ),
    ],
)
def test_another_plan_is_refused_by_the_field_that_differs(tmp_path, changed, named):
    started(tmp_path / "run")

    with pytest.raises(InputError, match=named):
        WorkDir(tmp_path / "run", resume=True).require_same(changed)


def test_a_run_is_not_overwritten_without_resume(tmp_path):
    started(tmp_path / "run")

    with pytest.raises(InputError, match="--resume"):
        WorkDir(tmp_path / "run", resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_files_is_refused(tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("")

    with pytest.raises(InputError, match=r"no plan\.json"):
        WorkDir(tmp_path, resume=resume)


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("")

    with pytest.raises(InputError, match="is a file"):
        WorkDir(tmp_path / "run", resume=False)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3"])
def test_a_damaged_plan_is_refused(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)

    with pytest.raises(InputError, match=r"plan\.json"):
        WorkDir(tmp_path, resume=True)


def test_files_half_written_by_a_killed_run_are_cleared(tmp_path):
    (tmp_path / "plan.json.writing").write_text("{")

    started(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert json.loads((tmp_path / "plan.json").read_text()) == PLAN


@settings(max_examples=30, deadline=None)
@given(place=st.integers(0, 10**6), keep=st.booleans(), value=st.integers(1, 255))
def test_any_damage_to_a_segment_is_found(tmp_path_factory, place, keep, value):
    check_damage(tmp_path_factory.mktemp("work"), place, keep, value)


@pytest.mark.parametrize(("text", "flip"), [(b"tensor", 1), (b"F32", ord("F") ^ ord("I"))])
def test_damage_to_a_name_or_a_type_is_found(tmp_path, text, flip):
    started(tmp_path).save_segment(0, latents(0))
    content = (tmp_path / "segment_0000.safetensors").read_bytes()
    assert check_damage(tmp_path / "again", content.index(text), True, flip) is None


def test_a_segment_of_an_older_version_is_read(tmp_path):
    work_dir = started(tmp_path)
    digest = hashlib.sha256(latents(0).numpy().tobytes()).hexdigest()
    save_file({"tensor": latents(0)}, tmp_path / "segment_0000.safetensors", {"sha256": digest})
    stored = work_dir.load_segment(0)
    assert stored is not None
    assert torch.equal(stored, latents(0))


def check_damage(folder: Path, place: int, keep: bool, value: int) -> torch.Tensor | None:
    work_dir = started(folder)
    work_dir.save_segment(0, latents(0))
    path = work_dir.directory / "segment_0000.safetensors"
    content = bytearray(path.read_bytes())
    place %= len(content)
    if keep:
        content[place] ^= value
    path.write_bytes(content if keep else content[:place])

    # A changed byte may fall on padding or on a name that is not read: then nothing is lost.
    stored = work_dir.load_segment(0)
    assert stored is None or torch.equal(stored, latents(0))
    return stored


def test_a_damaged_segment_is_deleted_with_a_note(tmp_path, caplog):
    work_dir = started(tmp_path)
    work_dir.save_segment(0, latents(0))
    path = tmp_path / "segment_0000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    assert work_dir.load_segment(0) is None
    assert not path.exists()
    assert "segment_0000.safetensors is damaged" in caplog.text


def test_a_directory_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises((MediaError, InputError), match="file"):
        started(tmp_path / "file" / "run")
