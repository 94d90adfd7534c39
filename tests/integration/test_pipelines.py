"""Properties of the two stages with real classes at a tiny size."""

import dataclasses
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import CLIPVisionConfig, CLIPVisionModel

from swifti2v import errors
from swifti2v.config import (
    GenerationConfig,
    SamplingConfig,
    Stage1Config,
    Stage2Config,
    merge,
    parse_config,
    to_dict,
)
from swifti2v.media import frames_to_video, image_to_tensor, resize_video
from swifti2v.models.image_encoder import encode_image, make_image_processor
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.streaming import StreamingDecoder, StreamingEncoder
from swifti2v.pipelines.progress import Progress, Stopwatch
from swifti2v.pipelines.stage1 import Conditions, Stage1Pipeline
from swifti2v.pipelines.stage2 import Stage2Pipeline, predict_window
from swifti2v.pipelines.transition import HybridReference, MotionReference
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.sampling import draw_noise
from swifti2v.schedules import plan_sigmas
from swifti2v.segments import plan_segments
from tests.helpers.tiny import SIZE, KeptSegments, tiny_pipeline

TINY_WAN: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 16, "freq_dim": 32,
    "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip
WAN21_VAE: dict[str, Any] = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
    "latents_mean": [0.1] * 4, "latents_std": [1.5] * 4}  # fmt: skip
WAN22_VAE: dict[str, Any] = WAN21_VAE | {
    "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
    "scale_factor_spatial": 16, "decoder_base_dim": 4,
}  # fmt: skip


def build(kind: Any, **config: Any) -> Any:
    torch.manual_seed(0)
    return kind(**config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pipe() -> SwiftI2VPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def change(pipe: SwiftI2VPipeline, **changes: Any) -> GenerationConfig:
    return parse_config(GenerationConfig, merge(to_dict(pipe.config), changes), "test")


def test_a_call_equals_its_stream_and_repeats_itself(pipe, image):
    whole = pipe(image, "zoom in", generator=3).frames
    segments = list(pipe.stream(image, "zoom in", generator=torch.Generator().manual_seed(3)))
    assert whole.shape == (17, SIZE, SIZE, 3)
    assert whole.dtype == np.uint8
    assert np.array_equal(whole, np.concatenate([s.frames for s in segments]))
    assert [s.index for s in segments] == [0, 1, 2, 3]
    assert [s.latent_range for s in segments] == pipe.plan(pipe.config)
    assert [len(s.frames) for s in segments] == [5, 4, 4, 4]
    assert not np.array_equal(whole, pipe(image, "zoom in", generator=4).frames)


def test_saved_and_loaded_it_makes_the_same_video(pipe, image, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = SwiftI2VPipeline.from_pretrained(tmp_path, device="cpu")
    assert again.config == pipe.config
    first, second = (p(image, "pan left", generator=1).frames for p in (pipe, again))
    assert np.array_equal(first, second)


def test_refining_stage_ones_own_clip_is_generating(pipe, image):
    conditions = pipe.encode(image, "pan left", pipe.config, Stopwatch())
    motion = pipe.generate_motion_reference(image, conditions, 5, pipe.config)
    refined = np.concatenate(
        [s.frames for s in pipe.refine(motion.frames, image, "pan left", generator=5)]
    )
    assert np.array_equal(refined, pipe(image, "pan left", generator=5).frames)


@pytest.mark.parametrize("done", [1, 2, 4])
def test_a_resumed_run_is_the_uninterrupted_one(pipe, image, done):
    conditions = pipe.encode(image, "p", pipe.config, Stopwatch())
    motion = pipe.generate_motion_reference(image, conditions, 5, pipe.config)
    whole = list(pipe.synthesize(motion, image, conditions, 5, pipe.config))
    finished = KeptSegments({s.index: s.latents.clone() for s in whole[:done]})
    resumed = list(pipe.synthesize(motion, image, conditions, 5, pipe.config, store=finished))
    for a, b in zip(whole, resumed, strict=True):
        assert np.array_equal(a.frames, b.frames)
        assert torch.equal(a.latents, b.latents)


def test_finished_latents_of_another_shape_are_refused(pipe, image):
    conditions = pipe.encode(image, "p", pipe.config, Stopwatch())
    motion = pipe.generate_motion_reference(image, conditions, 5, pipe.config)
    store = KeptSegments({0: torch.zeros(1)})
    with pytest.raises(errors.ShapeError, match="segment 0"):
        list(pipe.synthesize(motion, image, conditions, 5, pipe.config, store=store))


def test_a_longer_clip_starts_like_the_shorter_one(pipe, image):
    """The same motion, one segment more: Stage II's first segments do not change."""
    motion = np.random.default_rng(1).integers(0, 256, (21, 16, 16, 3), dtype=np.uint8)
    clips = [
        np.concatenate([s.frames for s in pipe.refine(motion[:n], image, "p", generator=2)])
        for n in (17, 21)
    ]
    assert np.array_equal(clips[0], clips[1][:17])


def test_nothing_reads_past_the_segment(pipe, image):
    """The reference of later frames does not reach earlier segments: it is encoded lazily."""
    motion = np.random.default_rng(1).integers(0, 256, (17, 16, 16, 3), dtype=np.uint8)
    other = motion.copy()
    other[9:] = 0
    streams = [pipe.refine(m, image, "p", generator=2) for m in (motion, other)]
    for _ in range(2):
        first, second = (next(s) for s in streams)
        assert np.array_equal(first.frames, second.frames)
    first, second = (next(s) for s in streams)
    assert not np.array_equal(first.frames, second.frames)


def test_reference_is_encoded_only_as_far_as_asked_and_then_forgotten(pipe, image):
    motion = np.zeros((17, 16, 16, 3), dtype=np.uint8)
    reference = HybridReference(
        MotionReference(motion), image_to_tensor(image), pipe.components.stage2_vae
    )
    reference.latents((0, 1))
    assert "2/5 encoded" in repr(reference)
    reference.latents((0, 2, 3))
    reference.forget_before(3)
    assert reference.latents((0, 3)).shape[2] == 2
    with pytest.raises(errors.ShapeError, match=r"\[2\] are no longer held"):
        reference.latents((2,))


@pytest.mark.parametrize("kind", ["block", "wan21", "wan22"])
def test_the_hybrid_reference_is_the_upsampled_clip_with_the_photo_first(pipe, image, kind):
    vae = {
        "block": lambda: pipe.components.stage2_vae,
        "wan21": lambda: build(diffusers.AutoencoderKLWan, **WAN21_VAE),
        "wan22": lambda: build(diffusers.AutoencoderKLWan, **WAN22_VAE),
    }[kind]()
    photo = image_to_tensor(image)
    motion = np.random.default_rng(1).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    whole = resize_video(frames_to_video(motion), SIZE, SIZE, "lanczos")
    whole[:, :, :1] = photo
    expected = StreamingEncoder(vae).encode(whole)
    reference = HybridReference(MotionReference(motion), photo, vae)
    assert torch.equal(reference.latents((0, 1, 2)), expected)
    assert torch.equal(reference.latents((0,)), StreamingEncoder(vae).encode(photo))


def test_a_reference_without_the_photo_keeps_the_photo_as_anchor(pipe, image):
    vae, photo = pipe.components.stage2_vae, image_to_tensor(image)
    motion = np.random.default_rng(1).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    plain = HybridReference(MotionReference(motion), photo, vae)
    other = HybridReference(
        MotionReference(motion), photo, vae, Stage2Config(reference_start="motion")
    )
    whole = resize_video(frames_to_video(motion), SIZE, SIZE, "lanczos")
    assert torch.equal(other.latents((0, 1, 2)), StreamingEncoder(vae).encode(whole))
    assert torch.equal(other.anchor(), plain.anchor())
    assert torch.equal(plain.anchor(), plain.latents((0,)))


def test_super_resolution_does_not_see_the_photo(pipe, image):
    """Neither in the first frame nor in any later one; with the photo as anchor all see it."""
    motion = np.random.default_rng(1).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    inverted = ImageOps.invert(image)
    for blind in (True, False):
        changes = {"anchor": "generated", "shows_anchor": False, "reference_start": "motion"}
        stage2 = dataclasses.replace(pipe.config.stage2, **(changes if blind else {}))
        config = dataclasses.replace(pipe.config, num_frames=9, stage2=stage2)
        first, second = (
            np.concatenate([part.frames for part in pipe.refine(motion, photo, "", config=config)])
            for photo in (image, inverted)
        )
        assert len(first) == 9
        for frame, other in zip(first, second, strict=True):
            assert np.array_equal(frame, other) is blind


class Recorder(torch.nn.Module):
    """Stands where the transformer stands and keeps what it was given."""

    def __init__(self, model: SegmentTransformer3DModel) -> None:
        super().__init__()
        self.model = model
        self.calls: list[Any] = []
        self.config, self.dtype = model.config, model.dtype

    def forward(self, hidden, sigma, embeds, temporal_positions, num_given):
        self.calls.append((hidden.clone(), sigma.clone(), list(temporal_positions)))
        return self.model(hidden, sigma, embeds, temporal_positions, num_given)


def run_recorded(pipe: Any, image: Any, **settings: Any) -> tuple[Any, Any, Any, Any]:
    config = dataclasses.replace(
        pipe.config.stage2, sampling=SamplingConfig(num_inference_steps=3), **settings
    )
    recorder = Recorder(pipe.components.stage2_transformer)
    stage2: Any = Stage2Pipeline(recorder, pipe.components.stage2_vae)  # type: ignore[arg-type]
    motion = np.random.default_rng(1).integers(0, 256, (25, 16, 16, 3), dtype=np.uint8)
    reference = HybridReference(
        MotionReference(motion), image_to_tensor(image), pipe.components.stage2_vae
    )
    latents = {0: reference.latents((0,))}
    conditions = Conditions(prompt_embeds=torch.randn(1, 4, 16))
    windows = []
    for done in stage2.stream(reference, conditions, 7, config):
        windows.append(done.segment)
        latents |= dict(zip(done.segment.target, done.latents.split(1, dim=2), strict=True))
    full = HybridReference(
        MotionReference(motion), image_to_tensor(image), pipe.components.stage2_vae
    )
    return recorder.calls, windows, latents, full.latents(tuple(range(7)))


@torch.no_grad()
@pytest.mark.parametrize(("size", "context"), [(2, 1), (3, 2), (1, 3), (2, 0), (4, 1)])
def test_anchor_and_context_reach_the_model_bit_identical_at_every_step(pipe, image, size, context):
    calls, windows, latents, reference = run_recorded(
        pipe, image, segment_size=size, context_size=context
    )
    assert len(calls) == 3 * len(windows)
    for number, (hidden, sigma, positions) in enumerate(calls):
        window = windows[number // 3].window
        given = len(window) - len(windows[number // 3].target)
        for place, frame in enumerate(window[:given]):
            assert torch.equal(hidden[:, :768, place], latents[frame][:, :, 0])
            assert sigma[0, place] == 0
        assert torch.equal(hidden[:, 768:], reference[:, :, list(window)])
        expected = plan_sigmas(3)[number % 3]
        assert sigma[0, given:].tolist() == pytest.approx([expected] * (len(window) - given))
        assert positions == list(range(len(window)))


@torch.no_grad()
def test_given_frames_are_predicted_where_they_are_asked_for(pipe):
    """Predict all frames, as a loss on the whole window does; sampling leaves out given ones."""
    segment = plan_segments(5, 2, 1)[1]
    hidden, sigma = torch.randn(1, 1536, 4, 4, 4), torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    arguments = (segment, hidden, sigma, torch.randn(1, 4, 16), pipe.config.stage2)
    transformer = pipe.components.stage2_transformer
    whole = predict_window(transformer, *arguments)
    assert (whole.abs().amax(dim=(0, 1, 3, 4)) > 0).all()
    targets = predict_window(transformer, *arguments, num_skipped=2)
    torch.testing.assert_close(targets, whole[:, :, 2:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_open_points_are_settings(pipe, image):
    calls, windows, latents, _ = run_recorded(
        pipe, image, segment_size=2, context_size=1, temporal_positions="absolute",
        context_reference="finished", clean_sigma="target",
    )  # fmt: skip
    hidden, sigma, positions = calls[3]  # first step of the second segment
    assert positions == list(windows[1].window) == [0, 2, 3, 4]
    assert torch.equal(hidden[:, 768:, 1], latents[2][:, :, 0])
    assert sigma.unique().tolist() == [1.0]


@torch.no_grad()
def test_one_window_over_everything_is_a_plain_wan22_denoise():
    """Against diffusers' own transformer, scheduler and conditioning of Wan2.2-TI2V."""
    base = build(diffusers.WanTransformer3DModel, in_channels=4, out_channels=4, **TINY_WAN)
    vae = build(diffusers.AutoencoderKLWan, **WAN22_VAE)
    stage2 = Stage2Pipeline(SegmentTransformer3DModel.from_base(base), vae)
    photo = torch.rand(1, 3, 1, 64, 96) * 2 - 1
    motion = np.random.default_rng(1).integers(0, 256, (17, 16, 24, 3), dtype=np.uint8)
    embeds = torch.randn(1, 6, 16)
    config = Stage2Config(segment_size=4, context_size=0)
    reference = HybridReference(MotionReference(motion), photo, vae)
    (result,) = stage2.stream(reference, Conditions(prompt_embeds=embeds), 11, config)

    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)  # type: ignore[no-untyped-call]
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    anchor = reference.latents((0,))
    latents = draw_noise((4, 4, 6), range(5), 11, "cpu", stage="stage2")
    tokens = torch.ones(5, 2, 3)
    tokens[0] = 0  # the given frame has timestep 0
    for timestep in scheduler.timesteps:
        latents[:, :, :1] = anchor
        velocity = base(latents, (tokens * timestep).flatten()[None], embeds, return_dict=False)[0]
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(result.latents, latents[:, :, 1:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_stage_one_is_the_plain_wan21_recipe(image):
    """Against diffusers' WanImageToVideoPipeline with the same tiny weights and noise."""
    vae = build(diffusers.AutoencoderKLWan, **WAN21_VAE)
    transformer = build(
        diffusers.WanTransformer3DModel, in_channels=12, out_channels=4, image_dim=8,
        added_kv_proj_dim=48, **TINY_WAN,
    )  # fmt: skip
    clip_config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        image_size=SIZE, patch_size=16,
    )  # fmt: skip
    clip = build(CLIPVisionModel, config=clip_config)
    embeds, negative = torch.randn(2, 1, 512, 16).unbind(0)
    # Of the encoder's own size, or diffusers would crop the photo and smooth it.
    processor = make_image_processor(SIZE)
    noise = draw_noise((4, SIZE // 8, SIZE // 8), range(3), 5, "cpu", stage="stage1")
    kind: Any = diffusers.WanImageToVideoPipeline
    theirs = kind(
        tokenizer=None, text_encoder=None, vae=vae, image_encoder=clip, image_processor=processor,
        transformer=transformer,
        scheduler=ExplicitSigmas(shift=5.0),  # type: ignore[no-untyped-call]
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        image=image, prompt_embeds=embeds, negative_prompt_embeds=negative,
        height=SIZE, width=SIZE, num_frames=9, num_inference_steps=4,
        guidance_scale=3.0, latents=noise.clone(), output_type="pt",
    ).frames  # fmt: skip
    ours = Stage1Pipeline(transformer, vae)(
        image_to_tensor(image),
        Conditions(
            prompt_embeds=embeds,
            negative_prompt_embeds=negative,
            image_embeds=encode_image(clip, processor, image),
        ),
        num_frames=9,
        seed=5,
        config=Stage1Config(sampling=SamplingConfig(guidance_scale=3.0)),
    )
    assert ours.displacement is None  # it generates pixels alone
    assert expected.std() > 1e-3
    torch.testing.assert_close(
        (ours.video[0].transpose(0, 1) + 1) / 2, expected[0], atol=1e-4, rtol=0
    )


class ExplicitSigmas(diffusers.FlowMatchEulerDiscreteScheduler):
    """diffusers' scheduler with the few-step grid, which its pipeline cannot be given."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        super().set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], device=device)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 18}, r"num_frames 18 does not fit.*17 and 21"),
        ({"height": 72}, r"height 72 does not fit.*64 and 128"),
        ({"width": 80}, r"width 80 does not fit.*64 and 128"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_any_work(pipe, image, changes, message):
    events: list[Progress] = []
    config = change(pipe, **changes)
    with pytest.raises(errors.ShapeError, match=message):
        next(iter(pipe.stream(image, "p", config=config, on_progress=events.append)))
    assert events == []


def test_an_image_of_another_size_is_refused(pipe):
    with pytest.raises(errors.ShapeError, match="fit it first"):
        pipe(Image.new("RGB", (32, 64)), "p")


def test_a_clip_of_another_aspect_or_length_is_refused(pipe, image):
    with pytest.raises(errors.ShapeError, match="aspects differ"):
        next(pipe.refine(np.zeros((17, 16, 32, 3), np.uint8), image, "p"))
    with pytest.raises(errors.ShapeError, match="num_frames 18"):
        next(pipe.refine(np.zeros((18, 16, 16, 3), np.uint8), image, "p"))


def test_progress_names_every_model_call_and_may_stop_the_run(pipe, image):
    events: list[Progress] = []
    pipe(image, "p", on_progress=events.append)
    calls = [(e.stage, e.segment, e.step) for e in events]
    assert calls == [("stage1", 0, 1), ("stage1", 0, 2)] + [
        ("stage2", segment, step) for segment in range(4) for step in (1, 2)
    ]

    def stop(event: Progress) -> None:
        if (event.segment, event.step) == (1, 1):
            raise errors.CancelledError("enough")

    stream = pipe.stream(image, "p", on_progress=stop)
    assert next(stream).index == 0
    with pytest.raises(errors.CancelledError, match="enough"):
        next(stream)


def test_nan_in_a_model_names_stage_segment_and_step(image):
    pipe = tiny_pipeline()
    stream = pipe.stream(image, "p")
    assert next(stream).index == 0
    pipe.components.stage2_transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(errors.NumericalError, match=r"Stage II, segment 1 .* step 1"):
        next(stream)


def test_guidance_mixes_the_negative_prompt_in(pipe, image):
    plain = pipe(image, "pan left").frames
    guided = pipe(image, "pan left", guidance_scale=3.0, negative_prompt="blurry").frames
    assert not np.array_equal(plain, guided)


def test_low_strength_stays_near_the_reference(pipe, image):
    motion = np.random.default_rng(1).integers(0, 256, (17, 16, 16, 3), dtype=np.uint8)
    upsampled = resize_video(frames_to_video(motion), SIZE, SIZE, "lanczos")
    distances = []
    for strength in (0.05, 1.0):
        config = pipe.configure(num_frames=17, strength=strength)
        frames = np.concatenate([s.frames for s in pipe.refine(motion, image, "p", config=config)])
        distances.append((frames_to_video(frames) - upsampled)[:, :, 1:].abs().mean().item())
    assert distances[0] < 0.5 * distances[1]


def test_decoded_latents_are_the_frames(pipe, image):
    segments = list(pipe.stream(image, "p", generator=1))
    decoder = StreamingDecoder(pipe.components.stage2_vae)
    photo = StreamingEncoder(pipe.components.stage2_vae).encode(image_to_tensor(image))
    latents = torch.cat([photo, *(s.latents for s in segments)], dim=2)
    video = ((decoder.decode(latents)[0].permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy()
    assert np.array_equal(video, np.concatenate([s.frames for s in segments]))
