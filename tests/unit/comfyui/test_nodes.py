import subprocess
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from swifti2v.errors import ConfigError, MediaError, ShapeError
from swifti2v.media import probe_clip
from swifti2v.models.loading.models_dir import VARIABLE, models_dir
from tests.helpers.comfyui import ExecutionBlocker, InterruptProcessingException
from tests.helpers.command_line import save_lora
from tests.helpers.tiny import NUM_FRAMES, SIZE, tiny_pipeline

NUM_STAGE1_STEPS, NUM_STAGE2_STEPS, NUM_SEGMENTS = 2, 2, 4


def make_image(num: int = 1, height: int = SIZE, width: int = SIZE, channels: int = 3) -> Any:
    """An IMAGE batch of 8-bit levels."""
    levels = np.random.default_rng(0).integers(0, 256, (num, height, width, channels), np.uint8)
    return torch.from_numpy(levels).float() / 255


def clip_inputs(**changes: Any) -> dict[str, Any]:
    own = {"pipeline": tiny_pipeline(), "image": make_image(), "prompt": "zoom", "seed": 7}
    return {**own, "num_frames": NUM_FRAMES, **changes}


def without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


def levels(images: Any) -> Any:
    return (images * 255).round().to(torch.uint8).numpy()


def test_every_node_has_a_name_of_its_own_and_says_what_it_is_for(comfyui):
    from swifti2v.comfyui.install import NODE_FOLDER

    schemas = comfyui.load(NODE_FOLDER)
    assert sorted(schemas) == [
        "SwiftI2VGenerate", "SwiftI2VLoad", "SwiftI2VLora", "SwiftI2VRefine", "SwiftI2VStage1",
        "SwiftI2VUpscale",
    ]  # fmt: skip
    assert all(schema.description and schema.display_name for schema in schemas.values())


def test_comfyui_starts_without_loading_the_pipelines():
    code = (
        "import sys, tempfile; from pathlib import Path\n"
        "from tests.helpers.comfyui import running_comfyui\n"
        "from swifti2v.comfyui.install import NODE_FOLDER\n"
        "with running_comfyui(Path(tempfile.mkdtemp())) as comfyui:\n"
        "    comfyui.load(NODE_FOLDER)\n"
        "sys.exit(bool({'torch', 'diffusers', 'transformers', 'av'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_frames_are_those_of_the_pipeline(comfyui):
    inputs = clip_inputs()
    video, frames = comfyui.run("SwiftI2VGenerate", **inputs, return_frames=True)

    from swifti2v.comfyui.clips import to_photo

    photo = to_photo(inputs["image"])
    expected = inputs["pipeline"](photo, "zoom", num_frames=NUM_FRAMES, generator=7).frames
    np.testing.assert_array_equal(levels(frames), expected)
    assert frames.dtype == torch.float32
    info = probe_clip(video.get_stream_source())
    assert (info.num_frames, info.width, info.height) == (NUM_FRAMES, SIZE, SIZE)


def test_frames_that_were_not_asked_for_say_how_to_get_them(comfyui):
    _, frames = comfyui.run("SwiftI2VGenerate", **clip_inputs())
    assert isinstance(frames, ExecutionBlocker)
    assert frames.message is not None
    assert "return_frames" in frames.message


@pytest.mark.parametrize("displaces", [False, True])
def test_stage1_then_refine_is_generate(comfyui, displaces):
    inputs = clip_inputs(pipeline=tiny_pipeline(displaces=displaces))
    _, expected = comfyui.run("SwiftI2VGenerate", **inputs, return_frames=True)

    motion, _ = comfyui.run("SwiftI2VStage1", **inputs)
    _, frames = comfyui.run(
        "SwiftI2VRefine", **without(inputs, "num_frames"), motion=motion, return_frames=True
    )

    assert torch.equal(frames, expected)


def test_a_clip_of_images_moves_the_photo_as_well(comfyui):
    inputs = clip_inputs()
    motion, images = comfyui.run("SwiftI2VStage1", **inputs)
    assert images.shape == (NUM_FRAMES, SIZE // 4, SIZE // 4, 3)

    of_motion, of_images = (
        comfyui.run("SwiftI2VRefine", **without(inputs, "num_frames"), motion=given,
                    return_frames=True)[1]
        for given in (motion, images)
    )  # fmt: skip

    assert torch.equal(of_images, of_motion)


def test_upscale_makes_a_clip_larger(comfyui):
    video, frames = comfyui.run(
        "SwiftI2VUpscale",
        pipeline=tiny_pipeline(),
        images=make_image(9, 16, 32),
        prompt="",
        fps=24,
        return_frames=True,
    )
    assert frames.shape == (9, 64, 128, 3)
    assert probe_clip(video.get_stream_source()).fps == 24


def test_the_size_follows_the_photo_or_the_given_side(comfyui):
    inputs = clip_inputs(image=make_image(1, 48, 96))
    given: list[dict[str, int]] = [{}, {"height": 64}, {"width": 64, "height": 128}]
    sizes = [
        probe_clip(comfyui.run("SwiftI2VGenerate", **inputs, **more)[0].get_stream_source())
        for more in given
    ]
    # 64x64 pixels at most, sides are multiples of 64: no room for the photo's 2:1.
    assert [(size.width, size.height) for size in sizes] == [(64, 64), (128, 64), (64, 128)]


@pytest.mark.parametrize(
    ("node", "num_steps"),
    [
        ("SwiftI2VGenerate", NUM_STAGE1_STEPS + NUM_SEGMENTS * NUM_STAGE2_STEPS),
        ("SwiftI2VStage1", NUM_STAGE1_STEPS),
    ],
)
def test_progress_counts_every_step_to_the_end(comfyui, node, num_steps):
    comfyui.run(node, **clip_inputs())
    steps = [report.value for report in comfyui.reports if report.preview_image is None]
    assert steps == list(range(1, num_steps + 1))
    assert {report.max_value for report in comfyui.reports} == {num_steps}


def test_each_segment_is_shown(comfyui):
    comfyui.run("SwiftI2VGenerate", **clip_inputs())
    shown = [report.preview_image for report in comfyui.reports if report.preview_image]
    assert [image.size for image in shown] == [(SIZE, SIZE)] * NUM_SEGMENTS


@pytest.mark.parametrize("num_done", [1, 5])
def test_cancel_stops_before_the_next_step_and_leaves_no_file(comfyui, num_done):
    comfyui.is_cancelled = lambda: len(comfyui.reports) >= num_done

    with pytest.raises(InterruptProcessingException):
        comfyui.run("SwiftI2VGenerate", **clip_inputs())

    assert len(comfyui.reports) == num_done
    assert list(comfyui.temp.iterdir()) == []


def test_memory_does_not_grow_with_the_clip(tmp_path):
    from swifti2v.comfyui.clips import write

    config = tiny_pipeline().configure(num_frames=81)
    alive: list[weakref.ref[Any]] = []

    def make() -> Any:
        for _ in range(20):
            frames = np.zeros((4, SIZE, SIZE, 3), np.uint8)
            alive.append(weakref.ref(frames))
            # Two are queued, one is being written, one was just handed over, one is new.
            assert sum(frames() is not None for frames in alive) <= 5
            yield SimpleNamespace(frames=frames)
            del frames

    assert write(make(), config, tmp_path / "a.mp4", lambda frame: None, wants_images=False) is None


def test_load_takes_comfyui_s_device_loras_and_folder_of_models(comfyui, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "set, so that it is restored")
    monkeypatch.delenv(VARIABLE)
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    for name in ("a.safetensors", "b.safetensors"):
        save_lora(comfyui.loras / name)
    (one,) = comfyui.run("SwiftI2VLora", lora="a.safetensors", strength=0.5, stage="stage1")
    (two,) = comfyui.run("SwiftI2VLora", lora="b.safetensors", stage="stage2", loras=one)

    (pipeline,) = comfyui.run("SwiftI2VLoad", model=str(tmp_path / "tiny"), loras=two)

    assert models_dir() == comfyui.loras.parent  # ComfyUI's files before the Hub's
    assert comfyui.num_unloads == 1
    assert pipeline.components.device.type == "cpu"
    assert [(lora.stage, lora.strength) for lora in two] == [("stage1", 0.5), ("stage2", 1.0)]
    assert len(pipeline.components.describe_loras()) == 2
    comfyui.run("SwiftI2VGenerate", **clip_inputs(pipeline=pipeline))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("stage2.segment_size: -1", "segment_size"),
        ("stage3.segment_size: 1", "stage3"),
        ("just words", "name: value"),
        ("a: [", "YAML"),
        ("num_frames: 33", "its own input"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(comfyui, settings, words):
    for node in ("SwiftI2VGenerate", "SwiftI2VStage1", "SwiftI2VRefine", "SwiftI2VUpscale"):
        answer = comfyui.validate(node, settings)
        assert isinstance(answer, str)
        assert words in answer
    with pytest.raises(ConfigError, match=words):  # such a text may come from another node
        comfyui.run("SwiftI2VGenerate", **clip_inputs(settings=settings))
    assert comfyui.validate("SwiftI2VGenerate", None) is True


def test_settings_change_the_clip(comfyui):
    comfyui.run("SwiftI2VGenerate", **clip_inputs(settings="num_inference_steps: 1"))
    assert comfyui.reports[-1].max_value == 1 + NUM_SEGMENTS


def test_inputs_that_do_not_fit_are_refused_with_the_remedy(comfyui):
    with pytest.raises(MediaError, match=r"batch of 2.*ImageFromBatch"):
        comfyui.run("SwiftI2VGenerate", **clip_inputs(image=make_image(2)))
    with pytest.raises(ShapeError, match="17 and 21"):
        comfyui.run("SwiftI2VGenerate", **clip_inputs(num_frames=18))
    given = without(clip_inputs(width=128, height=64), "num_frames")
    with pytest.raises(ShapeError, match="aspects differ"):
        comfyui.run("SwiftI2VRefine", **given, motion=make_image(9, 16, 16))
    assert comfyui.reports == []


def test_notes_of_an_error_are_in_its_message(comfyui):
    from swifti2v.comfyui.runs import whole_message

    error = ShapeError("height 65 does not fit")
    error.add_note("tokens are pooled")
    with pytest.raises(ShapeError, match="does not fit; tokens are pooled"), whole_message():
        raise error


def test_a_fourth_channel_is_left_out(comfyui):
    from swifti2v.comfyui.clips import to_frames

    image = make_image(channels=4)
    np.testing.assert_array_equal(to_frames(image), levels(image)[..., :3])


def test_images_keep_their_levels(comfyui):
    from swifti2v.comfyui.clips import to_frames, to_images

    every_level = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    np.testing.assert_array_equal(to_frames(to_images(every_level)), every_level)
