import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.command_line import (
    LOSSLESS,
    assert_same_frames,
    error_line,
    frames_of,
    generate,
    save_photo,
    succeed,
    swifti2v,
)
from tests.helpers.tiny import tiny_pipeline


@pytest.mark.slow
@pytest.mark.parametrize("num_finished", range(5))
def test_a_resumed_run_gives_the_same_video(model, photo, tmp_path, num_finished):
    whole, resumed, work = tmp_path / "whole.mkv", tmp_path / "resumed.mkv", tmp_path / "work"
    succeed(generate(model, photo, whole, *LOSSLESS, "--work-dir", work))
    for file in sorted(work.glob("segment_*"))[num_finished:]:
        file.unlink()
    (work / "segment_0003.safetensors.writing").write_bytes(b"half")
    if num_finished == 0:
        (work / "motion_reference.safetensors").unlink()

    result = succeed(
        generate(model, photo, resumed, *LOSSLESS, "--work-dir", work, "--resume", "--json")
    )

    assert_same_frames(resumed, whole)
    assert len(json.loads(result.stdout)["segments"]) == 4
    assert sorted(file.name for file in work.iterdir()) == [
        "conditions.safetensors",
        "motion_reference.safetensors",
        "plan.json",
        *(f"segment_{index:04d}.safetensors" for index in range(4)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("damages_motion", [False, True])
def test_displacement_is_resumed_with_the_motion_reference(photo, tmp_path, damages_motion):
    """Detail is carried along it, so that another one would be seen."""
    pipe = tiny_pipeline(displaces=True)
    torch.nn.init.normal_(pipe.stage1.transformer.proj_out.bias, std=0.5)
    model, work = tmp_path / "model", tmp_path / "work"
    pipe.save_pretrained(model)
    carried = (*LOSSLESS, "--set", "stage2.reference_detail=carried", "--work-dir", work)
    succeed(generate(model, photo, tmp_path / "whole.mkv", *carried))
    stored = work / "motion_reference.safetensors"
    content = stored.read_bytes()
    assert load_file(stored)["displacement"].abs().max() > 0.5
    (work / "segment_0002.safetensors").unlink()
    if damages_motion:
        stored.write_bytes(content[:-1])

    result = succeed(generate(model, photo, tmp_path / "b.mkv", *carried, "--resume"))

    assert ("motion_reference.safetensors is damaged" in result.stderr) == damages_motion
    assert stored.read_bytes() == content
    assert_same_frames(tmp_path / "b.mkv", tmp_path / "whole.mkv")


def test_a_damaged_segment_is_made_again_with_a_note(model, photo, tmp_path):
    whole, work = tmp_path / "whole.mkv", tmp_path / "work"
    succeed(generate(model, photo, whole, *LOSSLESS, "--work-dir", work))
    damaged = work / "segment_0001.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-7])

    result = succeed(
        generate(model, photo, tmp_path / "b.mkv", *LOSSLESS, "--work-dir", work, "--resume")
    )

    assert "segment_0001.safetensors is damaged" in result.stderr
    assert damaged.read_bytes() == content
    assert_same_frames(tmp_path / "b.mkv", whole)


def test_a_run_from_before_a_setting_came_is_continued(model, photo, tmp_path):
    whole, work = tmp_path / "whole.mkv", tmp_path / "work"
    succeed(generate(model, photo, whole, *LOSSLESS, "--work-dir", work))
    plan = json.loads((work / "plan.json").read_text())
    for stage in ("stage1", "stage2"):
        assert plan["config"][stage]["sampling"].pop("rule") == "euler"
        assert plan["config"][stage]["sampling"].pop("sigmas") is None
    (work / "plan.json").write_text(json.dumps(plan))
    (work / "segment_0003.safetensors").unlink()
    resume = ("--work-dir", work, "--resume")
    message = error_line(
        generate(model, photo, tmp_path / "b.mkv", *resume, "--set", "stage2.sampling.rule=renoise")
    )
    assert "config.stage2.sampling.rule is 'euler' there and 'renoise' now" in message
    succeed(generate(model, photo, tmp_path / "b.mkv", *LOSSLESS, *resume))
    assert_same_frames(tmp_path / "b.mkv", whole)


@pytest.mark.slow
def test_resume_takes_the_seed_of_the_run(model, photo, tmp_path):
    work = tmp_path / "work"
    run = ("generate", photo, "-p", "zoom", "--model", model, "--work-dir", work, "--json")
    first = succeed(swifti2v(*run, "-o", tmp_path / "a.mp4"))

    again = succeed(swifti2v(*run, "-o", tmp_path / "b.mp4", "--resume"))

    assert json.loads(again.stdout)["seed"] == json.loads(first.stdout)["seed"]


@pytest.mark.slow
def test_a_work_dir_is_refused_where_it_is_of_another_run(model, photo, tmp_path):
    work, output = tmp_path / "work", tmp_path / "out.mp4"
    succeed(generate(model, photo, output, "--work-dir", work))
    output.unlink()

    resume = ("--work-dir", work, "--resume")
    assert "--resume" in error_line(generate(model, photo, output, "--work-dir", work))
    assert "seed is 7" in error_line(generate(model, photo, output, *resume, "--seed", 8))
    assert "config.stage2.context_size is 1" in error_line(
        generate(model, photo, output, *resume, "--context-size", 0)
    )
    plan = work / "plan.json"
    stored = json.loads(plan.read_text())
    plan.write_text(json.dumps({k: v for k, v in stored.items() if k != "sampling_version"}))
    assert "sampling_version is None there and 2 now" in error_line(
        generate(model, photo, output, *resume)
    )
    plan.write_text(json.dumps(stored))
    save_photo(photo, 70, 70)
    assert "image.sha256" in error_line(generate(model, photo, output, *resume))
    assert not output.exists()


def start_process(model: Path, photo: Path, output: Path, work: Path) -> subprocess.Popen[str]:
    """A run with steps enough to be met in the middle."""
    arguments = ["generate", photo, "-p", "zoom", "-o", output, "--model", model, "--seed", 7]
    arguments += [*LOSSLESS, "--steps", 100, "--work-dir", work]
    command = [sys.executable, "-c", "from swifti2v.cli import app; app()", *map(str, arguments)]
    process = subprocess.Popen(command, text=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (work / "segment_0000.safetensors").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_process_is_continued_to_the_same_video(model, photo, tmp_path, number):
    output, work = tmp_path / "out.mkv", tmp_path / "work"
    process = start_process(model, photo, output, work)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)

    assert not (work / "segment_0003.safetensors").exists()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        said = errors.split("interrupted: ")[1]
        if said.startswith("no video was written yet; 1 of 4 segments are finished"):
            assert not output.exists()  # it was met between the latents and the frames of a segment
        else:
            kept = int(said.split(" of 4 segments")[0])
            assert len(frames_of(output)) == 4 * kept + 1
    more = (*LOSSLESS, "--steps", 100)
    succeed(generate(model, photo, output, *more, "--work-dir", work, "--resume"))
    succeed(generate(model, photo, tmp_path / "whole.mkv", *more))
    assert_same_frames(output, tmp_path / "whole.mkv")
