"""Windows of clips, of pictures and of stage-transition samples, cut from memory."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swifti2v.config import Stage2Config
from swifti2v.errors import ConfigError, InputError
from swifti2v.media import frames_to_video, resize_video
from swifti2v.segments import Segment, plan_segments
from swifti2v.shapes import pixel_frames
from swifti2v.training.data.crops import degrade
from swifti2v.training.engine.draws import Draw, draws_of_step, split_batch
from swifti2v.training.nano.material import Material
from swifti2v.training.nano.material_source import MaterialSource, MixConfig, TransitionClip
from swifti2v.training.stages.batches import Stage2Frames
from swifti2v.training.windows import WindowConfig

SIDE, CROP, LOW = 64, 32, 4
CLIPS = MixConfig()
ALL = MixConfig(clips=1, pictures=1, transition=2)


def counting_clip(number: int, num_frames: int = 40, side: int = SIDE) -> np.ndarray:
    """Red tells the column, green the frame and blue the clip."""
    clip = np.zeros((num_frames, side, side, 3), np.uint8)
    clip[..., 0] = 2 * np.arange(side)
    clip[..., 1] = np.arange(num_frames)[:, None, None]
    clip[..., 2] = number
    return clip


def transition_clip(number: int, num_frames: int = 40) -> TransitionClip:
    """Its small version tells columns of its own, and another blue."""
    low = counting_clip(number + 100, num_frames, SIDE // LOW)
    return TransitionClip(f"t{number}", counting_clip(number, num_frames), low, f"prompt {number}")


MATERIAL = Material(
    clips=(counting_clip(0), counting_clip(1), counting_clip(2, 20)),
    stills=(counting_clip(0)[0],),
    pictures=(np.full((90, 100, 3), 200, np.uint8), np.full((200, 300, 3), 210, np.uint8)),
)
TRANSITION = (transition_clip(50), transition_clip(51, 20))
BLIND = Stage2Config(reference_start="motion")


def source(mix: MixConfig = CLIPS, **changes: Any) -> MaterialSource:
    own: dict[str, Any] = {
        "material": MATERIAL,
        "transition": TRANSITION,
        "crop": CROP,
        "downscale": LOW,
    }
    own |= {"lengths": {9: 1.0}, "windows": WindowConfig(), "stage2": Stage2Config()}
    return MaterialSource(mix=mix, **{**own, **changes})


def draw(seed: int = 0, size: int = 8) -> Draw:
    return Draw(seed=seed, step=0, batch_size=size, indices=tuple(range(size)))


def levels(video: Tensor) -> Tensor:
    return (video + 1) * 127.5


def frames_of(segment: Segment) -> list[int]:
    return [pixel for latent in segment.window for pixel in pixel_frames(latent)]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), index=st.integers(0, 2))
def test_a_crop_holds_the_window_of_one_clip(seed, index):
    segment = plan_segments(9)[index]
    batch = source().cut(draw(seed), segment, 33)
    assert batch.segment == segment
    assert batch.latent_frames == segment.window
    assert batch.num_replaced == 0
    assert batch.prompts == ("",) * 8
    offsets = frames_of(segment)
    assert batch.video.shape == batch.reference.shape == (8, 3, len(offsets), CROP, CROP)
    for name, sample in zip(batch.ids, levels(batch.video), strict=True):
        assert sample[2].unique().numel() == 1
        assert name == f"clip {round(float(sample[2, 0, 0, 0]))}"
        assert name != "clip 2"  # it is too short
        start = sample[1, :, 0, 0] - torch.tensor(offsets)
        torch.testing.assert_close(start, start[:1].expand_as(start), atol=1e-3, rtol=0)
        assert 0 <= round(float(start[0])) <= 7
        steps = sample[0].diff(dim=-1)
        torch.testing.assert_close(steps, steps[:1, :1, :1].expand_as(steps), atol=1e-3, rtol=0)


def test_crops_are_mirrored_half_of_the_time():
    batch = source(crop=16).cut(draw(size=64), plan_segments(3)[0], 9)
    steps = [round(float(crop[0, 0, 0, :2].diff()) * 127.5) for crop in batch.video]
    assert set(steps) == {-2, 2}
    assert 16 < steps.count(2) < 48


def whole_references(batch: Stage2Frames, stage2: Stage2Config | None = None) -> Tensor:
    """References of the whole frames of a batch's clips, cut at the batch's places."""
    parts = []
    for name, sample in zip(batch.ids, levels(batch.video).round(), strict=True):
        clip = MATERIAL.clips[int(name[-1])][sample[1, :, 0, 0].int().numpy()]
        columns = (sample[0, 0, 0] / 2).round().long()  # backwards where it is mirrored
        whole = degrade(frames_to_video(clip), LOW, stage2)
        parts.append(whole[:, :, :, :CROP][..., columns])  # all rows of such clips are equal
    return torch.cat(parts)


def test_the_reference_of_a_clip_is_that_of_its_whole_frames():
    batch = source().cut(draw(), plan_segments(5)[0], 17)
    torch.testing.assert_close(batch.reference, whole_references(batch), atol=1e-5, rtol=0)
    assert torch.equal(batch.reference[:, :, 0], batch.video[:, :, 0])
    assert not torch.equal(batch.reference[:, :, 1], batch.video[:, :, 1])


def test_a_window_without_the_anchor_is_cut_with_the_photo_in_front():
    segment = plan_segments(5, shows_anchor=False)[1]
    batch = source().cut(draw(), segment, 17)
    assert segment.window == (3, 4)
    assert batch.latent_frames == (0, 3, 4)
    assert batch.video.shape[2] == 9
    assert torch.equal(batch.reference[:, :, 0], batch.video[:, :, 0])


@pytest.mark.parametrize("mix", [MixConfig(), MixConfig(clips=0, transition=1)])
def test_a_reference_without_the_photo_starts_as_small_as_it_goes_on(mix):
    segment = plan_segments(5)[0]
    own, other = (
        source(mix, stage2=stage2).cut(draw(), segment, 17) for stage2 in (Stage2Config(), BLIND)
    )
    assert torch.equal(own.video, other.video)
    assert torch.equal(own.reference[:, :, 1:], other.reference[:, :, 1:])
    assert torch.equal(own.reference[:, :, 0], own.video[:, :, 0])
    assert not torch.equal(other.reference[:, :, 0], own.video[:, :, 0])
    if mix.clips:
        expected = whole_references(other, BLIND)
        torch.testing.assert_close(other.reference, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_mix_gives_the_shares():
    batch = source(ALL).cut(draw(size=400), plan_segments(3)[0], 9)
    kinds = [name[0] for name in batch.ids]
    assert kinds.count("c") == pytest.approx(100, abs=30)
    assert kinds.count("p") == pytest.approx(100, abs=30)
    assert kinds.count("t") == pytest.approx(200, abs=30)
    for name, prompt, sample in zip(batch.ids, batch.prompts, levels(batch.video), strict=True):
        if name[0] == "p":
            assert round(float(sample.mean())) == 200 + 10 * int(name[-1])
        assert prompt == (f"prompt {name[1:]}" if name[0] == "t" else "")


def test_transition_samples_show_what_stage1_made():
    clip = TRANSITION[0]
    segment = plan_segments(5)[1]
    batch = source(MixConfig(clips=0, transition=1)).cut(draw(), segment, 33)
    frames = frames_of(segment)
    for video, reference in zip(batch.video, batch.reference, strict=True):
        left = round(float(levels(video)[0, 0, 0, 0])) // 2
        assert left % LOW == 0
        assert round(float(levels(video)[0, 0, 0, 1])) == 2 * left + 2  # never mirrored
        part = frames_to_video(clip.frames[frames, :CROP, left : left + CROP])
        assert torch.equal(video, part[0])
        low = slice(left // LOW, (left + CROP) // LOW)
        small = frames_to_video(clip.low[frames, : CROP // LOW, low])
        expected = resize_video(small, CROP, CROP, "lanczos")
        assert torch.equal(reference[:, 1:], expected[0, :, 1:])
        assert torch.equal(reference[:, 0], video[:, 0])
    assert set(batch.ids) == {"t50"}  # the other one is too short


@pytest.mark.slow
def test_a_kind_without_long_clips_gives_its_share_to_the_others():
    short = (transition_clip(50, 20),)
    batch = source(ALL, transition=short).cut(draw(size=60), plan_segments(9)[0], 33)
    assert {name[0] for name in batch.ids} == {"c", "p"}
    batch = source(ALL, transition=short).cut(draw(size=60), plan_segments(5)[0], 17)
    assert {name[0] for name in batch.ids} == {"c", "p", "t"}


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_samples_do_not_depend_on_the_division(seed):
    segment = plan_segments(5)[0]
    own = source(ALL, crop=16)
    (whole,) = draws_of_step(seed, 3, split_batch(8, 1, 1), 0)
    parts = split_batch(8, 2, 2)
    pieces = [
        own.cut(draws_of_step(seed, 3, parts, rank)[micro], segment, 17)
        for micro in range(2)
        for rank in range(2)
    ]
    batch = own.cut(whole, segment, 17)
    for name in ("video", "reference"):
        assert torch.equal(torch.cat([getattr(p, name) for p in pieces]), getattr(batch, name))
    assert sum((p.ids for p in pieces), ()) == batch.ids


def test_crops_and_lengths_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="crop 80 is larger than the clips, 64x64"):
        source(crop=80).cut(draw(), plan_segments(3)[0], 9)
    with pytest.raises(InputError, match="no training clip has 41 frames"):
        source().cut(draw(), plan_segments(11)[0], 41)


@pytest.mark.parametrize("name", ["clips", "pictures", "transition"])
def test_a_mix_of_what_is_not_there_is_refused(name):
    changes: dict[str, Any] = {"transition": ()} if name == "transition" else {}
    if name != "transition":
        changes["material"] = replace(MATERIAL, **{name: ()})
    with pytest.raises(InputError, match=rf"mix\.{name} is .*no {name}"):
        source(ALL, **changes)
    source(replace(ALL, **{name: 0}), **changes)


@pytest.mark.parametrize("shares", [(0, 0, 0), (1, -1, 1)])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ConfigError, match="mix is"):
        MixConfig(**dict(zip(("clips", "pictures", "transition"), shares, strict=True)))
