"""Both stages from one model: the photo as Stage I's first frame, and one copy of the weights."""

import logging
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml

from swifti2v.config import GenerationConfig, SpeedConfig, parse_config
from swifti2v.errors import ConfigError, LoadingError, ShapeError
from swifti2v.jobs.sharing import share_models
from swifti2v.media import image_to_tensor
from swifti2v.models.loading.sources import LoraSource, find_model
from swifti2v.models.runtime.placement import is_empty
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.streaming import StreamingEncoder
from swifti2v.pipelines.first_frame import FirstFramePipeline
from swifti2v.pipelines.progress import Progress, Stopwatch
from swifti2v.pipelines.stage1 import Conditions
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.planning.devices import DEVICES
from swifti2v.planning.models import Models
from swifti2v.planning.plans import estimate
from swifti2v.planning.work import ClipCounter
from swifti2v.sampling import draw_noise
from swifti2v.training.stages.loading import load_for_training
from tests.helpers import hub as wan
from tests.helpers.command_line import copy_model, save_lora

CPU = torch.device("cpu")
ROLES = ("stage1_transformer", "stage1_vae", "stage2_transformer", "stage2_vae")
LADDER: dict[str, Any] = {
    "num_inference_steps": 3, "sigmas": [1, 0.757, 0.522], "rule": "renoise",
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "num_frames": 9, "height": 128, "width": 64,
    "stage1": {"downscale": 2, "sampling": LADDER},
    "stage2": {"segment_size": 1, "sampling": LADDER | {"strength": 0.757}},
}  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan.make_hub(tmp_path_factory.mktemp("hub"))


def write(hub: Path, name: str, **changes: Any) -> Path:
    """The preset of one model; ``changes`` go into the components of single roles."""
    values = wan.preset(hub) | {"settings": SETTINGS}
    components = values["components"]
    del components["image_encoder"], components["image_processor"]
    model = {"source": "Wan2.2-TI2V", "subfolder": "transformer", "reference": "none"}
    for stage in ("stage1", "stage2"):
        components[f"{stage}_transformer"] = dict(model)
        components[f"{stage}_vae"] = {"source": "Wan2.2-TI2V", "subfolder": "vae"}
    for role, change in changes.items():
        components[role] |= change
    path = hub / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def preset(hub: Path) -> Path:
    return write(hub, "one")


@pytest.fixture(scope="module")
def pipe(preset: Path) -> SwiftI2VPipeline:
    return SwiftI2VPipeline.from_pretrained(preset, device="cpu")


@pytest.fixture(scope="module")
def photo() -> Any:
    return wan.photo().resize((64, 128))


@torch.no_grad()
def test_the_clip_is_that_of_diffusers_image_to_video_pipeline(pipe, photo):
    """With Wan2.2-TI2V's ``expand_timesteps``, from our noise, on the levels of its own steps."""
    parts, image = pipe.components, photo.resize((32, 64))
    embeds = pipe.encode(image, "a cat", pipe.config, Stopwatch()).prompt_embeds
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler
    kind: Any = diffusers.WanImageToVideoPipeline
    theirs = kind(
        tokenizer=None, text_encoder=None, image_encoder=None, image_processor=None,
        transformer=wan.stage2_base(), vae=parts.stage1_vae, expand_timesteps=True,
        scheduler=scheduler(shift=5.0),
    )  # fmt: skip
    expected = theirs(
        image=image, prompt_embeds=embeds, height=64, width=32, num_frames=9, guidance_scale=1.0,
        latents=draw_noise((48, 4, 2), range(3), 7, "cpu", stage="stage1"),
        output_type="latent", num_inference_steps=3,
    ).frames  # fmt: skip

    sigmas = tuple(theirs.scheduler.sigmas.tolist()[:-1])
    sampling = replace(pipe.config.stage1.sampling, sigmas=sigmas, rule="euler")
    config = replace(pipe.config.stage1, sampling=sampling)
    pixels = image_to_tensor(image)
    video = pipe.stage1(pixels, Conditions(prompt_embeds=embeds), 9, 7, config).video

    given = StreamingEncoder(parts.stage1_vae).encode(pixels)
    latents = torch.cat([given, expected[:, :, 1:]], dim=2)
    torch.testing.assert_close(video, pipe.stage1.decode(latents), atol=1e-3, rtol=0)
    assert (video - pipe.stage1.decode(torch.zeros_like(latents))).abs().max() > 0.1


def test_both_stages_are_one_model(pipe, photo):
    parts = pipe.components
    assert parts.stage1_transformer is parts.stage2_transformer
    assert parts.stage1_vae is parts.stage2_vae
    assert isinstance(parts.stage1_transformer, SegmentTransformer3DModel)
    assert isinstance(pipe.stage1, FirstFramePipeline)
    frames = pipe(photo, "a cat", generator=1).frames
    assert frames.shape == (9, 128, 64, 3)


@pytest.fixture(scope="module")
def apart(hub: Path) -> Path:
    """The same weights in other folders: nobody knows that they are the same."""
    copy_model(hub / "Wan2.2-TI2V", hub / "Copied")
    return write(hub, "apart", **{role: {"source": "Copied"} for role in ROLES[:2]})


@pytest.mark.parametrize("placement", ["resident", "streamed", "offloaded"])
def test_one_copy_gives_the_clip_of_two(pipe, preset, apart, photo, placement):
    two = SwiftI2VPipeline.from_pretrained(apart, device="cpu", placement=placement)
    assert two.components.stage1_transformer is not two.components.stage2_transformer
    one = SwiftI2VPipeline.from_pretrained(preset, device="cpu", placement=placement)
    clips = [each(photo, "a cat", generator=1).frames for each in (one, two, pipe)]
    np.testing.assert_array_equal(clips[0], clips[1])
    np.testing.assert_array_equal(clips[0], clips[2])


@pytest.mark.parametrize("placement", ["resident", "offloaded"])
def test_part_after_part_loads_each_model_once_and_keeps_none(
    pipe, preset, photo, caplog, placement
):
    caplog.set_level(logging.INFO, "swifti2v.models.loading.components")
    staged = SwiftI2VPipeline.from_pretrained(
        preset, device="cpu", placement=placement, staged=True
    )
    alive: list[weakref.ref[Any]] = []

    def look(progress: Progress) -> None:
        models = [getattr(staged.components, role) for role in ROLES]
        full = [model for model in models if not is_empty(model)]
        assert len(full) == 2  # those of the stage that runs
        alive.extend(weakref.ref(model) for model in full)

    expected = pipe(photo, "a cat", generator=1).frames
    for number in (1, 2):
        caplog.clear()
        frames = staged(photo, "a cat", generator=1, on_progress=look).frames
        loaded = [r.args[0] for r in caplog.records if r.msg.startswith("loading %s from")]
        assert loaded == ["text_encoder", "stage1_transformer", "stage1_vae"], number
        np.testing.assert_array_equal(frames, expected)
        assert {ref() for ref in alive} == {None}
    assert all(is_empty(getattr(staged.components, role)) for role in ROLES)


def test_a_model_that_waits_for_its_next_part_goes_when_another_part_begins(preset, photo):
    staged = SwiftI2VPipeline.from_pretrained(preset, device="cpu", staged=True)
    conditions = staged.encode(photo, "a cat", staged.config, Stopwatch())
    staged.generate_motion_reference(photo, conditions, 1, staged.config)
    waiting = weakref.ref(staged.staging._kept["stage1_transformer"])
    assert waiting() is not None
    staged.encode(photo, "a dog", staged.config, Stopwatch())
    assert waiting() is None


def test_a_lora_of_one_stage_takes_a_copy_of_its_own(pipe, preset, photo, tmp_path):
    file = save_lora(tmp_path / "lora.safetensors", 128)
    lora = LoraSource(path=str(file), stage="stage1")
    one = SwiftI2VPipeline.from_pretrained(preset, device="cpu", loras=[lora])
    assert one.components.stage1_transformer is not one.components.stage2_transformer
    assert one.components.stage1_vae is one.components.stage2_vae
    wan.assert_equal(
        one.components.stage2_transformer, wan.state_of(pipe.components.stage2_transformer)
    )
    both = [lora, LoraSource(path=str(file), stage="stage2")]
    two = SwiftI2VPipeline.from_pretrained(preset, device="cpu", loras=both)
    assert two.components.stage1_transformer is two.components.stage2_transformer
    assert not np.array_equal(
        one(photo, "a", generator=1).frames, pipe(photo, "a", generator=1).frames
    )


def test_saved_it_is_one_model_again(pipe, photo, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "stage2/transformer").exists()
    again = SwiftI2VPipeline.from_pretrained(tmp_path, device="cpu")
    assert again.components.stage1_transformer is again.components.stage2_transformer
    assert isinstance(again.stage1, FirstFramePipeline)
    first, second = (p(photo, "pan", generator=1).frames for p in (pipe, again))
    np.testing.assert_array_equal(first, second)


def test_one_model_is_prepared_in_one_way(preset):
    speed: Any = {"stage1": SpeedConfig(residual="float32"), "stage2": SpeedConfig()}
    for staged in (False, True):
        with pytest.raises(ConfigError, match=r"stage1.speed.residual is float32 .* one transf"):
            SwiftI2VPipeline.from_pretrained(preset, device="cpu", speed=speed, staged=staged)
    both = dict.fromkeys(speed, SpeedConfig(residual="float32"))
    made = SwiftI2VPipeline.from_pretrained(preset, device="cpu", speed=both)
    assert made.components.stage2_transformer.has_float32_residual


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage1.condition": "chart"}, "takes the photo as its first frame"),
        (
            {"stage1.motion": "displacement",
             "stage1.sampling.parameterization": "reference_residual"},
            "this Stage I generates the other kind",
        ),
        ({"height": 96}, "96"),
        ({"strength": 1.0}, "no reference channels"),
    ],
)  # fmt: skip
def test_settings_of_other_models_are_refused(pipe, photo, change, message):
    with pytest.raises((ConfigError, ShapeError), match=message):
        pipe(photo, "a", generator=1, **change)


def test_a_model_with_channels_for_the_photo_is_no_such_stage1(hub):
    source = {"source": "Wan2.1-I2V"}
    with pytest.raises(LoadingError, match=r"takes 36 channels .* \(reference: none\)"):
        wan.load(write(hub, "other", stage1_transformer=source))
    with pytest.raises(LoadingError, match="stage1_transformer in_channels is 48"):
        wan.load(write(hub, "plain", stage1_transformer={"reference": "channels"}))


def test_this_stage1_is_not_trained(preset):
    with pytest.raises(ConfigError, match="takes the photo as its first frame"):
        load_for_training(str(preset), {}, "stage1", ("stage1_transformer",), CPU)


def test_processes_share_both_stages_or_none(pipe):
    model = SegmentTransformer3DModel(
        **{**wan.STAGE2, "num_attention_heads": 4, "attention_head_dim": 32}
    )
    parts = replace(pipe.components, stage1_transformer=model, stage2_transformer=model)
    with pytest.raises(ShapeError, match="2 rows of tokens do not divide into 4 processes"):
        share_models(SwiftI2VPipeline(parts, pipe.config), pipe.config, 4, CPU)


def test_a_plan_counts_the_weights_once(preset, apart):
    index, _ = find_model(preset)
    assert all(find_model(apart)[0].twin(role) == role for role in ROLES)
    config = parse_config(GenerationConfig, index.settings, "test")
    one = ClipCounter(Models(preset, torch.bfloat16), config).count()
    assert one.shared == {
        "stage2_transformer": "stage1_transformer", "stage2_vae": "stage1_vae"
    }  # fmt: skip
    copies = {twin: one.weights[role] for twin, role in one.shared.items()}
    two = replace(one, weights=one.weights | copies, shared={})
    size = sum(part.num_bytes for part in copies.values())
    assert size > 0
    for keeps, more in ((True, size), (False, 0)):  # part after part, a stage has one copy anyway
        peaks, peaks_twice = (
            estimate(work, DEVICES["h200"], "bfloat16", "resident", keeps=keeps).peak_device_bytes
            for work in (one, two)
        )
        for stage, peak in peaks.items():
            assert peaks_twice[stage] - peak == pytest.approx(more)
