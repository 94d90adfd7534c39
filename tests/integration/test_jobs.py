"""One clip from a request to a file, as a server or a batch would ask for it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swifti2v.errors import ConfigError, InputError
from swifti2v.jobs.check import check
from swifti2v.jobs.load import load
from swifti2v.jobs.request import ClipRequest
from swifti2v.jobs.resolve import resolve
from swifti2v.jobs.run import run
from swifti2v.pipelines.progress import Progress
from tests.helpers.command_line import LOSSLESS, assert_same_frames, generate, save_clip, succeed
from tests.helpers.tiny import NUM_FRAMES


def ask(model: Path, photo: Path, output: Path, **more: Any) -> ClipRequest:
    return ClipRequest(
        command="generate",
        output=output,
        image=photo,
        model=str(model),
        codec="ffv1",
        **{"prompt": "zoom", "seed": 7, **more},
    )


@pytest.mark.slow
def test_one_pipeline_makes_many_clips(model, photo, tmp_path):
    pipe = load(resolve(ask(model, photo, tmp_path / "first.mkv")))
    for seed, name in ((7, "a.mkv"), (8, "other.mkv"), (7, "b.mkv")):
        run(check(resolve(ask(model, photo, tmp_path / name, seed=seed)), pipe))

    succeed(generate(model, photo, tmp_path / "alone.mkv", *LOSSLESS))
    assert_same_frames(tmp_path / "a.mkv", tmp_path / "alone.mkv")
    assert_same_frames(tmp_path / "b.mkv", tmp_path / "alone.mkv")


def test_progress_and_segments_are_told_and_the_account_names_the_file(model, photo, tmp_path):
    resolved = resolve(ask(model, photo, tmp_path / "a.mkv"))
    steps: list[Progress] = []
    segments: list[int] = []
    report = run(check(resolved, load(resolved)), steps.append, lambda s: segments.append(s.index))
    assert segments == [0, 1, 2, 3]
    assert {step.stage for step in steps} == {"stage1", "stage2"}
    assert (report.output, report.num_frames) == (str(tmp_path / "a.mkv"), NUM_FRAMES)


def test_a_later_layer_wins_and_errors_name_the_source(model, photo, tmp_path):
    layers = (("site.yaml", {"fps": 20, "stage2": {"context_size": 0}}), ("request", {"fps": 24}))
    config = resolve(ask(model, photo, tmp_path / "a.mkv", layers=layers)).settings.config
    assert (config.fps, config.stage2.context_size) == (24, 0)
    layers = (("site.yaml", {"fps": 20}), ("request", {"fps": 0}))
    with pytest.raises(ConfigError, match=r"^request: fps is 0"):
        resolve(ask(model, photo, tmp_path / "a.mkv", layers=layers))


def test_a_request_without_its_inputs_is_refused(model, photo, tmp_path):
    for command in ("generate", "refine", "upscale"):
        with pytest.raises(InputError, match="a photo or a clip is missing"):
            resolve(ClipRequest(command=command, output=tmp_path / "a.mkv", model=str(model)))


def test_a_run_to_continue_takes_its_segments_from_the_work_dir(model, photo, tmp_path):
    more: dict[str, Any] = {"work_dir": tmp_path / "work"}
    first = resolve(ask(model, photo, tmp_path / "a.mkv", **more))
    pipe = load(first)
    run(check(first, pipe))
    (tmp_path / "work/segment_0003.safetensors").unlink()
    again = ask(model, photo, tmp_path / "b.mkv", seed=None, resume=True, **more)
    steps: list[Progress] = []
    run(check(resolve(again), pipe), steps.append)
    assert {(step.stage, step.segment) for step in steps} == {("stage2", 3)}
    assert_same_frames(tmp_path / "a.mkv", tmp_path / "b.mkv")


def test_upscaling_needs_stage_2_alone(model, tmp_path):
    clip = save_clip(tmp_path / "clip.mkv", NUM_FRAMES)
    request = ClipRequest(
        command="upscale", output=tmp_path / "out.mkv", motion=clip, model=str(model), seed=1
    )
    resolved = resolve(request)
    assert resolved.settings.image == resolved.settings.motion
    job = check(resolved, load(resolved))
    np.testing.assert_array_equal(job.motion, resolved.motion)
    assert run(job).num_frames == NUM_FRAMES
