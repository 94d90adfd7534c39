"""Stage II over a clip without a photo: ViBe's second pass, streamed and whole, and on plain weights."""

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from swifti2v import errors
from swifti2v.config import (
    AttentionConfig,
    GenerationConfig,
    SamplingConfig,
    Stage2Config,
    parse_config,
)
from swifti2v.media import frames_to_video, resize_video, video_to_frames
from swifti2v.models.loading.architectures import find_architecture
from swifti2v.models.loading.components import save_components
from swifti2v.models.loading.sources import find_model
from swifti2v.models.lora.provenance import BASE_HASH, hash_base
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.streaming import StreamingEncoder
from swifti2v.pipelines.stage1 import Conditions
from swifti2v.pipelines.stage2 import Stage2Pipeline
from swifti2v.pipelines.transition import HybridReference, MotionReference
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.pipelines.upscale import crop_to_aspect, first_frame, second_pass, upscale
from swifti2v.sampling import draw_noise
from swifti2v.schedules import plan_sigmas
from tests.helpers import hub as wan
from tests.helpers.tiny import SIZE, KeptSegments, tiny_pipeline
from tests.integration.test_pipelines import TINY_WAN, WAN22_VAE, build

GCLF = AttentionConfig(kind="gclf", window=(1, 1), pool=2)


@pytest.fixture(scope="module")
def pipe() -> SwiftI2VPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return wan.make_hub(tmp_path_factory.mktemp("hub"))


def make_clip(num_frames: int = 17, side: int = SIZE // 4) -> Any:
    shape = (num_frames, side, side, 3)
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def with_stage2(pipe: SwiftI2VPipeline, **changes: Any) -> GenerationConfig:
    config = second_pass(pipe.config)
    return replace(config, stage2=replace(config.stage2, **changes))


def frames_of(segments: Any) -> Any:
    return np.concatenate([segment.frames for segment in segments])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["full", "gclf"])
def test_over_the_whole_clip_it_is_a_plain_wan22_denoise_from_the_noised_clip(kind):
    """Against diffusers' own transformer and scheduler, with all frames at one noise level."""
    base = build(diffusers.WanTransformer3DModel, in_channels=4, out_channels=4, **TINY_WAN)
    vae = build(diffusers.AutoencoderKLWan, **WAN22_VAE)
    stage2 = Stage2Pipeline(SegmentTransformer3DModel.from_base(base, takes_reference=False), vae)
    clip, embeds = make_clip(17, 16), torch.randn(1, 6, 16)
    # A window over the 2x2 tokens without coarse keys is full attention.
    attention = AttentionConfig(kind=kind, window=(9, 9), pool=None)
    config = Stage2Config(
        segment_size=None, anchor="generated", attention=attention,
        sampling=SamplingConfig(num_inference_steps=10, strength=0.7),
    )  # fmt: skip
    upsampled = resize_video(frames_to_video(clip), 64, 64, "lanczos")
    reference = HybridReference(MotionReference(clip), upsampled[:, :, :1], vae)
    (result,) = stage2.stream(reference, Conditions(prompt_embeds=embeds), 11, config)
    assert result.segment.target == (0, 1, 2, 3, 4)

    sigmas = plan_sigmas(10, 5.0, 0.7)
    assert len(sigmas) == 11
    assert sigmas[0] == pytest.approx(0.921, abs=1e-3)
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)  # type: ignore[no-untyped-call]
    scheduler.set_timesteps(sigmas=sigmas[:-1])
    clean = StreamingEncoder(vae).encode(upsampled)
    latents = (1 - sigmas[0]) * clean + sigmas[0] * draw_noise(
        (4, 4, 4), range(5), 11, "cpu", stage="stage2"
    )
    for timestep in scheduler.timesteps:
        velocity = base(latents, timestep[None], embeds, return_dict=False)[0]
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(result.latents, latents, atol=1e-4, rtol=0)


@torch.no_grad()
def test_later_segments_are_given_the_first_frame_that_was_generated(pipe):
    seen: list[Any] = []
    model = pipe.components.stage2_transformer
    hook = model.register_forward_pre_hook(lambda _, values: seen.append(values))
    segments = list(upscale(pipe, make_clip(), config=with_stage2(pipe, segment_size=2)))
    hook.remove()

    assert [segment.latent_range for segment in segments] == [(0, 3), (3, 5)]
    assert [len(segment.frames) for segment in segments] == [9, 8]
    steps = len(seen) // 2
    for hidden, sigma, *_ in seen[:steps]:
        assert hidden.shape[2] == 3
        assert (sigma > 0).all()  # the first frame, too
    for hidden, sigma, *_ in seen[steps:]:
        assert torch.equal(hidden[:, :768, 0], segments[0].latents[:, :, 0])
        assert torch.equal(hidden[:, :768, 1], segments[0].latents[:, :, 2])  # context
        assert sigma[0, :2].tolist() == [0, 0]
        assert (sigma[0, 2:] > 0).all()


def test_a_longer_clip_starts_like_the_shorter_one_and_nothing_is_read_ahead(pipe):
    clip = make_clip(21)
    other = clip.copy()
    other[9:] = 0
    config = with_stage2(pipe, segment_size=2)
    first = next(upscale(pipe, clip, config=config))
    assert np.array_equal(first.frames, next(upscale(pipe, clip[:17], config=config)).frames)
    assert np.array_equal(first.frames, next(upscale(pipe, other, config=config)).frames)


def test_finished_segments_with_the_first_frame_continue_a_run(pipe):
    clip, config = make_clip(), with_stage2(pipe, segment_size=2)
    whole = list(upscale(pipe, clip, config=config))
    rest = list(
        pipe.synthesize(
            MotionReference(clip), first_frame(clip, config),
            pipe.encoder(first_frame(clip, config), ""), 0, config,
            store=KeptSegments({0: whole[0].latents}),
        )
    )  # fmt: skip
    assert np.array_equal(frames_of(rest), frames_of(whole))


@pytest.mark.parametrize("attention", [AttentionConfig(), GCLF])
def test_strength_decides_how_much_of_the_clip_is_left(pipe, attention):
    clip = make_clip()
    plain = video_to_frames(resize_video(frames_to_video(clip), SIZE, SIZE, "lanczos"))
    distances = []
    for strength in (1e-4, 0.3, 0.9):
        sampling = replace(pipe.config.stage2.sampling, strength=strength)
        config = with_stage2(pipe, sampling=sampling, attention=attention)
        distances.append(np.abs(frames_of(upscale(pipe, clip, config=config)) - 1.0 * plain).mean())
    assert distances[0] < distances[1] < distances[2]


def test_second_pass_keeps_a_strength_that_a_model_was_made_for(pipe):
    assert second_pass(pipe.config).stage2.sampling.strength == 0.7
    weak = with_stage2(pipe, sampling=SamplingConfig(strength=0.4))
    assert second_pass(weak).stage2.sampling.strength == 0.4
    assert second_pass(pipe.config).stage2.anchor == "generated"


sides = st.integers(1, 400)


@given(sides, sides, sides, sides)
def test_a_crop_has_exactly_the_aspect_and_is_the_largest_such(
    low_height, low_width, height, width
):
    clip = np.broadcast_to(np.zeros((), np.uint8), (2, low_height, low_width, 3))
    try:
        cropped = crop_to_aspect(clip, height, width)
    except errors.ShapeError:
        common = np.gcd(height, width)
        assert height // common > low_height or width // common > low_width
        return
    rows, columns = cropped.shape[1:3]
    assert rows * width == columns * height
    common = np.gcd(rows, columns)
    step_rows, step_columns = rows // common, columns // common
    assert rows + step_rows > low_height or columns + step_columns > low_width


def test_a_crop_is_centred():
    clip = make_clip(1, 16)
    assert np.array_equal(crop_to_aspect(clip, 32, 64), clip[:, 4:12])
    assert np.array_equal(crop_to_aspect(clip, 64, 32), clip[:, :, 4:12])
    assert crop_to_aspect(np.zeros((1, 704, 1280, 3), np.uint8), 2176, 3840).shape[1:3] == (
        697,
        1230,
    )


# Stage II on the weights of Wan2.2-TI2V as they are, without channels for a reference.


def plain_preset(hub: Any, tmp_path: Any, **changes: Any) -> Any:
    return wan.write_preset(hub, tmp_path, stage2_transformer={"reference": "none"} | changes)


@pytest.mark.slow
def test_plain_weights_stay_as_they_are_and_are_saved_so(hub, tmp_path, capfd):
    parts = wan.load(plain_preset(hub, tmp_path))
    wan.assert_equal(parts.stage2_transformer, wan.state_of(wan.stage2_base()))
    assert isinstance(parts.stage2_transformer, SegmentTransformer3DModel)
    assert parts.stage2_transformer.config["in_channels"] == 48
    assert "reference half" not in capfd.readouterr().err
    save_components(parts, wan.SETTINGS, tmp_path / "saved")
    again = wan.load(tmp_path / "saved").stage2_transformer
    wan.assert_equal(again, wan.state_of(wan.stage2_base()))
    empty = wan.load(tmp_path / "saved", stages=("stage1",)).stage2_transformer
    assert empty.config["in_channels"] == 48


@pytest.mark.parametrize("style", ["diffsynth", "original"])
def test_a_lora_in_the_keys_of_wan_goes_into_plain_weights(hub, tmp_path, style):
    down, up = torch.randn(4, 128), torch.randn(128, 4)
    start, leaves = {
        "diffsynth": ("", ("lora_A.default.weight", "lora_B.default.weight")),
        "original": ("diffusion_model.", ("lora_down.weight", "lora_up.weight")),
    }[style]
    keys = [f"{start}blocks.1.self_attn.q.{leaf}" for leaf in leaves]
    save_file(dict(zip(keys, (down, up), strict=True)), tmp_path / "lora2.safetensors")
    lora = {"path": str(tmp_path / "lora2.safetensors"), "strength": 0.5}
    parts = wan.load(plain_preset(hub, tmp_path, loras=[lora]))
    expected = wan.state_of(wan.stage2_base())
    expected["blocks.1.attn1.to_q.weight"] += 0.5 * up @ down
    found = parts.stage2_transformer.state_dict()["blocks.1.attn1.to_q.weight"]
    torch.testing.assert_close(found, expected["blocks.1.attn1.to_q.weight"])


@pytest.mark.slow
def test_a_photo_anchors_stage_two_on_plain_weights_in_one_call(hub, tmp_path):
    """Stage I, then plain Stage II from its noised clip: no weights trained on large videos."""
    pipe = SwiftI2VPipeline.from_pretrained(plain_preset(hub, tmp_path), device="cpu")
    config = pipe.configure(
        strength=0.7, stage2={"attention": {"kind": "gclf", "window": [1, 1], "pool": 2}}
    )
    outputs = list(pipe.stream(wan.photo(), "zoom", config=config))
    assert frames_of(outputs).shape == (17, 64, 64, 3)
    assert [output.latent_range for output in outputs] == [(1, 3), (3, 5)]
    motion = make_clip(17, 32)
    other = motion.copy()
    other[1:] = 255 - other[1:]
    first, second = (
        frames_of(pipe.refine(clip, wan.photo(), "zoom", config=config)) for clip in (motion, other)
    )
    assert np.array_equal(first[0], second[0])
    assert not np.array_equal(first[1:], second[1:])  # strength lets the motion in


def test_stage_two_alone_does_not_load_stage_one(hub, tmp_path):
    preset = plain_preset(hub, tmp_path)
    whole = SwiftI2VPipeline.from_pretrained(preset, device="cpu")
    alone = SwiftI2VPipeline.from_pretrained(preset, device="cpu", stages=("stage2",))
    assert all(weight.is_meta for weight in alone.components.stage1_transformer.parameters())
    first, second = (
        frames_of(upscale(pipe, make_clip(17, 16), config=with_stage2(pipe)))
        for pipe in (whole, alone)
    )
    assert np.array_equal(first, second)


def test_without_a_reference_the_strength_must_be_below_1(hub, tmp_path):
    pipe = SwiftI2VPipeline.from_pretrained(plain_preset(hub, tmp_path), device="cpu")
    with pytest.raises(errors.ConfigError, match=r"strength is 1 .*below 1, such as 0.7"):
        next(pipe.stream(wan.photo(), "zoom"))


def test_only_transformers_of_latents_alone_can_be_without_a_reference(hub, tmp_path):
    with pytest.raises(errors.ConfigError, match="stage1_vae has reference: none"):
        wan.load(wan.write_preset(hub, tmp_path, stage1_vae={"reference": "none"}))
    with pytest.raises(errors.LoadingError, match=r"takes 36 channels .* \(reference: none\)"):
        wan.load(wan.write_preset(hub, tmp_path, stage1_transformer={"reference": "none"}))


def test_a_lora_of_another_base_is_refused_before_any_is_merged(hub, tmp_path):
    down, up = torch.randn(4, 128), torch.randn(128, 4)
    tensors = {
        "blocks.1.attn1.to_q.lora_A.weight": down,
        "blocks.1.attn1.to_q.lora_B.weight": up,
    }
    paths = [tmp_path / f"{name}.safetensors" for name in ("own", "other")]
    for path, seed in zip(paths, (0, 1), strict=True):
        save_file(tensors, path, {BASE_HASH: hash_base(wan.stage2_base(seed))})
    own = [{"path": str(paths[0])}] * 2  # after the first one the weights have another hash
    wan.load(plain_preset(hub, tmp_path, loras=own))
    with pytest.raises(errors.LoadingError, match=r"other.safetensors was trained on another"):
        wan.load(plain_preset(hub, tmp_path, loras=[*own, {"path": str(paths[1])}]))


def test_the_shipped_preset_is_wan22_as_it_is_with_one_lora():
    index, root = find_model("vibe")
    source = index.components["stage2_transformer"]
    assert find_architecture("stage2_transformer", source, root).config["in_channels"] == 48
    paper = find_model("paper")[0].components
    assert replace(source, reference="channels", loras=()) == paper["stage2_transformer"]
    assert [lora.path for lora in source.loras] == ["yunfengWu/ViBe"]
    stage2 = parse_config(GenerationConfig, index.settings, "vibe").stage2
    assert (stage2.sampling.strength, stage2.attention.kind) == (0.7, "gclf")
    assert stage2.anchor == "given"
