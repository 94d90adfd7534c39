"""Stage I in pieces: each goes on from the one before, and has the prompt that holds then."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from swifti2v.config import GenerationConfig
from swifti2v.errors import CancelledError, ConfigError, PromptError
from swifti2v.jobs.settings import read_settings
from swifti2v.jobs.work_dir import WorkDir
from swifti2v.media import frames_to_video, image_to_tensor, video_to_frames
from swifti2v.models.vae.streaming import StreamingEncoder
from swifti2v.pipelines.camera_moves import SHIFT
from swifti2v.pipelines.course import draw_course
from swifti2v.pipelines.displacement import enlarge, go_on_from, move_photo
from swifti2v.pipelines.progress import Progress, Stopwatch
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from tests.helpers.command_line import assert_same_frames, generate, succeed, swifti2v
from tests.helpers.tiny import SIZE, tiny_pipeline

SEED = 5
LOW = SIZE // 4


@pytest.fixture(scope="module")
def pipe() -> SwiftI2VPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def image() -> Image.Image:
    y, x = np.mgrid[:SIZE, :SIZE]
    waves = [np.sin(x / 9) * np.cos(y / 7), np.sin(x / 8 + y / 6), np.cos(x / 9)]
    return Image.fromarray((127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8))


def run_stage1(pipe: SwiftI2VPipeline, image: Image.Image, **changes: Any) -> Any:
    config = pipe.configure(**changes)
    conditions = pipe.encode(image, "pan left", config, Stopwatch())
    return pipe.generate_motion_reference(image, conditions, SEED, config)


@torch.no_grad()
def test_places_that_go_on_are_those_of_one_affine_move():
    """Also beyond the frame, where the first field is known by its slope alone."""
    y, x = torch.meshgrid(torch.arange(4) * 8 + 3.5, torch.arange(6) * 8 + 3.5, indexing="ij")
    before = torch.stack([0.1 * x - 0.02 * y + 3, 0.05 * x - 2])[None]
    step = torch.stack([torch.full_like(x, 30.0), torch.full_like(x, -25.0)])[None, :, None]
    found = go_on_from(before, step, 8)
    at_x, at_y = x + 30, y - 25
    expected = torch.stack([30 + 0.1 * at_x - 0.02 * at_y + 3, -25 + 0.05 * at_x - 2])
    torch.testing.assert_close(found[0, :, 0], expected, atol=1e-4, rtol=0)
    assert torch.equal(go_on_from(before, torch.zeros_like(step), 8)[:, :, 0], before)


def pan(pipe: SwiftI2VPipeline) -> None:
    """Make Stage I answer one steady pan to the right, whatever it is asked."""
    proj = pipe.stage1.transformer.proj_out
    torch.nn.init.zeros_(proj.weight)
    torch.nn.init.zeros_(proj.bias)
    proj.bias.data.view(-1, pipe.stage1.transformer.config["out_channels"])[:, 0] = 1.0


def test_pieces_of_displacement_move_the_photo_itself_and_join_exactly(image):
    pipe = tiny_pipeline(displaces=True)
    pan(pipe)
    later = ((9, "pan left again"),)
    motion = run_stage1(pipe, image, later_prompts=later)
    clock = torch.cat([
        first := draw_course(9, SEED).clock,
        first[-1] + draw_course(9, SEED + 8).clock[1:],
    ])  # fmt: skip
    expected = torch.zeros(1, 2, 17, LOW, LOW)
    expected[:, 0] = SHIFT * LOW * clock[:, None, None]
    assert motion.displacement is not None
    found = motion.displacement.transpose(0, 1)[None]
    torch.testing.assert_close(enlarge(found, LOW, LOW), expected, atol=1e-4, rtol=0)
    small = torch.nn.functional.avg_pool2d(image_to_tensor(image)[0].transpose(0, 1), 4)
    moved = move_photo(small.transpose(0, 1)[None], expected).clamp(-1, 1)
    difference = motion.frames.astype(int) - video_to_frames(moved)
    assert np.abs(difference).max() <= 1


class Watched(torch.nn.Module):
    """Stage I's transformer, with the inputs of its calls."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.inputs: list[dict[str, Any]] = []
        self.config, self.dtype = model.config, model.dtype

    def forward(self, **inputs: Any) -> Any:
        self.inputs.append(inputs)
        return self.model(**inputs)


@pytest.mark.parametrize("overlap", [1, 5])
def test_the_frames_before_reach_the_model_as_given_ones(pipe, image, monkeypatch, overlap):
    watched = Watched(pipe.stage1.transformer)
    monkeypatch.setattr(pipe.stage1, "transformer", watched)
    settings = {"stage1.piece_frames": 9, "stage1.piece_overlap": overlap}
    motion = run_stage1(pipe, image, **settings)
    assert motion.frames.shape == (17, LOW, LOW, 3)
    second = next(i for i in watched.inputs[2:] if i["hidden_states"].shape[2] == 3)
    mask, latents = second["hidden_states"][:, 768:772], second["hidden_states"][:, 772:]
    num_given = 1 + overlap // 4
    assert mask[0, :, :, 0, 0].tolist() == [[1] * num_given + [0] * (3 - num_given)] * 4
    known = frames_to_video(motion.frames[9 - overlap : 9])
    with torch.no_grad():
        assert torch.equal(
            latents[:, :, :num_given], StreamingEncoder(pipe.stage1.vae).encode(known)
        )


def test_a_first_piece_is_the_clip_of_its_length(pipe, image):
    alone = run_stage1(pipe, image, num_frames=9)
    whole = run_stage1(pipe, image, **{"stage1.piece_frames": 9})
    other = run_stage1(pipe, image, later_prompts=((9, "zoom in"),))
    assert np.array_equal(whole.frames[:9], alone.frames)
    assert np.array_equal(other.frames[:9], alone.frames)
    assert not np.array_equal(other.frames[9:], whole.frames[9:])


def prompts_of(pipe: SwiftI2VPipeline, texts: list[str]) -> list[Tensor]:
    return [pipe.encoder(Image.new("RGB", (8, 8)), text).prompt_embeds for text in texts]


def test_both_stages_have_the_prompt_that_holds(pipe, image, monkeypatch):
    seen: dict[str, list[Tensor]] = {"stage1": [], "stage2": []}
    watched = Watched(pipe.stage1.transformer)
    monkeypatch.setattr(pipe.stage1, "transformer", watched)
    forward = pipe.stage2.transformer.forward

    def watch(hidden: Tensor, sigma: Tensor, embeds: Tensor, **more: Any) -> Any:
        seen["stage2"].append(embeds)
        return forward(hidden, sigma, embeds, **more)

    monkeypatch.setattr(pipe.stage2.transformer, "forward", watch)
    config = pipe.configure(later_prompts=((5, "b"), (13, "c")))
    list(pipe.stream(image, "a", generator=SEED, config=config))
    a, b, c = prompts_of(pipe, ["a", "b", "c"])
    seen["stage1"] = [inputs["encoder_hidden_states"] for inputs in watched.inputs]
    expected = {"stage1": [a, a, b, b, c, c], "stage2": [a, a, b, b, b, b, c, c]}
    for stage, embeds in seen.items():
        assert len(embeds) == len(expected[stage])
        assert all(map(torch.equal, embeds, expected[stage])), stage


def stop_after(num_steps: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.stage == "stage1" and progress.step == num_steps:
            raise CancelledError("stopped")

    return report


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
@pytest.mark.parametrize("displaces", [False, True])
def test_a_run_stopped_in_any_piece_makes_the_same_clip(tmp_path, image, displaces, num_steps):
    pipe = tiny_pipeline(displaces=displaces)
    config = pipe.configure(later_prompts=((5, "zoom in"), (13, "static")))
    run: Any = {"generator": SEED, "config": config}
    whole = [segment.frames for segment in pipe.stream(image, "pan left", **run)]
    work_dir = WorkDir(tmp_path / "run", resume=False)
    work_dir.start({"seed": SEED})
    with pytest.raises(CancelledError):
        list(
            pipe.stream(image, "pan left", **run, store=work_dir, on_progress=stop_after(num_steps))
        )
    pieces = sorted(path.name for path in work_dir.directory.glob("stage1_*"))
    assert pieces == [f"stage1_{n:04d}.safetensors" for n in range((num_steps - 1) // 2)]
    steps: list[Progress] = []
    again = WorkDir(tmp_path / "run", resume=True)
    resumed = pipe.stream(image, "pan left", **run, store=again, on_progress=steps.append)
    for segment, frames in zip(resumed, whole, strict=True):
        assert np.array_equal(segment.frames, frames)
    stage1 = [(p.step, p.num_steps) for p in steps if p.stage == "stage1"]
    loaded = [2 * number for number in range(1, len(pieces) + 1)]
    assert stage1 == [(step, 6) for step in (*loaded, *range(2 * len(pieces) + 1, 7))]


@pytest.mark.parametrize("displaces", [False, True])
@pytest.mark.parametrize("detail", ["none", "carried"])
def test_the_first_frames_leave_before_the_last_piece_is_begun(image, displaces, detail):
    pipe = tiny_pipeline(displaces=displaces)
    config = pipe.configure(
        **{"later_prompts": ((5, "b"), (13, "c")), "stage2.reference_detail": detail}
    )
    events: list[str] = []
    run: Any = {"generator": SEED, "config": config}
    parts = []
    for segment in pipe.stream(image, "a", **run, on_progress=lambda p: events.append(p.stage)):
        events.append("frames")
        parts.append(segment.frames)
    assert events.index("frames") < len(events) - 1 - events[::-1].index("stage1")
    assert events.count("stage1") == 6
    conditions = pipe.encode(image, "a", config, Stopwatch())
    motion = pipe.generate_motion_reference(image, conditions, SEED, config)
    whole = pipe.synthesize(motion, image, conditions, SEED, config)
    for frames, expected in zip(parts, whole, strict=True):
        assert np.array_equal(frames, expected.frames)


def test_stages_that_are_loaded_one_after_the_other_run_so(model, photo, tmp_path):
    pipe = SwiftI2VPipeline.from_pretrained(model, device="cpu", staged=True)
    config = pipe.configure(later_prompts=((5, "b"), (13, "c")))
    events: list[str] = []
    image = Image.open(photo).convert("RGB")
    list(pipe.stream(image, "a", config=config, on_progress=lambda p: events.append(p.stage)))
    assert events == ["stage1"] * 6 + ["stage2"] * 8


def test_the_command_line_takes_prompts_over_time(model: Path, photo: Path, tmp_path: Path) -> None:
    video, again, other = (tmp_path / f"{name}.mkv" for name in ("a", "again", "other"))
    lossless = ("--codec", "ffv1")
    asked = ("--prompt-at", "9: static camera", "--prompt-at", "13:zoom out")
    succeed(generate(model, photo, video, *lossless, *asked))
    found = read_settings(video).config.later_prompts
    assert found == ((9, "static camera"), (13, "zoom out"))
    assert "static camera" in succeed(swifti2v("info", video)).stdout
    succeed(swifti2v("generate", "--like", video, "--model", model, "-o", again, *lossless))
    assert_same_frames(video, again)
    setting = "later_prompts=[[9, static camera], [13, zoom out]]"
    succeed(generate(model, photo, other, *lossless, "--set", setting))
    assert_same_frames(video, other)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["10:b"], "later_prompts has 10, which is not 4k + 1; the nearest are 9 and 13"),
        (["13:b", "9:c"], "later_prompts has frame 9 after 13; let them rise"),
        (["17:b"], "has frame 17, but the last of 17 frames is 16"),
        (["b"], "'b' is not FRAME:PROMPT"),
        (["9:" + "b" * 50], "the limit is 24"),
    ],
)
def test_prompts_that_cannot_hold_are_refused(model, photo, tmp_path, asked, words):
    options = [word for text in asked for word in ("--prompt-at", text)]
    result = generate(model, photo, tmp_path / "a.mkv", *options)
    assert words in " ".join((result.stderr + result.stdout).split())
    assert result.exit_code != 0
    assert not (tmp_path / "a.mkv").exists()


def test_pieces_that_cannot_be_made_are_refused(pipe):
    for changes, words in (
        ({"stage1.piece_frames": 10}, "piece_frames has 10, which is not 4k"),
        (
            {"stage1.piece_frames": 5, "stage1.piece_overlap": 5},
            "must be above stage1.piece_overlap",
        ),
        ({"stage1.piece_overlap": 4}, "piece_overlap has 4"),
    ):
        with pytest.raises(ConfigError, match=words):
            pipe.configure(**changes)
    displacing = tiny_pipeline(displaces=True)
    with pytest.raises(ConfigError, match="goes on from one frame"):
        displacing.configure(**{"stage1.piece_overlap": 5})


def test_an_empty_later_prompt_is_one_like_any_other(pipe, image):
    config: GenerationConfig = pipe.configure(later_prompts=((9, ""),))
    assert replace(config, later_prompts=()).plan_pieces() != config.plan_pieces()
    with pytest.raises(PromptError):
        pipe.encode(image, "p", pipe.configure(later_prompts=((9, "x" * 99),)), Stopwatch())
