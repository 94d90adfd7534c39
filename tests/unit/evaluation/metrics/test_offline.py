"""Metrics over time: each must see its own planted defect, and nothing where nothing is."""

import math
import warnings
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.errors import ShapeError
from swifti2v.evaluation.metrics.detail_coherence import detail_coherence, hf_energy_ratio
from swifti2v.evaluation.metrics.drift import drift
from swifti2v.evaluation.metrics.fidelity import first_frame_ssim, ms_ssim, psnr, ssim
from swifti2v.evaluation.metrics.flow import shrink
from swifti2v.evaluation.metrics.noise import noise_sigma, temporal_noise
from swifti2v.evaluation.metrics.seam import latent_start_residuals, seam_score
from swifti2v.evaluation.metrics.series import mean, mean_psnr, slope
from swifti2v.evaluation.metrics.spectrum import radial_spectrum
from swifti2v.evaluation.metrics.stage_agreement import stage_agreement
from swifti2v.evaluation.metrics.temporal import (
    compensated_flicker,
    flicker,
    motion_residuals,
    warping_error,
)
from swifti2v.evaluation.metrics.time_fidelity import fidelity_over_time
from swifti2v.media.flow import chain, optical_flow
from tests.helpers.evaluation_clips import (
    Frames,
    blurred,
    colour_shifted,
    flickering,
    noisy,
    panning_clip,
    texture,
    to_frames,
    with_seam,
)

STILL = np.repeat(texture(96, 160)[None], 9, axis=0)


# Structural similarity against the common implementation


@pytest.mark.parametrize(("height", "width"), [(176, 192), (177, 191)])
def test_similarity_is_that_of_torchmetrics(height, width):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.functional import image
    a, b = texture(height, width), noisy(np.stack([texture(height, width)] * 2), 20)[1]

    def tensor(frame: Frames) -> torch.Tensor:
        return torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255

    expected: Any = image.structural_similarity_index_measure(tensor(a), tensor(b), data_range=1.0)
    assert isinstance(expected, torch.Tensor)
    # Sums in another order, float32.
    assert float(ssim(a[None], b[None])) == pytest.approx(float(expected), abs=2e-5)
    expected = image.multiscale_structural_similarity_index_measure(
        tensor(a), tensor(b), data_range=1.0, normalize="relu"
    )
    assert isinstance(expected, torch.Tensor)
    assert float(ms_ssim(a[None], b[None])) == pytest.approx(float(expected), abs=2e-5)


def test_first_frame_ssim_sees_only_frame_0():
    changed = STILL.copy()
    changed[1:] = 0
    assert first_frame_ssim(changed, STILL[0]) == pytest.approx(1)
    assert first_frame_ssim(blurred(changed[::-1], 2)[1:], STILL[0]) < 0.9
    with pytest.raises(ShapeError, match="no frame"):
        first_frame_ssim([], STILL[0])


# Series


@settings(max_examples=30, deadline=None)
@given(
    rise=st.floats(-3, 3),
    offset=st.floats(-50, 50),
    num_frames=st.integers(2, 40),
    missing=st.sets(st.integers(0, 39)),
)
def test_slope_of_a_line_with_gaps(rise, offset, num_frames, missing):
    values = [math.nan if t in missing else offset + rise * t for t in range(num_frames)]
    known = num_frames - len([t for t in missing if t < num_frames])
    if known < 2:
        assert math.isnan(slope(values))
    else:
        assert slope(values) == pytest.approx(16 * rise, abs=1e-9 * (1 + abs(offset)))
    if known:
        assert not math.isnan(mean(values))


def test_equal_frames_count_as_60_db():
    assert mean_psnr([math.inf, 40.0, math.nan]) == 50
    assert math.isnan(mean_psnr([]))


# Flow along the way


def test_flow_chains_and_starts_from_a_guess():
    clip = panning_clip(13, step=4, height=96, width=192)
    total = np.zeros((96, 192, 2), np.float32)
    for earlier, later in pairwise(clip):
        total = chain(total, optical_flow(earlier, later))
    inner = (slice(16, -16), slice(64, -16))
    np.testing.assert_allclose(np.median(total[inner], axis=(0, 1)), [-48, 0], atol=0.5)
    before = total.copy()
    refined = optical_flow(clip[0], clip[12], start=total)
    np.testing.assert_array_equal(total, before)
    np.testing.assert_allclose(np.median(refined[inner], axis=(0, 1)), [-48, 0], atol=0.1)
    off = np.abs(refined[inner] - [-48, 0]).mean()
    assert off < 0.5 * np.abs(optical_flow(clip[0], clip[12])[inner] - [-48, 0]).mean()


def test_shrink_keeps_small_frames_and_the_aspect_of_large_ones():
    frame = texture(96, 160)
    assert shrink(frame) is frame
    assert shrink(np.zeros((704, 1280, 3), np.uint8)).shape == (352, 640, 3)


# The photo through the clip


def test_fidelity_over_time_follows_motion_and_is_perfect_where_nothing_moves():
    still = fidelity_over_time(STILL, STILL[0])
    assert still.psnr_db.tolist() == [math.inf] * 9
    assert still.visible.tolist() == [1.0] * 9
    clip = panning_clip(17, step=3)
    moving = fidelity_over_time(clip, clip[0])
    assert float(moving.psnr_db[1:].min()) > 35
    lost = 3 * 16 / 160  # has moved out of the frame
    assert float(moving.visible[-1]) == pytest.approx(1 - lost, abs=0.1)


def test_fidelity_over_time_falls_with_every_defect_and_at_its_time():
    clip = panning_clip(9)
    perfect = fidelity_over_time(clip, clip[0]).psnr_db
    for planted in (blurred(clip, 2.0), colour_shifted(clip, 12), noisy(clip, 8)):
        assert mean_psnr(fidelity_over_time(planted, clip[0]).psnr_db[1:]) < mean_psnr(perfect) - 8
    seam = fidelity_over_time(with_seam(clip, 5, 10), clip[0]).psnr_db
    torch.testing.assert_close(seam[:5], perfect[:5])
    assert float(seam[5:].max()) < 30
    assert slope(seam[1:]) < -5


def test_fidelity_over_time_is_limited_to_640_pixels():
    photo = texture(176, 320).repeat(4, axis=0).repeat(4, axis=1)
    tiny = photo.copy()
    tiny[::2, ::2] = to_frames(tiny[::2, ::2] + 4.0)  # 1 in the mean over 2 x 2 pixels
    curve = fidelity_over_time(np.stack([photo, tiny]), photo)
    assert float(curve.psnr_db[1]) == pytest.approx(20 * math.log10(255), abs=0.7)


# Noise


@pytest.mark.parametrize("sigma", [2.0, 6.0])
def test_noise_is_the_planted_one(sigma):
    smooth = np.stack([cv2.GaussianBlur(STILL[0], (0, 0), 4)] * 6)
    grainy = noisy(smooth, sigma)
    assert float(noise_sigma(grainy)[1:].mean()) * 255 == pytest.approx(sigma, rel=0.05)
    assert float(noise_sigma(smooth).max()) * 255 < 0.5  # rounding
    # The high pass takes out 6 % of the variance of white noise.
    assert temporal_noise(grainy[1:]) * 255 == pytest.approx(0.97 * sigma, rel=0.05)


def test_noise_of_flat_and_still_clips_is_none_and_only_temporal_noise_forgives_a_pattern():
    assert float(noise_sigma(np.full((2, 32, 32, 3), 90, np.uint8)).max()) < 1e-6  # rounding
    assert temporal_noise(STILL) == 0
    fixed = np.repeat(noisy(STILL[:2], 6)[1:], 4, axis=0)
    assert temporal_noise(fixed) == 0
    assert float(noise_sigma(fixed).min()) > float(noise_sigma(STILL).max())


def test_temporal_noise_needs_something_that_stands_still():
    assert math.isnan(temporal_noise(panning_clip(3, step=3)))
    half = panning_clip(4, step=3)
    half[:, :48] = STILL[:4, :48]
    assert temporal_noise(half) < 1 / 255  # the moving half is left out
    with pytest.raises(ShapeError, match="two frames"):
        temporal_noise(STILL[:1])
    with pytest.raises(ShapeError, match="no frame"):
        noise_sigma([])


def test_wavelet_noise_is_that_of_scikit_image():
    restoration = pytest.importorskip("skimage.restoration")
    pytest.importorskip("pywt")
    grainy = noisy(STILL[:2], 5)[1:]
    grey = grainy[0] / 255 @ np.array([0.2126, 0.7152, 0.0722])
    expected = restoration.estimate_sigma(grey)
    assert float(noise_sigma(grainy)[0]) == pytest.approx(float(expected), rel=0.05)  # other edges


# Drift


def test_drift_is_the_planted_one():
    same = drift(STILL, STILL[0])
    assert same.colour.tolist() == [0] * 9
    assert same.contrast.tolist() == [1] * 9
    grey = np.full((5, 16, 16, 3), 119, np.uint8)  # lightness 50.0
    brighter = grey.copy()
    brighter[2:] = 145  # lightness 60.2
    assert drift(brighter, grey[0]).colour.tolist() == pytest.approx(
        [0, 0, 10.2, 10.2, 10.2], abs=0.1
    )
    assert drift(brighter, grey[0]).contrast.isnan().all()
    reddening = np.stack([colour_shifted(STILL[:2], 2.0 * t)[1] for t in range(9)])
    assert slope(drift(reddening, STILL[0]).colour) > 5
    paler = to_frames(127 + 0.5 * (STILL - 127.0))
    assert float(drift(paler, STILL[0]).contrast[3]) == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ShapeError, match="no frame"):
        drift([], STILL[0])


def test_drift_forgives_blur_and_noise():
    for planted in (blurred(STILL, 1.0), noisy(STILL, 4)):
        assert float(drift(planted, STILL[0]).colour.max()) < 0.5


# Steadiness from residuals measured once


def test_metrics_of_shared_residuals_are_those_of_the_clip():
    clip = with_seam(flickering(panning_clip(25), 2), 13, 9)
    residuals = motion_residuals(clip)
    torch.testing.assert_close(warping_error(residuals), warping_error(clip))
    assert compensated_flicker(residuals) == compensated_flicker(clip)
    assert latent_start_residuals(residuals) == pytest.approx(latent_start_residuals(clip))
    assert seam_score(residuals, [1, 4]) == pytest.approx(seam_score(clip, [1, 4]))
    with pytest.raises(ShapeError, match="two frames"):
        motion_residuals(clip[:1])


@settings(max_examples=20, deadline=None)
@given(num_frames=st.integers(2, 30), time_factor=st.integers(1, 5))
def test_latent_starts_are_the_same_from_residuals_and_from_frames(num_frames, time_factor):
    clip = np.zeros((num_frames, 16, 16, 3), np.uint8)
    residuals = motion_residuals(clip)
    expected = latent_start_residuals(clip, time_factor)
    assert latent_start_residuals(residuals, time_factor) == expected


def test_compensated_flicker_forgives_motion_but_not_flicker():
    clip = panning_clip(9, step=2)
    assert compensated_flicker(STILL) == flicker(STILL) == 1
    assert 1 - compensated_flicker(clip) < 0.2 * (1 - flicker(clip))
    scores = [compensated_flicker(flickering(clip, amplitude)) for amplitude in (0, 4, 8)]
    assert scores[0] > scores[1] > scores[2]
    assert 1 - scores[2] == pytest.approx(8 / 255, rel=0.15)


# Stage agreement


def test_stage_agreement_of_a_clip_with_its_own_small_self():
    clip = panning_clip(5)
    low = np.stack([cv2.resize(frame, (40, 24), interpolation=cv2.INTER_AREA) for frame in clip])
    assert float(stage_agreement(clip, low).min()) > 55  # rounding of the small clip
    sharper = to_frames(clip + 20.0 * np.indices(clip.shape).sum(0) % 2)
    assert mean_psnr(stage_agreement(sharper, low)) > 40  # detail is free to differ
    for planted in (colour_shifted(clip, 12), np.roll(clip, 6, axis=2)):
        assert float(stage_agreement(planted, low)[1:].max()) < 32
    seam = stage_agreement(with_seam(clip, 3, 10), low)
    assert float(seam[2]) > 55
    assert float(seam[3]) < 30


def test_stage_agreement_refuses_other_lengths_and_larger_references():
    clip = panning_clip(5)
    with pytest.raises(ShapeError, match="ends after 4 frames"):
        stage_agreement(clip, clip[:4])
    with pytest.raises(ShapeError, match="the clip ends after 4 frames"):
        stage_agreement(clip[:4], clip)
    with pytest.raises(ShapeError, match="Stage I's clip"):
        stage_agreement(clip[:, :48], clip)
    with pytest.raises(ShapeError, match="no frame"):
        stage_agreement([], [])


# Spectrum


def test_spectrum_finds_a_wave_and_the_energy_of_noise():
    wave = 0.5 + 0.4 * np.sin(2 * np.pi * 27 / 128 * np.arange(128, dtype=np.float32))
    spectrum = radial_spectrum(np.broadcast_to(wave[None, :, None], (96, 128, 3)), num_bins=32)
    assert int(spectrum[2:].argmax()) + 2 == 13  # 27 / 128 of 0.5 / 32 a ring
    random = np.random.default_rng(0).normal(0.5, 0.05, (128, 128, 1)).clip(0, 1)
    white = radial_spectrum(np.repeat(random, 3, axis=2).astype(np.float32))
    assert float(white[8:].mean()) == pytest.approx(0.05**2, rel=0.05)
    sharp, soft = radial_spectrum(STILL[0]), radial_spectrum(blurred(STILL[:2], 1.5)[1])
    assert float((soft / sharp)[30:50].max()) < 0.2
    assert float((soft / sharp)[1]) > 0.9


# Memory


class CountedClip:
    """Makes frames while it is read, and knows how many of them were held at once."""

    def __init__(self, num_frames: int) -> None:
        self.num_frames = num_frames
        self.most_held = 0

    def __iter__(self) -> Iterator[Frames]:
        held: list[weakref.ref[Frames]] = []
        for t in range(self.num_frames):
            piece = STILL[:1, :32, t : t + 48].copy()
            held = [*(ref for ref in held if ref() is not None), weakref.ref(piece)]
            self.most_held = max(self.most_held, len(held))
            yield piece
            del piece


@pytest.mark.parametrize(
    "measure",
    [
        lambda clip: psnr(clip, CountedClip(clip.num_frames)),
        lambda clip: ssim(clip, CountedClip(clip.num_frames)),
        lambda clip: detail_coherence(clip, CountedClip(clip.num_frames)),
        lambda clip: stage_agreement(clip, CountedClip(clip.num_frames)),
        lambda clip: hf_energy_ratio(clip, STILL[0, :32, :48]),
        lambda clip: fidelity_over_time(clip, STILL[0, :32, :48]),
        lambda clip: drift(clip, STILL[0, :32, :48]),
        lambda clip: seam_score(clip, [1, 3]),
        motion_residuals,
        flicker,
        noise_sigma,
        temporal_noise,
    ],
)
def test_no_metric_holds_more_than_a_few_frames(measure):
    clip = CountedClip(20)
    measure(clip)
    assert clip.most_held <= 3  # the one before, this one, and the one being made
