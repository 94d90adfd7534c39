"""Cadence, carried coherence and blockiness: each sees its planted defect and forgives the rest."""

import io
import math

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from swifti2v.errors import ShapeError
from swifti2v.evaluation.baselines import lanczos_baseline
from swifti2v.evaluation.metrics.blockiness import blockiness
from swifti2v.evaluation.metrics.cadence import cadence
from swifti2v.evaluation.metrics.carried_coherence import carried_coherence
from swifti2v.evaluation.metrics.temporal import flicker, frame_changes
from swifti2v.media import Frames, downscale
from tests.helpers.evaluation_clips import blurred, panning_clip, texture

HEIGHT, WIDTH = 144, 240


def zooming(num_frames: int, last: float) -> Frames:
    """A camera that goes in to ``last`` of the picture's size."""
    picture = texture(2 * HEIGHT, 2 * WIDTH)
    frames = []
    for part in np.linspace(1, last, num_frames):
        scale = 2 * part
        corner = [(1 - part) * side for side in (WIDTH, HEIGHT)]
        matrix = np.array([[scale, 0, corner[0]], [0, scale, corner[1]]])
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        blur = cv2.GaussianBlur(picture, (0, 0), 0.8 * part)
        frames.append(cv2.warpAffine(blur, matrix, (WIDTH, HEIGHT), flags=flags))
    return np.stack(frames)


def jumping(clip: Frames, times: int = 4) -> Frames:
    """Each frame held for a latent frame, after the photo."""
    held = [0, *(min(len(clip) - 1, 1 + times * ((t - 1) // times)) for t in range(1, len(clip)))]
    return clip[held]


def measured(clip: Frames, photo: Frames) -> float:
    return float(carried_coherence(clip, photo).nanmean())


# Cadence


def test_cadence_of_even_motion_is_one_and_of_jumps_large():
    clip = panning_clip(25, 2)
    assert cadence(clip) == pytest.approx(1, abs=0.05)
    assert cadence(jumping(clip)) > 50
    half = (clip.astype(int) + jumping(clip)).astype(float) / 2
    assert 1.3 < cadence(half.round().astype(np.uint8)) < 10
    assert cadence(np.repeat(clip[:1], 9, axis=0).repeat(2, axis=0)) == 1


def test_cadence_forgives_a_slow_start_and_the_step_from_the_photo():
    clip = panning_clip(50, 1)
    eased = clip[[round(49 * (t / 32) ** 2) for t in range(33)]]
    assert cadence(eased) < 1.6
    sharp = blurred(clip[:25], 2.0)
    sharp[0] = clip[0]
    assert cadence(sharp) == pytest.approx(cadence(blurred(clip[:25], 2.0)), rel=1e-6)


def test_cadence_knows_its_limits():
    clip = panning_clip(25, 2)
    by_two = jumping(clip, 2)
    assert cadence(by_two, 2) > 50
    assert math.isnan(cadence(clip[:9]))
    assert not math.isnan(cadence(clip[:10]))
    changes = frame_changes(iter([clip[:5], clip[5:]]))
    assert torch.equal(changes, frame_changes(clip))
    assert cadence(changes) == cadence(clip)
    assert flicker(changes) == flicker(clip)
    with pytest.raises(ShapeError, match="at least 2"):
        cadence(clip, 1)
    with pytest.raises(ShapeError, match="at least two frames"):
        cadence(clip[:1])


# Blockiness


def mosaic(clip: Frames, share: float, offset: int = 0) -> Frames:
    """Part of every frame replaced by the means of 8-pixel squares."""
    _, height, width, _ = clip.shape
    mixed = []
    for frame in clip:
        rolled = np.roll(frame, (-offset, -offset), (0, 1)).astype(np.float32)
        means = rolled.reshape(height // 8, 8, width // 8, 8, 3).mean((1, 3))
        blocks = np.roll(means.repeat(8, 0).repeat(8, 1), (offset, offset), (0, 1))
        mixed.append((1 - share) * frame + share * blocks)
    return np.stack(mixed).round().astype(np.uint8)


def jpeg(frame: Frames, quality: int) -> Frames:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def test_blockiness_of_pictures_is_one_and_rises_with_blocks():
    clip = np.stack([texture(HEIGHT, WIDTH, seed) for seed in range(3)])
    clean, weak, strong = (blockiness(mosaic(clip, share)).mean() for share in (0, 0.2, 0.5))
    assert clean == pytest.approx(1, abs=0.03)
    assert clean + 0.3 < weak < strong
    assert blockiness(mosaic(clip, 0.5, offset=4)).mean() < 1.02  # another grid
    assert blockiness(mosaic(clip, 0.5, offset=4)[:, 4:, 4:]).mean() > clean + 0.2
    good, bad = (blockiness(jpeg(clip[0], quality)[None])[0] for quality in (97, 20))
    assert good < 1.15
    assert bad > 2


def test_blockiness_is_not_about_texture_edges_or_slopes():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (1, HEIGHT, WIDTH, 3), dtype=np.uint8)
    assert blockiness(noise)[0] == pytest.approx(1, abs=0.02)
    slope = np.linspace(0, 1, WIDTH)[None, None, :, None].repeat(HEIGHT, 1).repeat(3, 3)
    assert blockiness(slope)[0] == pytest.approx(1, abs=0.02)
    flat = np.full((1, HEIGHT, WIDTH, 3), 90, np.uint8)
    assert blockiness(flat)[0] == 1
    edge = np.stack([texture(HEIGHT, WIDTH)])
    edge[:, :, WIDTH // 2 :] //= 2  # a house whose wall lies on the grid
    assert blockiness(edge)[0] == pytest.approx(1, abs=0.06)


def test_blocks_in_a_smooth_sky_are_seen_in_each_frame():
    sky = np.linspace(90, 130, HEIGHT)[None, :, None, None] * np.ones((3, 1, WIDTH, 3))
    sky[1] += 2 * (np.indices((HEIGHT, WIDTH)) // 8 % 2).sum(0)[..., None]
    ratios = blockiness(iter([sky.round().astype(np.uint8)]))
    assert ratios[1] > 3 * max(ratios[0], ratios[2])
    with pytest.raises(ShapeError, match="at least 10 pixels"):
        blockiness(sky[:, :9] / 255)
    with pytest.raises(ShapeError, match="at least 5"):
        blockiness(sky / 255, 4)


# Carried coherence


@pytest.mark.slow
@pytest.mark.parametrize("clip", [panning_clip(17, 2, HEIGHT, WIDTH), zooming(17, 0.75)])
def test_coherence_follows_the_camera_and_falls_with_every_defect(clip):
    photo = clip[0]
    clean = measured(clip, photo)
    assert clean > 0.85
    soft = lanczos_baseline(downscale(clip, 4), HEIGHT, WIDTH)
    assert measured(soft, photo) < 0.65  # the band has what is just above the small clip's
    ghost = ((clip.astype(int) + np.roll(clip, 5, axis=2)) // 2).astype(np.uint8)
    assert measured(ghost, photo) < clean - 0.2
    rng = np.random.default_rng(0)
    invented = soft + rng.normal(0, 12, clip.shape)
    assert measured(invented.clip(0, 255).astype(np.uint8), photo) < 0.4


def test_coherence_forgives_small_local_shifts_and_new_content():
    clip = panning_clip(9, 4, HEIGHT, WIDTH)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    wave = 1.5 * np.sin(x / 40) * np.sin(y / 30)
    moved = np.stack([cv2.remap(f, x + wave, y, cv2.INTER_LANCZOS4) for f in clip])
    assert measured(moved, clip[0]) > 0.8
    clip[8, :, -40:] = 0  # more than came into view
    assert carried_coherence(clip, clip[0])[8] > 0.6


def test_where_the_photo_is_not_found_nothing_is_coherent():
    clip = panning_clip(9, 2, HEIGHT, WIDTH)
    other = np.stack([texture(HEIGHT, WIDTH, seed) for seed in range(20, 29)])
    scores = carried_coherence(other, clip[0])
    assert scores.isnan().tolist() == [index % 4 > 0 or index == 0 for index in range(9)]
    assert max(scores[4], scores[8]) < 0.1
    flat = np.full_like(clip, 128)
    assert measured(flat, clip[0]) == 0
    assert torch.equal(
        carried_coherence(iter([clip[:3], clip[3:]]), clip[0]).nan_to_num(),
        carried_coherence(clip, clip[0]).nan_to_num(),
    )
    with pytest.raises(ShapeError, match="resize the photo first"):
        carried_coherence(clip, clip[0][:, :-2])
