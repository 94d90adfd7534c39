"""All metrics that need no weights, on one clip."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from swifti2v.evaluation.clips.inputs import ClipInputs
from swifti2v.evaluation.metrics.blockiness import blockiness
from swifti2v.evaluation.metrics.cadence import cadence
from swifti2v.evaluation.metrics.carried_coherence import carried_coherence
from swifti2v.evaluation.metrics.detail_coherence import detail_coherence_per_frame, hf_energy_ratio
from swifti2v.evaluation.metrics.drift import drift
from swifti2v.evaluation.metrics.fidelity import (
    MS_SSIM_MIN_SIDE,
    colour_jump,
    first_frame_psnr,
    first_frame_ssim,
    ms_ssim,
    psnr,
    ssim,
)
from swifti2v.evaluation.metrics.frames import FramePieces
from swifti2v.evaluation.metrics.noise import noise_sigma, temporal_noise
from swifti2v.evaluation.metrics.seam import seam_score
from swifti2v.evaluation.metrics.series import limit_psnr, mean, mean_psnr, slope
from swifti2v.evaluation.metrics.stage_agreement import stage_agreement
from swifti2v.evaluation.metrics.temporal import (
    compensated_flicker,
    flicker,
    frame_changes,
    motion_residuals,
    warping_error,
)
from swifti2v.evaluation.metrics.time_fidelity import fidelity_over_time

Better = Literal["high", "low", "one", "zero"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A column of the table."""

    name: str
    """Key in JSON and CSV."""
    title: str
    """Name in tables for people."""
    better: Better
    """The good direction, or the value to be near."""
    digits: int
    """Digits after the point in tables."""


def _metric(name: str, title: str, better: Better, digits: int) -> Metric:
    return Metric(name=name, title=title, better=better, digits=digits)


METRICS = (
    _metric("psnr", "PSNR to the truth, dB", "high", 2),
    _metric("ssim", "SSIM to the truth", "high", 4),
    _metric("ms_ssim", "MS-SSIM to the truth", "high", 4),
    _metric("detail_coherence", "detail coherence with the truth", "high", 3),
    _metric("first_frame_psnr", "PSNR of frame 0 to the photo, dB", "high", 2),
    _metric("first_frame_ssim", "SSIM of frame 0 to the photo", "high", 4),
    _metric("colour_jump", "colour jump after frame 0", "low", 5),
    _metric("fidelity_over_time", "photo followed through the clip, dB", "high", 2),
    _metric("fidelity_slope", "its change over 16 frames, dB", "zero", 2),
    _metric("visible_over_time", "part of the frame where it can be followed", "high", 3),
    _metric("hf_energy_ratio", "fine detail relative to the photo", "one", 3),
    _metric("hf_energy_slope", "its change over 16 frames", "zero", 3),
    _metric("carried_coherence", "coherence with the photo moved onto the frame", "high", 3),
    _metric("blockiness", "steps at the edges of 8-pixel blocks", "one", 3),
    _metric("warping_error", "warping error", "low", 6),
    _metric("flicker", "steadiness (VBench's flickering)", "high", 4),
    _metric("flicker_compensated", "steadiness without motion", "high", 4),
    _metric("cadence", "unevenness of motion within latent frames", "one", 2),
    _metric("seam_score", "seam score at segment starts", "one", 3),
    _metric("stage_agreement", "PSNR to Stage I at its size, dB", "high", 2),
    _metric("noise_sigma", "noise within frames", "low", 5),
    _metric("temporal_noise", "noise over time where nothing moves", "low", 5),
    _metric("colour_drift", "distance of the mean colour from the photo's, Lab", "low", 2),
    _metric("colour_drift_slope", "its change over 16 frames", "zero", 2),
    _metric("contrast_drift", "contrast relative to the photo", "one", 3),
    _metric("contrast_drift_slope", "its change over 16 frames", "zero", 3),
)
"""All metrics, in the order of the tables."""
TRUTH_METRICS = ("psnr", "ssim", "ms_ssim", "detail_coherence")


@dataclass(kw_only=True, slots=True)
class Scores:
    """Measurements of one clip."""

    values: dict[str, float] = field(default_factory=dict)
    """Values by metric; NaN for those in ``not_measured``."""
    curves: dict[str, list[float]] = field(default_factory=dict)
    """One number a frame, or a pair of frames, by name."""
    not_measured: dict[str, str] = field(default_factory=dict)
    """Metric and the reason why it has no value."""

    def add(self, name: str, value: float, reason: str = "") -> None:
        """Store a metric; ``reason`` says why the value is NaN, if it is."""
        self.values[name] = value
        if math.isnan(value):
            self.not_measured[name] = reason

    def skip(self, names: Iterable[str], reason: str) -> None:
        """Store that metrics were not measured."""
        for name in names:
            self.add(name, math.nan, reason)

    def add_trend(self, name: str, slope_name: str, curve: Sequence[float], reason: str) -> None:
        """Store the mean and the slope of a curve over frames 1 to T-1, and the curve."""
        self.add(name, mean(curve[1:]), reason)
        short = "two frames after frame 0 are needed"
        self.add(slope_name, slope(curve[1:]), reason if name in self.not_measured else short)
        self.draw(name, curve)

    def draw(self, name: str, curve: Tensor | Sequence[float]) -> None:
        """Store a curve."""
        self.curves[name] = [float(value) for value in curve]


def evaluate_clip(inputs: ClipInputs) -> Scores:
    """Measure one clip with every metric its inputs allow.

    The clip is read once for each group of metrics; one or two frames are in memory at a time.

    Returns:
        A value for each of ``METRICS``, or the reason why it is missing. Comparisons with truth or
        photo are means over frames 1 to T-1 (frame 0 is the photo and has its own metrics); equal
        frames count as 60 dB.
    """
    scores = Scores()
    _against_truth(scores, inputs)
    photo = _against_photo(scores, inputs)
    _over_time(scores, inputs.video, photo)
    _steadiness(scores, inputs)
    _noise(scores, inputs.video)
    if inputs.motion_reference is None:
        scores.skip(["stage_agreement"], "no motion reference was given")
    else:
        agreement = stage_agreement(inputs.video, inputs.motion_reference)
        scores.add("stage_agreement", mean_psnr(agreement))
        scores.draw("stage_agreement", limit_psnr(agreement))
    scores.values = {metric.name: scores.values[metric.name] for metric in METRICS}
    return scores


def _against_truth(scores: Scores, inputs: ClipInputs) -> None:
    video, truth = inputs.video, inputs.reference
    if truth is None:
        scores.skip(TRUTH_METRICS, "no reference was given")
        return
    curve = limit_psnr(psnr(video, truth))
    scores.add("psnr", mean(curve[1:]))
    scores.draw("psnr", curve)
    similarity = ssim(video, truth)
    scores.add("ssim", mean(similarity[1:]))
    scores.draw("ssim", similarity)
    if min(video.height, video.width) < MS_SSIM_MIN_SIDE:
        reason = f"{video.size} is too small: sides of at least {MS_SSIM_MIN_SIDE} are needed"
        scores.skip(["ms_ssim"], reason)
    else:
        scores.add("ms_ssim", mean(ms_ssim(video, truth)[1:]))
    coherence = detail_coherence_per_frame(video, truth)
    scores.add("detail_coherence", mean(coherence[1:]), "the reference has no fine detail")
    scores.draw("detail_coherence", coherence)


def _against_photo(scores: Scores, inputs: ClipInputs) -> npt.NDArray[np.uint8]:
    """Measure frame 0; the photo, or frame 0 in its place."""
    video = inputs.video
    scores.add("colour_jump", colour_jump(video))
    if inputs.photo is None:
        scores.skip(["first_frame_psnr", "first_frame_ssim"], "no photo was given")
        first: npt.NDArray[np.uint8] = next(iter(video))[0]
        return first
    photo, _ = inputs.photo.load(video.height, video.width)
    scores.add("first_frame_psnr", mean_psnr([first_frame_psnr(video, photo)]))
    scores.add("first_frame_ssim", first_frame_ssim(video, photo))
    return photo


def _over_time(scores: Scores, video: FramePieces, photo: npt.NDArray[np.uint8]) -> None:
    fidelity = fidelity_over_time(video, photo)
    gone = "nothing of the photo is left to see in any later frame"
    followed = limit_psnr(fidelity.psnr_db)
    scores.add_trend("fidelity_over_time", "fidelity_slope", followed, gone)
    scores.add("visible_over_time", mean(fidelity.visible[1:]))
    scores.draw("visible_over_time", fidelity.visible)
    ratio = hf_energy_ratio(video, photo).tolist()
    scores.add_trend("hf_energy_ratio", "hf_energy_slope", ratio, "the photo has no fine detail")
    coherence = carried_coherence(video, photo)
    lacking = "five frames, and fine detail of the photo in view, are needed"
    scores.add("carried_coherence", mean(coherence), lacking)
    scores.draw("carried_coherence", coherence)
    steps = blockiness(video)
    scores.add("blockiness", mean(steps[1:]))
    scores.draw("blockiness", steps)
    away = drift(video, photo)
    flat = "the photo has no contrast"
    scores.add_trend("colour_drift", "colour_drift_slope", away.colour.tolist(), flat)
    scores.add_trend("contrast_drift", "contrast_drift_slope", away.contrast.tolist(), flat)


def _steadiness(scores: Scores, inputs: ClipInputs) -> None:
    residuals = motion_residuals(inputs.video)
    cuts = "no two neighbouring frames show the same"
    changes = frame_changes(inputs.video)
    scores.add("flicker", flicker(changes))
    scores.add("cadence", cadence(changes), "at least 10 frames are needed")
    scores.draw("frame_change", [math.nan, *changes.tolist()])
    scores.add("flicker_compensated", compensated_flicker(residuals), cuts)
    scores.add("warping_error", mean(warping_error(residuals)), cuts)
    scores.draw("motion_residual", residuals.absolute)
    if inputs.segment_starts is None:
        scores.skip(["seam_score"], f"segments unknown: {inputs.segments_source}")
    else:
        score = seam_score(residuals, inputs.segment_starts)
        scores.add("seam_score", score, "no join of two segments to compare with other frames")


def _noise(scores: Scores, video: FramePieces) -> None:
    sigma = noise_sigma(video)
    scores.add("noise_sigma", mean(sigma))
    scores.draw("noise_sigma", sigma)
    scores.add("temporal_noise", temporal_noise(video), "hardly anything stands still")
