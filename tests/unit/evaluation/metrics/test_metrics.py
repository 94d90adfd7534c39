import math
from typing import Any, TypeAlias, get_args

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.errors import ConfigError, ShapeError
from swifti2v.evaluation.baselines import (
    carried_baseline,
    copy_detail_baseline,
    flow_warp_baseline,
    lanczos_baseline,
    warp_detail_baseline,
)
from swifti2v.evaluation.metrics.camera import CameraLabel, camera_direction
from swifti2v.evaluation.metrics.detail_coherence import (
    detail_coherence,
    detail_coherence_per_frame,
    hf_energy_ratio,
)
from swifti2v.evaluation.metrics.fidelity import (
    clip_psnr,
    colour_jump,
    first_frame_psnr,
    ms_ssim,
    psnr,
    ssim,
)
from swifti2v.evaluation.metrics.flow import motion_residual
from swifti2v.evaluation.metrics.frames import luma, to_unit_range
from swifti2v.evaluation.metrics.seam import latent_start_residuals, seam_score
from swifti2v.evaluation.metrics.temporal import flicker, warping_error
from swifti2v.media.flow import optical_flow, visible, warp

Frames: TypeAlias = npt.NDArray[Any]


def texture(height: int, width: int, seed: int = 0) -> Frames:
    """A colour picture with structure at many scales, uint8 [H, W, 3]."""
    random = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for blur, weight in ((1.0, 0.4), (3.0, 1.0), (9.0, 1.0)):
        noise = cv2.GaussianBlur(random.standard_normal((height, width, 3)), (0, 0), blur)
        picture += weight * noise / noise.std()
    return (127 + 35 * picture).clip(0, 255).astype(np.uint8)


def moving_clip(
    num_frames: int = 33,
    height: int = 96,
    width: int = 160,
    pan: float = 0.0,
    tilt: float = 0.0,
    zoom: float = 0.0,
    roll: float = 0.0,
    seed: int = 0,
) -> Frames:
    """A camera's view of a larger picture; at the end the content has moved by the arguments.

    ``roll`` is clockwise, in degrees.
    """
    margin = 64
    picture = texture(height + 2 * margin, width + 2 * margin, seed)
    centre = np.array([width + 2 * margin - 1, height + 2 * margin - 1]) / 2
    frames = []
    for t in np.linspace(0, 1, num_frames):
        scale = 1 + zoom * t
        shift = np.array([(width - 1) / 2 + pan * t, (height - 1) / 2 + tilt * t])
        sine, cosine = np.sin(np.radians(roll * t)), np.cos(np.radians(roll * t))
        turn = scale * np.array([[cosine, -sine], [sine, cosine]])
        matrix = np.column_stack([turn, shift - turn @ centre])
        frames.append(cv2.warpAffine(picture, matrix, (width, height), flags=cv2.INTER_CUBIC))
    return np.stack(frames)


def area_down(frames: Frames, factor: int = 4) -> Frames:
    num_frames, height, width, _ = frames.shape
    cells = frames.reshape(num_frames, height // factor, factor, width // factor, factor, 3)
    small: Frames = np.rint(cells.mean(axis=(2, 4))).astype(np.uint8)
    return small


# Fidelity


def test_equal_clips_are_perfect():
    clip = moving_clip(3, 176, 176, pan=4)
    assert psnr(clip, clip).tolist() == [float("inf")] * 3
    torch.testing.assert_close(ssim(clip, clip), torch.ones(3))
    torch.testing.assert_close(ms_ssim(clip, clip), torch.ones(3))
    assert first_frame_psnr(clip, clip[0]) == float("inf")


@settings(max_examples=20, deadline=None)
@given(offset=st.integers(1, 50))
def test_psnr_of_a_known_offset(offset):
    truth = np.full((2, 8, 8, 3), 100, np.uint8)
    output = truth.copy()
    output[1] += offset  # only frame 1 is wrong
    scores = psnr(output, truth)
    assert scores[0] == float("inf")
    assert float(scores[1]) == pytest.approx(20 * np.log10(255 / offset), abs=1e-3)


@pytest.mark.parametrize("metric", [psnr, ssim, ms_ssim])
def test_fidelity_falls_with_noise_and_only_in_the_noisy_frame(metric):
    clip = moving_clip(3, 176, 176, pan=4)
    noise = np.random.default_rng(1).standard_normal(clip[1].shape)
    scores = []
    for amplitude in (2, 8, 32):
        noisy = clip.copy()
        noisy[1] = np.clip(clip[1] + amplitude * noise, 0, 255)
        score = metric(noisy, clip)
        assert score[0] == score[2] > score[1]
        scores.append(float(score[1]))
    assert scores == sorted(scores, reverse=True)


def test_uint8_float_tensor_and_pieces_agree():
    clip = moving_clip(5, pan=6)
    other = np.roll(clip, 1, axis=2)
    expected = psnr(clip, other)
    as_float = torch.from_numpy(clip).float() / 255
    torch.testing.assert_close(psnr(as_float, other), expected)
    pieces = (clip[start : start + 2] for start in range(0, 5, 2))
    torch.testing.assert_close(psnr(pieces, [other[:3], other[3:]]), expected)


def test_first_frame_psnr_sees_only_frame_0():
    clip = moving_clip(3)
    changed = clip.copy()
    changed[1:] = 0
    assert first_frame_psnr(changed, clip[0]) == float("inf")
    changed[0, :, :, 0] ^= 8
    assert first_frame_psnr(changed, clip[0]) < 40


def test_colour_jump_is_the_planted_one():
    clip = np.full((4, 8, 8, 3), 100, np.uint8)
    assert colour_jump(clip) == 0
    clip[1:, :, :, 0] += 30
    assert colour_jump(clip) == pytest.approx(30 / 255 / 3, rel=1e-5)
    clip[2:] = 0  # later frames do not count
    assert colour_jump(clip) == pytest.approx(30 / 255 / 3, rel=1e-5)


def test_wrong_inputs_are_refused():
    clip = moving_clip(3)
    with pytest.raises(ShapeError, match="truth ends after 2 frames"):
        psnr(clip, clip[:2])
    with pytest.raises(ShapeError, match="resize"):
        psnr(clip, clip[:, :-2])
    with pytest.raises(ShapeError, match="colour last"):
        psnr(clip.transpose(0, 3, 1, 2), clip.transpose(0, 3, 1, 2))
    with pytest.raises(ShapeError, match=r"\(video \+ 1\) / 2"):
        psnr(clip / 127.5 - 1, clip)
    with pytest.raises(ShapeError, match=r"\[nan, nan\]"):
        psnr(np.full(clip.shape, np.nan, np.float32), clip)
    with pytest.raises(ShapeError, match="no frame"):
        psnr([], [])
    with pytest.raises(ShapeError, match="at least 161"):
        ms_ssim(clip, clip)
    with pytest.raises(ShapeError, match="two frames"):
        colour_jump(clip[:1])


# Detail


def coherence_by_definition(output: Frames, truth: Frames, cutoff: float) -> float:
    """The plain formula with the full spectrum, in float64."""
    height, width, _ = truth.shape
    window = np.outer(
        0.5 - 0.5 * np.cos(2 * np.pi * np.arange(height) / height),
        0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width),
    )
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    spectra = []
    for frame in (output, truth):
        image = frame @ np.array([0.2126, 0.7152, 0.0722]) / 255
        spectra.append(np.fft.fft2((image - image.mean()) * window) * (radius > cutoff))
    a, b = spectra
    norm = np.sqrt((abs(a) ** 2).sum() * (abs(b) ** 2).sum())
    return float((np.conj(a) * b).sum().real / norm)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63), (48, 63)])
def test_coherence_follows_the_definition_for_even_and_odd_sizes(height, width):
    truth, other = texture(height, width, 1), texture(height, width, 2)
    output = (truth // 2 + other // 2).astype(np.uint8)
    expected = coherence_by_definition(output, truth, 0.15)
    assert 0.3 < expected < 0.95
    got = detail_coherence_per_frame(output[None], truth[None], 0.15)
    assert float(got[0]) == pytest.approx(expected, abs=1e-4)  # float32 transform


def test_coherence_of_identity_contrast_inversion_and_unrelated_detail():
    truth = moving_clip(4, pan=5)
    assert detail_coherence(truth, truth) == pytest.approx(1, abs=1e-6)
    assert detail_coherence(truth // 2, truth) == pytest.approx(1, abs=0.02)  # rounding
    assert detail_coherence(255 - truth, truth) == pytest.approx(-1, abs=1e-6)
    assert abs(detail_coherence(moving_clip(4, seed=9), truth)) < 0.1
    blurred = lanczos_baseline(area_down(truth, 8), 96, 160)
    assert detail_coherence(blurred, truth) < 0.15


def test_coherence_falls_with_a_shift_of_a_pixel_or_two():
    truth = moving_clip(3)
    scores = [detail_coherence(np.roll(truth, shift, axis=2), truth) for shift in range(3)]
    assert scores[0] > scores[1] + 0.2 > scores[2] + 0.2


def test_coherence_leaves_out_frame_0_and_the_low_frequencies():
    truth = moving_clip(3)
    output = truth.copy()
    output[0] = 0
    assert detail_coherence(output, truth) == pytest.approx(1, abs=1e-6)
    ramp = np.linspace(0, 40, 160).astype(np.uint8)[None, None, :, None]
    dark = truth // 2
    assert detail_coherence(dark + ramp, dark) > 0.97  # the ramp's 8-bit steps cost a little


def test_coherence_of_flat_frames():
    truth = moving_clip(3)
    flat = np.full_like(truth, 99)
    assert detail_coherence(flat, truth) == 0
    assert np.isnan(detail_coherence(truth, flat))
    partly = truth.copy()
    partly[1] = 99
    assert detail_coherence(truth, partly) == pytest.approx(1, abs=1e-6)


@settings(max_examples=10, deadline=None)
@given(gain=st.floats(0.2, 1.0))
def test_energy_ratio_of_a_known_gain(gain):
    photo = texture(40, 56).astype(np.float32) / 255
    ratio = hf_energy_ratio((photo * gain)[None], photo)
    assert float(ratio[0]) == pytest.approx(gain**2, rel=1e-3)


def test_energy_ratio_of_blur_noise_and_a_reference_clip():
    clip = moving_clip(3)
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.0) for frame in clip])
    # A Gaussian of 1 px scales energy by exp(-4 pi^2 f^2) <= 0.085 above f = 0.25.
    assert float(hf_energy_ratio(blurred, clip).max()) < 0.1
    noise = np.random.default_rng(0).integers(-20, 20, clip.shape)
    assert float(hf_energy_ratio(np.clip(clip + noise, 0, 255) / 255, clip[0]).min()) > 1.2
    torch.testing.assert_close(hf_energy_ratio(clip, clip), torch.ones(3, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"cutoff is 0\.7"):
        hf_energy_ratio(clip, clip, cutoff=0.7)
    with pytest.raises(ShapeError, match="resize the photo"):
        hf_energy_ratio(clip, clip[0, :-2])


def test_luma_weights_are_bt709_and_sum_to_one():
    frame = to_unit_range(np.array([[[255, 255, 255], [0, 255, 0]]], np.uint8))
    torch.testing.assert_close(luma(frame), torch.tensor([[1.0, 0.7152]]))


# Flow, warping, steadiness


@pytest.mark.parametrize(("right", "down"), [(3.0, 0.0), (0.0, -2.0), (-5.5, 4.25)])
def test_flow_finds_a_known_shift_and_warping_undoes_it(right, down):
    clip = moving_clip(2, pan=right, tilt=down)
    flow = optical_flow(clip[0], clip[1])
    inner = (slice(12, -12), slice(12, -12))
    np.testing.assert_allclose(np.median(flow[inner], axis=(0, 1)), [right, down], atol=0.1)
    warped = warp(clip[1], flow)
    before = np.abs(clip[1][inner].astype(float) - clip[0][inner]).mean()
    after = np.abs(warped[inner].astype(float) - clip[0][inner]).mean()
    assert after < 0.2 * before


def test_warping_by_whole_pixels_is_exact_and_keeps_the_type():
    image = texture(32, 40)
    flow = np.zeros((32, 40, 2), np.float32)
    np.testing.assert_array_equal(warp(image, flow), image)
    flow[..., 0] = 3
    np.testing.assert_array_equal(warp(image, flow)[:, :30], image[:, 3:33])
    with pytest.raises(ShapeError, match="differ in size"):
        warp(image[:-1], flow)


def test_visible_leaves_out_what_flows_disagree_on_or_leave_the_frame():
    forward = np.zeros((20, 30, 2), np.float32)
    backward = np.zeros_like(forward)
    assert visible(forward, backward).all()
    forward[:, :, 0], backward[:, :, 0] = 4, -4
    backward[5:8, 10:12] = 3
    seen = visible(forward, backward)
    assert not seen[:, -4:].any()
    assert not seen[5:8, 6:8].any()
    assert seen.sum() == 20 * 26 - 6


def test_flow_refuses_tiny_and_unequal_frames():
    with pytest.raises(ShapeError, match="below 16 pixels"):
        optical_flow(texture(12, 40), texture(12, 40))
    with pytest.raises(ShapeError, match="of one size"):
        optical_flow(texture(20, 40), texture(20, 42))


def test_warping_error_forgives_motion_but_not_flicker():
    still, moving = moving_clip(4), moving_clip(4, pan=9)
    assert float(warping_error(still).max()) == 0
    motion = float(warping_error(moving).mean())
    naive = float(np.square((moving[1:] / 255.0) - moving[:-1] / 255.0).mean())
    assert motion < 0.03 * naive
    flickering = moving.copy()
    flickering[2] = np.clip(flickering[2].astype(int) + 20, 0, 255)
    errors = warping_error(flickering)
    assert float(errors[1:].min()) > 5 * float(errors[0])
    assert len(errors) == 3


def test_warping_error_in_pieces_is_the_same():
    clip = moving_clip(4, pan=9)
    torch.testing.assert_close(warping_error([clip[:1], clip[1:]]), warping_error(clip))


def test_flicker_score_of_known_alternation():
    clip = np.full((5, 8, 8, 3), 100, np.uint8)
    assert flicker(clip) == 1
    clip[1::2] += 51
    assert flicker(clip) == pytest.approx(0.8, abs=1e-6)
    with pytest.raises(ShapeError, match="two frames"):
        flicker(clip[:1])


# Seams: 25 frames are 7 latent frames; segments of three start at 1 and 4; a whole pixel a
# frame, so that interpolation blurs all frames alike


def test_seam_score_is_one_without_and_rises_with_a_planted_seam():
    clip = moving_clip(25, pan=24).astype(int)
    plain = seam_score(clip.astype(np.uint8), [1, 4])
    assert plain == pytest.approx(1, abs=0.15)
    scores = [plain]
    for amplitude in (3, 6, 12):
        planted = clip.copy()
        planted[1 + 3 * 4 :] += amplitude  # latent frame 4 starts at pixel frame 13
        scores.append(seam_score(planted.clip(0, 255).astype(np.uint8), [1, 4]))
    assert scores == sorted(scores)
    assert scores[-1] > 3


def test_seam_score_ignores_the_codec_rhythm_and_the_step_from_the_photo():
    clip = moving_clip(25, pan=24).astype(int)
    rhythm = clip.copy()
    for start in range(5, 25, 8):  # every latent frame jumps by the same amount
        rhythm[start : start + 4] += 8
    assert seam_score(rhythm.clip(0, 255).astype(np.uint8), [1, 4]) == pytest.approx(1, abs=0.15)
    after_photo = clip.copy()
    after_photo[1:] += 10
    after_photo = after_photo.clip(0, 255).astype(np.uint8)
    assert seam_score(after_photo, [1, 4]) == pytest.approx(1, abs=0.15)


def test_seam_score_reads_pieces_and_knows_its_limits():
    clip = moving_clip(25, pan=24)
    pieces = (clip[start : start + 6] for start in range(0, 25, 6))
    assert seam_score(pieces, [1, 4]) == seam_score(clip, [4])
    assert sorted(latent_start_residuals(clip)) == [2, 3, 4, 5, 6]
    assert seam_score(np.repeat(clip[:1], 25, axis=0), [1, 4]) == 1
    assert np.isnan(seam_score(clip, [1]))
    assert np.isnan(seam_score(clip, range(1, 7)))
    with pytest.raises(ShapeError, match=r"latent frames \[13\]"):
        seam_score(clip, [1, 13])


def test_residual_across_a_cut_is_large_or_unseen():
    residual = motion_residual(texture(48, 64, 1), texture(48, 64, 2))
    assert residual.size == 0 or np.abs(residual).mean() > 0.02


# Camera


@pytest.mark.parametrize(
    ("label", "motion"),
    [
        ("pan left", {"pan": 10}),
        ("pan right", {"pan": -10}),
        ("tilt up", {"tilt": 6}),
        ("tilt down", {"tilt": -6}),
        ("zoom in", {"zoom": 0.08}),
        ("zoom out", {"zoom": -0.08}),
        ("roll left", {"roll": 6}),
        ("roll right", {"roll": -6}),
        ("static", {}),
    ],
)
def test_camera_direction_of_a_slow_move(label, motion):  # 10 px are 6 % of the width
    result = camera_direction(moving_clip(33, **motion))
    assert result.label == label
    assert result.label in get_args(CameraLabel)
    assert result.pan_px == pytest.approx(motion.get("pan", 0), abs=0.5)
    assert result.tilt_px == pytest.approx(motion.get("tilt", 0), abs=0.5)
    assert result.zoom == pytest.approx(motion.get("zoom", 0), abs=0.008)
    assert result.roll_degrees == pytest.approx(motion.get("roll", 0), abs=0.3)
    assert result.inliers > 0.8


@pytest.mark.slow
def test_camera_names_two_moves_at_once_the_stronger_first():
    assert camera_direction(moving_clip(33, pan=10, zoom=0.2)).moves == ("zoom in", "pan left")
    assert camera_direction(moving_clip(33, tilt=-9, roll=-3)).moves == ("tilt down", "roll right")
    assert camera_direction(moving_clip(33)).moves == ()


def test_camera_names_the_strongest_component_of_a_fast_move():
    result = camera_direction(moving_clip(17, pan=-40, tilt=8, zoom=0.1))
    assert result.label == "pan right"
    assert result.tilt_px == pytest.approx(8, abs=1.5)
    assert result.zoom == pytest.approx(0.1, abs=0.02)
    result = camera_direction(moving_clip(17, pan=4, zoom=0.3))
    assert result.label == "zoom in"


def test_camera_ignores_a_moving_subject():
    clip = moving_clip(17, pan=8)
    sprite = texture(50, 60, seed=5)
    for index, frame in enumerate(clip):
        left = 90 - 4 * index  # runs left over a fifth of the picture
        frame[20:70, left : left + 60] = sprite
    result = camera_direction(clip)
    assert result.label == "pan left"
    assert result.pan_px == pytest.approx(8, abs=1)


def test_camera_of_pieces_and_of_larger_frames():
    clip = moving_clip(14, pan=12)
    assert camera_direction([clip[:5], clip[5:]]) == camera_direction(clip)
    large = np.stack([cv2.resize(frame, (960, 576)) for frame in clip])
    result = camera_direction(large)
    assert result.label == "pan left"
    assert result.pan_px == pytest.approx(72, rel=0.05)


def test_camera_without_texture_or_with_one_frame():
    result = camera_direction(np.full((9, 64, 64, 3), 80, np.uint8))
    assert (result.label, result.inliers) == ("static", 0)
    with pytest.raises(ShapeError, match="two frames"):
        camera_direction(moving_clip(1))


# Baselines


def test_baselines_order_on_a_moving_clip():
    truth = moving_clip(9, pan=12)
    low_res, photo = area_down(truth), truth[0]
    lanczos = lanczos_baseline(low_res, 96, 160)
    copied = copy_detail_baseline(low_res, photo)
    warped = flow_warp_baseline(low_res, photo)
    warped_detail = warp_detail_baseline(low_res, photo)
    carried = carried_baseline(low_res, photo)
    for output in (lanczos, copied, warped, warped_detail, carried):
        assert output.shape == truth.shape
        assert output.dtype == np.uint8
    for output in (copied, warped, warped_detail, carried):
        np.testing.assert_array_equal(output[0], photo)
    coherence = [detail_coherence(output, truth) for output in (lanczos, copied, warped)]
    assert coherence[0] < 0.4
    assert coherence[2] > max(coherence[:2]) + 0.3
    fidelity = [float(psnr(x, truth)[1:].mean()) for x in (lanczos, copied, warped_detail)]
    assert fidelity[2] > max(fidelity[:2])
    assert psnr(carried, truth)[1:].mean() > fidelity[2]


def test_baselines_of_a_still_clip_give_the_photo_back():
    truth = moving_clip(3)
    low_res, photo = area_down(truth), truth[0]
    np.testing.assert_array_equal(copy_detail_baseline(low_res, photo), truth)
    np.testing.assert_array_equal(flow_warp_baseline(low_res, photo), truth)
    np.testing.assert_array_equal(warp_detail_baseline(low_res, photo), truth)
    flat = np.full((2, 8, 8, 3), 77, np.uint8)
    np.testing.assert_array_equal(lanczos_baseline(flat, 30, 50), np.full((2, 30, 50, 3), 77))


def test_baselines_refuse_floats_and_wrong_shapes():
    low_res = area_down(moving_clip(3))
    as_float: Any = low_res / 255
    with pytest.raises(ShapeError, match="float64"):
        lanczos_baseline(as_float, 96, 160)
    with pytest.raises(ShapeError, match="photo"):
        flow_warp_baseline(low_res, low_res)
    with pytest.raises(ShapeError, match="at least one frame"):
        copy_detail_baseline(low_res[:0], low_res[0])


def test_clip_psnr_stays_finite_with_one_equal_frame():
    truth = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    output = truth.copy()
    output[1] ^= 1  # every value off by one: 48.13 dB in one frame, half the error in both
    assert clip_psnr(output, truth) == pytest.approx(48.13 + 3.01, abs=0.01)
    assert clip_psnr(truth, truth) == math.inf
