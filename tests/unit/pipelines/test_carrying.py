"""The photo's detail carried along: what it must give, and that nothing else changes it."""

import threading
from contextlib import closing
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from swifti2v.config import GenerationConfig, Stage2Config, parse_config
from swifti2v.errors import ConfigError, NumericalError, ShapeError
from swifti2v.evaluation.baselines import carried_baseline, lanczos_baseline
from swifti2v.evaluation.metrics.detail_coherence import detail_coherence
from swifti2v.evaluation.metrics.fidelity import clip_psnr
from swifti2v.media import downscale, frames_to_video, resize_video
from swifti2v.media.flow import optical_flow
from swifti2v.models.loading.sources import find_model
from swifti2v.pipelines import carrying
from swifti2v.pipelines.displacement import enlarge
from swifti2v.pipelines.progress import Stopwatch
from swifti2v.pipelines.transition import (
    HybridReference,
    MotionReference,
    ReferenceFrames,
    make_reference,
)
from swifti2v.pipelines.upscale import second_pass
from swifti2v.shapes import Crop
from swifti2v.training.nano.clip_references import carry_known
from tests.helpers.evaluation_clips import panning_clip
from tests.helpers.tiny import SIZE, KeptSegments, tiny_pipeline

HEIGHT, WIDTH, LOW = 96, 160, 4
CARRIED = Stage2Config(reference_detail="carried")
PLAIN = Stage2Config()


def photo_of(clip: Any) -> torch.Tensor:
    return frames_to_video(clip[:1])


def carried(clip: Any, displacement: torch.Tensor | None = None) -> torch.Tensor:
    motion = MotionReference(downscale(clip, LOW), displacement)
    reference = ReferenceFrames(motion, photo_of(clip), CARRIED)
    with closing(reference):
        return reference.read(0, len(clip))


def move(num_frames: int, right: float, down: float = 0.0) -> torch.Tensor:
    """The same displacement a frame everywhere, in low-resolution pixels."""
    field = torch.tensor([right, down]).view(1, 2, 1, 1) * torch.arange(num_frames).view(
        -1, 1, 1, 1
    )
    return field.expand(-1, -1, HEIGHT // LOW, WIDTH // LOW)


def test_a_still_clip_gives_the_photo_in_every_frame():
    still = np.repeat(panning_clip(1), 5, axis=0)
    levels = (carried(still) - photo_of(still)).abs() * 127.5
    assert levels.max() < 1.5  # the low-resolution clip is rounded to a level
    assert levels.mean() < 0.2


def test_a_moved_photo_keeps_its_detail():
    clip = panning_clip(9, 2)
    low = downscale(clip, LOW)
    plain, rich = lanczos_baseline(low, HEIGHT, WIDTH), carried_baseline(low, clip[0])
    assert np.array_equal(rich[0], clip[0])
    assert detail_coherence(plain, clip) < 0.3
    assert detail_coherence(rich, clip) > 0.8
    assert clip_psnr(rich[1:], clip[1:]) > clip_psnr(plain[1:], clip[1:]) + 3


def test_without_confidence_it_is_the_enlarged_clip_bit_by_bit():
    # Another picture: nothing of the photo is recognized.
    clip = panning_clip(5, 4)
    dark, light = clip // 8, 255 - clip // 8
    mixed = np.concatenate([dark[:1], light[1:]])
    expected = make_reference(MotionReference(downscale(mixed, LOW)), photo_of(mixed), PLAIN)
    assert torch.equal(carried(mixed), expected)
    assert torch.equal(carried(mixed, move(5, 0.0)), expected)


def test_where_a_given_motion_leaves_the_photo_the_mirrored_detail_is_added():
    clip = panning_clip(9, 4)
    photo = photo_of(clip)
    plain = make_reference(MotionReference(downscale(clip, LOW)), photo, PLAIN)
    added = (carried(clip, move(9, 1.0)) - plain)[0, :, 8]
    moved = torch.cat(
        [photo[..., 32:], photo.flip(-1)[..., :32]], dim=-1
    )  # 32 columns came into view
    low = resize_video(moved, HEIGHT // LOW, WIDTH // LOW, "area")
    detail = (moved - resize_video(low, HEIGHT, WIDTH, "lanczos"))[0, :, 0]
    strip = (..., slice(WIDTH - 20, WIDTH - 4))
    error = added[strip] - carrying.MIRRORED * detail[strip]
    assert error.square().mean() < 0.01 * detail[strip].square().mean()


def test_new_and_covered_places_are_the_enlarged_clip():
    clip = panning_clip(9, 4).copy()
    clip[4:, 32:56, 32:56] = 255 - clip[4:, 32:56, 32:56]  # something appears
    expected = make_reference(MotionReference(downscale(clip, LOW)), photo_of(clip), PLAIN)
    added = (carried(clip) - expected).abs().mean(dim=1)[0]  # [T, H, W]
    inside = added[8, 16:80, 72:120].mean()
    assert inside > 0.05
    assert added[8, 38:50, 38:50].mean() < 0.05 * inside
    assert added[8, :, -28:].mean() < 0.05 * inside  # 32 columns came into view


@pytest.mark.parametrize("kind", ["searched", "given"])
def test_frames_do_not_depend_on_how_many_are_read_or_in_which_order(kind):
    clip = panning_clip(9, 4)
    whole = carried(clip, None if kind == "searched" else move(9, 1.0))
    given = None if kind == "searched" else move(9, 1.0)
    motion = MotionReference(downscale(clip, LOW), given)
    with closing(ReferenceFrames(motion, photo_of(clip), CARRIED)) as reference:
        for start, stop in ((5, 9), (1, 5), (0, 1), (6, 7), (0, 3)):
            assert torch.equal(reference.read(start, stop), whole[:, :, start:stop])


def test_a_frame_depends_on_itself_the_first_and_the_photo_alone():
    clip = panning_clip(9, 4)
    low, photo = downscale(clip, LOW), photo_of(clip)
    whole = make_reference(MotionReference(low), photo, CARRIED)
    some = [0, 3, 8]
    assert torch.equal(
        make_reference(MotionReference(low[some]), photo, CARRIED), whole[:, :, some]
    )


def test_known_displacement_takes_the_place_of_the_search():
    clip = panning_clip(9, 4)
    exact = carried(clip, move(9, 1.0))[0, :, :, :, : WIDTH - 48]
    truth = frames_to_video(clip)[0, :, :, :, : WIDTH - 48]
    assert ((exact - truth).abs() * 127.5).amax() < 4
    assert ((exact - truth).abs() * 127.5).mean() < 0.2
    wrong = carried(clip, move(9, 0.5))[0, :, :, :, : WIDTH - 48]
    assert (wrong - truth).abs().mean() > 4 * (exact - truth).abs().mean()


@pytest.mark.parametrize("cell", [2, 4, 8])
def test_displacement_of_cells_is_that_of_their_pixels(cell):
    """A field that is straight between the cells' centres, as Stage I's is read."""
    clip = panning_clip(5, 4)
    height, width = HEIGHT // LOW, WIDTH // LOW
    cells = move(5, 1.0)[..., ::cell, ::cell].clone()
    row = torch.arange(height // cell)[:, None] * cell
    cells[:, 1] += 0.01 * row * torch.arange(5).view(-1, 1, 1)
    pixels = enlarge(cells.transpose(0, 1)[None], height, width)[0].transpose(0, 1)
    assert pixels.shape == (5, 2, height, width)
    found, expected = carried(clip, cells), carried(clip, pixels)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert not torch.equal(found, carried(clip, move(5, 1.0)))


def test_the_same_displacement_in_cells_and_in_pixels_is_carried_alike():
    clip = panning_clip(5, 4)
    pixels = move(5, 1.0)
    torch.testing.assert_close(
        carried(clip, pixels[..., ::4, ::4]), carried(clip, pixels), atol=1e-4, rtol=0
    )


def test_displacement_of_another_clip_is_refused():
    clip = panning_clip(5, 4)
    with pytest.raises(ShapeError, match=r"is \[4, 2, 24, 40\]; .* needs \[5, 2, 24, 40\]"):
        carried(clip, move(4, 1.0))
    for wrong in (move(5, 1.0)[..., :5, :], move(5, 1.0)[..., :7], move(5, 1.0)[:, :1]):
        with pytest.raises(ShapeError, match="or whole parts of the sides"):
            carried(clip, wrong)
    broken = move(5, 1.0).clone()
    broken[2, 0, 3, 3] = torch.nan
    with pytest.raises(NumericalError, match="has NaN or infinity"):
        carried(clip, broken)


def test_flow_does_not_depend_on_the_number_of_threads():
    first, second = panning_clip(2, 3)
    threads = cv2.getNumThreads()
    flows = []
    try:
        for number in (1, 2, 5):
            cv2.setNumThreads(number)
            flows.append(optical_flow(first, second, "fine"))
    finally:
        cv2.setNumThreads(threads)
    assert np.array_equal(flows[0], flows[1])
    assert np.array_equal(flows[0], flows[2])


def searching() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("motion")]


def test_an_early_end_leaves_no_thread():
    pipe = tiny_pipeline()
    clip = panning_clip(17, 2, SIZE, SIZE)
    config = pipe.configure(**{"stage2.reference_detail": "carried"})
    segments: Any = pipe.refine(downscale(clip, LOW), Image.fromarray(clip[0]), "", config=config)
    next(segments)
    assert searching()
    segments.close()
    assert not searching()


def test_errors_of_the_search_arrive_and_end_it(monkeypatch):
    clip = panning_clip(9, 4)

    def fail(*_: Any) -> None:
        raise ShapeError("no flow")

    monkeypatch.setattr(carrying, "optical_flow", fail)
    with pytest.raises(ShapeError, match="no flow"):
        carried(clip)
    assert not searching()


def test_the_search_looks_only_so_far_ahead():
    asked = []

    class Watched(np.ndarray):
        def __getitem__(self, key: Any) -> Any:
            asked.append(key)
            return super().__getitem__(key)

    clip = np.zeros((90, 16, 16, 3), np.uint8).view(Watched)
    search = carrying.MotionSearch(clip, torch.zeros(1, 3, 1, 64, 64))
    search(1)
    search.close()
    assert max(key for key in asked if isinstance(key, int)) <= carrying.NUM_AHEAD


@pytest.mark.parametrize("done", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one(done):
    pipe = tiny_pipeline()
    clip = panning_clip(17, 2, SIZE, SIZE)
    low, image = MotionReference(downscale(clip, LOW)), Image.fromarray(clip[0])
    config = pipe.configure(**{"stage2.reference_detail": "carried"})
    conditions = pipe.encode(image, "", config, Stopwatch())
    whole = list(pipe.synthesize(low, image, conditions, 3, config))
    finished = KeptSegments({segment.index: segment.latents.clone() for segment in whole[:done]})
    resumed = list(pipe.synthesize(low, image, conditions, 3, config, store=finished))
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(whole, resumed, strict=True))
    plain = pipe.synthesize(low, image, conditions, 3, pipe.config)
    assert not np.array_equal(next(plain).frames, whole[0].frames)


def test_segments_of_any_size_see_the_same_reference():
    clip = panning_clip(17, 2, SIZE, SIZE)
    vae = tiny_pipeline().components.stage2_vae
    windows = ([(0, 1), (0, 1, 2), (0, 2, 3, 4)], [(0, 1, 2, 3, 4)])
    latents = []
    for asked in windows:
        motion = MotionReference(downscale(clip, LOW))
        with closing(HybridReference(motion, photo_of(clip), vae, CARRIED)) as own:
            latents.append([own.latents(window) for window in asked][-1])
    assert torch.equal(latents[0], latents[1][:, :, [0, 2, 3, 4]])


def test_there_must_be_a_photo_to_carry():
    remedy = r"there is no photo .* set stage2\.reference_detail=none"
    with pytest.raises(ConfigError, match=rf"stage2\.reference_start is motion: {remedy}"):
        replace(CARRIED, reference_start="motion")
    with pytest.raises(ConfigError, match=rf"stage2\.anchor is generated: {remedy}"):
        replace(CARRIED, anchor="generated")
    carrying_config = GenerationConfig(stage2=CARRIED)
    assert second_pass(carrying_config).stage2.reference_detail == "none"


def test_presets_say_what_is_carried():
    carried = ("nano", "public", "small", "vibe")
    for name, wanted in (("paper", "none"), *((name, "carried") for name in carried)):
        index, _ = find_model(name)
        config = parse_config(GenerationConfig, index.settings, name)
        assert config.stage2.reference_detail == wanted


@pytest.mark.parametrize("kind", ["searched", "given", "none"])
@pytest.mark.parametrize("crop", [Crop(0, 0, 32, 48), Crop(24, 60, 48, 64), Crop(64, 112, 32, 48)])
def test_a_crop_of_a_reference_is_cut_from_the_whole(kind, crop):
    clip = panning_clip(5, 4)
    motion = MotionReference(downscale(clip, LOW), move(5, 1.0) if kind == "given" else None)
    config = PLAIN if kind == "none" else CARRIED
    with closing(ReferenceFrames(motion, photo_of(clip), config)) as reference:
        whole = reference.read(0, 5)
        part = reference.read_crop([0, 2, 4], crop)
    expected = whole[:, :, [0, 2, 4]][..., crop.rows, crop.columns]
    assert part.shape == (1, 3, 3, crop.height, crop.width)
    torch.testing.assert_close(part, expected, atol=1e-4, rtol=0)


def test_detail_along_a_known_motion_is_that_of_the_same_displacement_given():
    clip = panning_clip(5, 4)
    video, crop = frames_to_video(clip)[0], Crop(8, 32, 80, 96)
    pixels = torch.zeros(2, 5, HEIGHT, WIDTH)
    pixels[0] = 4 * torch.arange(5)[:, None, None]
    inner = (..., crop.rows, crop.columns)
    found = carry_known(video[inner], video[:, :1], pixels[inner], crop, LOW, CARRIED)
    expected = carried(clip, move(5, 1.0))[0][inner]
    margin = (..., slice(24, -24), slice(24, -24))
    torch.testing.assert_close(found[margin], expected[margin], atol=1e-3, rtol=0)
    assert torch.equal(found[:, 0], video[:, 0][inner])
    plain = carry_known(video[inner], video[:, :1], pixels[inner], crop, LOW, PLAIN)
    assert (plain - found)[margin].abs().mean() > 0.01
