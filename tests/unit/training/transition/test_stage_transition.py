"""Stage-transition samples: what decides them, what they look like, and how they are stored."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from swifti2v.config import GenerationConfig, SamplingConfig, Stage1Config, parse_config
from swifti2v.errors import ConfigError, InputError, ShapeError
from swifti2v.media import (
    downscale_video,
    frames_to_video,
    open_writer,
    read_clip,
    resize_video,
    video_to_frames,
)
from swifti2v.models.vae.streaming import StreamingDecoder, StreamingEncoder
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.shapes import PixelShape
from swifti2v.training.data.decoding import decode_clip, decode_pair
from swifti2v.training.data.readers import read_manifest
from swifti2v.training.data.samples import Manifest, MediaFile, Reject, Sample, TarMember
from swifti2v.training.transition.samples import (
    ClipWindow,
    TransitionConfig,
    TransitionDraw,
    TransitionSample,
    describe_run,
    draw_for,
    make_row,
    make_transition_sample,
    read_window,
    take_shard,
)
from swifti2v.training.transition.store import TransitionStore, file_stem
from tests.helpers.tiny import NUM_FRAMES, SETTINGS, SIZE, tiny_pipeline

GENERATION = parse_config(GenerationConfig, SETTINGS, "tests.helpers.tiny")
CONFIG = TransitionConfig(generation=GENERATION)
PARAMETERS: dict[str, Any] = {"settings": {"seed": 0, "sigma": [0.2, 0.6]}, "prompt": "zoom"}


@pytest.fixture(scope="module")
def pipe() -> SwiftI2VPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def clip() -> Any:
    return np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, SIZE, SIZE, 3), dtype=np.uint8)


def make_sample(num_frames: int = 5) -> TransitionSample:
    frames = np.random.default_rng(1).integers(0, 256, (num_frames, 16, 16, 3), dtype=np.uint8)
    return TransitionSample(
        frames=frames,
        draw=TransitionDraw(0.5, 3, 0.0),
        sigmas=(0.5, 0.0),
        psnr=30.0,
        still_psnr=20.0,
    )


def test_a_sample_is_the_clip_scaled_down_and_redrawn(pipe, clip):
    sample = make_transition_sample(pipe, clip, "zoom", "a", CONFIG)
    assert sample.draw == draw_for(CONFIG, "a")
    assert sample.sigmas[0] == sample.draw.sigma
    assert sample.sigmas[-1] == 0
    small = resize_video(frames_to_video(clip), SIZE // 4, SIZE // 4, "area")
    conditions = pipe.encoder(_first(clip), "zoom")
    with torch.inference_mode():
        redrawn = pipe.stage1.redraw(
            small, conditions, sample.draw.seed, GENERATION.stage1, sample.draw.sigma
        )
    assert sample.frames.dtype == np.uint8
    assert np.array_equal(sample.frames, video_to_frames(redrawn.video))


def test_the_less_noise_the_nearer_it_is_to_the_clip_through_the_vae(pipe, clip):
    vae = pipe.components.stage1_vae
    plain = StreamingDecoder(vae).decode(StreamingEncoder(vae).encode(downscale_video(clip, 4)))
    distances = []
    for sigma in (1e-4, 0.3, 1.0):
        config = dataclasses.replace(CONFIG, sigma_low=sigma, sigma_high=sigma)
        frames = make_transition_sample(pipe, clip, "zoom", "a", config).frames
        distances.append(np.abs(frames.astype(float) - video_to_frames(plain)).mean())
    assert distances[0] < 0.2  # of 255: rounding to 8 bits and a ten-thousandth of noise
    assert distances[0] < 0.1 * distances[1] < 0.1 * distances[2]


def test_a_sample_depends_on_prompt_id_and_seed_only(pipe, clip):
    def make(prompt: str = "zoom", sample_id: str = "a", seed: int = 0) -> Any:
        config = dataclasses.replace(CONFIG, seed=seed, sigma_low=0.9, sigma_high=0.9)
        return make_transition_sample(pipe, clip, prompt, sample_id, config).frames

    first = make()
    others = [make(prompt="pan"), make(sample_id="b"), make(seed=1)]
    assert np.array_equal(first, make())  # whatever was made in between
    assert not any(np.array_equal(first, other) for other in others)


def test_guidance_uses_the_negative_prompt(pipe, clip):
    sampling = SamplingConfig(num_inference_steps=2, guidance_scale=3.0)
    guided = dataclasses.replace(
        GENERATION, negative_prompt="blurry", stage1=Stage1Config(sampling=sampling)
    )
    plain = make_transition_sample(pipe, clip, "zoom", "a", CONFIG).frames
    frames = make_transition_sample(
        pipe, clip, "zoom", "a", dataclasses.replace(CONFIG, generation=guided)
    ).frames
    assert not np.array_equal(plain, frames)


@given(
    st.text(max_size=8), st.integers(), st.floats(0.001, 1), st.floats(0.001, 1)
)  # fmt: skip
def test_noise_levels_lie_in_the_range_and_repeat(sample_id, seed, a, b):
    low, high = sorted((a, b))
    config = TransitionConfig(generation=GENERATION, sigma_low=low, sigma_high=high, seed=seed)
    draw = draw_for(config, sample_id)
    assert low <= draw.sigma <= high
    assert draw == draw_for(config, sample_id)
    assert 0 <= draw.seed < 2**48
    assert 0 <= draw.place < 1


def test_noise_levels_are_uniform():
    drawn = np.array([draw_for(CONFIG, f"clip{number}").sigma for number in range(2000)])
    shares = np.histogram(drawn, bins=4, range=(0.2, 0.6))[0] / len(drawn)
    assert np.abs(shares - 0.25).max() < 0.04  # four standard deviations of a share are 0.039
    places = np.array([draw_for(CONFIG, f"clip{number}").place for number in range(2000)])
    assert np.abs(np.histogram(places, bins=4, range=(0, 1))[0] / 2000 - 0.25).max() < 0.04
    assert abs(np.corrcoef(drawn, places)[0, 1]) < 0.1
    assert len({draw_for(CONFIG, f"clip{number}").seed for number in range(2000)}) == 2000


def test_shards_are_taken_from_a_manifest():
    samples = tuple(list_clip(Path(f"{n}.mkv")) for n in range(20))
    listed = Manifest(samples, tuple(Reject(f"r{n}", "too short: it is") for n in range(20)))
    parts = [take_shard(listed, shard, 3) for shard in (1, 2, 3)]
    assert {s.id for part in parts for s in part.samples} == {s.id for s in samples}
    assert sum(len(part.samples) for part in parts) == sum(len(p.rejects) for p in parts) == 20
    assert all(part.samples == tuple(s for s in samples if s in part.samples) for part in parts)


@pytest.mark.parametrize(("low", "high"), [(0, 0.5), (0.6, 0.5), (0.5, 1.1), (float("nan"), 1)])
def test_a_sigma_range_that_cannot_be_is_refused(low, high):
    with pytest.raises(ConfigError, match="sigma range"):
        TransitionConfig(generation=GENERATION, sigma_low=low, sigma_high=high)


def test_frames_of_another_length_or_size_are_refused(pipe, clip):
    for wrong in (clip[:13], clip[:, :32], clip.astype(np.float32)):
        with pytest.raises(ShapeError, match="clip a: frames must be uint8"):
            make_transition_sample(pipe, wrong, "zoom", "a", CONFIG)


def test_the_description_of_a_run_tells_weights_apart(pipe):
    own = describe_run(pipe, CONFIG)
    assert own == json.loads(json.dumps(own)) == describe_run(tiny_pipeline(), CONFIG)
    assert own["weights"] != describe_run(tiny_pipeline(seed=1), CONFIG)["weights"]
    assert own["settings"]["sigma_low"] == 0.2
    assert "stage2" not in own["settings"]["generation"]


def test_a_stored_sample_is_found_with_its_frames(tmp_path):
    store, sample = TransitionStore(tmp_path / "out"), make_sample()
    assert store.find("a/b.mp4", PARAMETERS) is None
    assert not (tmp_path / "out").exists()
    record = store.save("a/b.mp4", sample, 16, PARAMETERS, {"source": "a/b.mp4"})
    assert store.find("a/b.mp4", PARAMETERS) == record == json.loads(json.dumps(record))
    assert (record["sigma"], record["sigmas"], record["source"]) == (0.5, [0.5, 0.0], "a/b.mp4")
    stored = read_clip(store.clip_path("a/b.mp4"))
    assert np.array_equal(stored.frames, sample.frames)
    assert stored.fps == 16
    assert len(list((tmp_path / "out" / "clips").iterdir())) == 2  # nothing half-written is left


def test_a_sample_made_with_other_parameters_is_refused(tmp_path):
    store = TransitionStore(tmp_path)
    store.save("a", make_sample(), 16, PARAMETERS, {})
    other = {"settings": {"seed": 1, "sigma": (0.2, 0.6)}, "prompt": "zoom"}
    with pytest.raises(InputError) as caught:
        store.find("a", other)
    assert "settings.seed is 0 there and 1 now; use the same" in str(caught.value)
    assert "sigma is" not in str(caught.value)


def test_files_of_a_killed_run_do_not_count(tmp_path, caplog):
    store = TransitionStore(tmp_path)
    record = store.save("a", make_sample(), 16, PARAMETERS, {})
    clip, path = store.clip_path("a"), store.clip_path("a").with_suffix(".json")
    text = path.read_text()
    path.unlink()  # killed between clip and record
    clip.with_name(f"{clip.name}.writing.mkv").write_bytes(b"half")
    assert store.find("a", PARAMETERS) is None
    assert store.save("a", make_sample(), 16, PARAMETERS, {}) == record
    assert path.read_text() == text
    assert sorted(p.name for p in clip.parent.iterdir()) == ["a.json", "a.mkv"]
    damages: tuple[Any, ...] = (
        lambda: path.write_text(text[:50]),
        lambda: clip.write_bytes(b"cut off"),
    )
    for damage in damages:
        with caplog.at_level(logging.WARNING):
            damage()
            assert store.find("a", PARAMETERS) is None
        assert "made again" in caplog.text
        caplog.clear()
        store.save("a", make_sample(), 16, PARAMETERS, {})
        assert store.find("a", PARAMETERS) is not None


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        TransitionStore(tmp_path / "file")


@given(st.text(min_size=1, max_size=200), st.text(min_size=1, max_size=200))
def test_file_names_fit_and_tell_ids_apart(first, second):
    names = [file_stem(text) for text in (first, second)]
    assert (names[0] == names[1]) == (first == second)
    for name in names:
        assert len(f"{name}.writing.mkv".encode()) <= 255
        assert "/" not in name
        assert not name.startswith(".")


def save_ramp(path: Path, num_frames: int = 40, size: int = SIZE, fps: int = 16) -> Path:
    """A clip whose every frame is of a grey of its own."""
    frames = np.zeros((num_frames, size, size, 3), np.uint8)
    frames += np.arange(num_frames, dtype=np.uint8)[:, None, None, None] * 6
    with open_writer(path, height=size, width=size, fps=fps, codec="ffv1") as writer:
        writer.write(frames)
    return path


def list_clip(path: Path, **values: Any) -> Sample:
    return Sample(id=path.name, media=MediaFile(path), kind="video", prompt="zoom", **values)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("start", "end"), [(0.0, None), (0.25, None), (0.3, 2.0)])
def test_training_reads_the_very_frames_a_sample_was_made_of(tmp_path, seed, start, end):
    config = dataclasses.replace(CONFIG, seed=seed)
    sample = list_clip(save_ramp(tmp_path / "a.mkv"), start=start, end=end)
    window = read_window(sample, config)
    assert isinstance(window, ClipWindow)
    assert window.frames.shape == (NUM_FRAMES, SIZE, SIZE, 3)
    first = window.frames[0, 0, 0, 0] // 6
    assert window.start == first / 16
    assert np.array_equal(window.frames[:, 0, 0, 0] // 6, np.arange(first, first + NUM_FRAMES))
    assert start <= window.start < window.end <= (end or 2.5) + 1 / 16
    store = TransitionStore(tmp_path / "out")
    low = downscale_video(window.frames, 4)
    made = TransitionSample(
        frames=video_to_frames(low),
        draw=TransitionDraw(0.5, 3, 0.0),
        sigmas=(0.5, 0.0),
        psnr=30.0,
        still_psnr=20.0,
    )
    store.save(sample.id, made, 16, PARAMETERS, {})
    clip = store.clip_path(sample.id)
    row = make_row(sample, clip, window.start, window.end, store.directory)
    path = store.directory / "manifest.jsonl"
    path.write_text(json.dumps(row))
    manifest = read_manifest(path)
    assert manifest.rejects == ()
    (again,) = manifest.samples
    bucket = PixelShape(NUM_FRAMES, SIZE, SIZE)
    for rng in (0, 1):  # nothing is left to draw
        frames, reference = decode_pair(again, bucket, 16, np.random.default_rng(rng))
        assert np.array_equal(frames, window.frames)
        assert np.array_equal(reference, made.frames)


def test_windows_differ_between_seeds_and_cover_the_clip(tmp_path):
    sample = list_clip(save_ramp(tmp_path / "a.mkv"))
    starts = set()
    for seed in range(8):
        window = read_window(sample, dataclasses.replace(CONFIG, seed=seed))
        assert isinstance(window, ClipWindow)
        starts.add(round(window.start * 16))
    assert starts <= set(range(40 - NUM_FRAMES + 1))
    assert len(starts) > 4
    assert max(starts) - min(starts) > 12


def test_rates_that_are_no_whole_numbers_keep_the_window(tmp_path):
    generation = dataclasses.replace(GENERATION, fps=24)
    path = tmp_path / "a.mkv"
    frames = np.random.default_rng(2).integers(0, 256, (40, SIZE, SIZE, 3), dtype=np.uint8)
    with open_writer(path, height=SIZE, width=SIZE, fps=30000 / 1001, codec="ffv1") as writer:
        writer.write(frames)
    config = TransitionConfig(generation=generation, seed=5)
    window = read_window(list_clip(path), config)
    assert isinstance(window, ClipWindow)
    exact = list_clip(path, start=window.start, end=window.end)
    bucket = PixelShape(NUM_FRAMES, SIZE, SIZE)
    found = decode_clip(exact, bucket, 24, np.random.default_rng(9))
    assert np.array_equal(found, window.frames)


def test_clips_that_cannot_be_used_say_why(tmp_path):
    (tmp_path / "text.mkv").write_text("no video")
    good = save_ramp(tmp_path / "good.mkv")
    media = TarMember(archive=good, member="a.mkv", offset=0, num_bytes=1)
    cases = {
        "too short": list_clip(save_ramp(tmp_path / "short.mkv", num_frames=16)),
        "too small": list_clip(save_ramp(tmp_path / "small.mkv", size=32)),
        "cannot be read": list_clip(tmp_path / "text.mkv"),
        "has a reference": list_clip(good, reference=good),
        "not as stated": list_clip(good, fps=30),
        "in an archive": dataclasses.replace(list_clip(good), media=media),
        "no clip": dataclasses.replace(list_clip(good), kind="image"),
    }
    for cause, sample in cases.items():
        reject = read_window(sample, CONFIG)
        assert isinstance(reject, Reject)
        assert (reject.cause, reject.id) == (cause, sample.id)


def _first(frames: Any) -> Any:
    return Image.fromarray(frames[0])
