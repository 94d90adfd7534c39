"""Find the constant rate at which a clip is read from the times of its frames."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
SAME_SECONDS = 2.5e-3
"""Containers round times (Matroska to 1 ms): times that differ by less are equal."""
SNAP = Fraction(1, 100)
"""Part by which a rate that was measured over jittered times may be off the one meant."""
MAX_RATE = 1000
"""Frames a second; no clip is made denser than this."""
_NTSC = tuple(Fraction(1000 * whole, 1001) for whole in (24, 30, 48, 60, 120))


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Times of a clip's frames, and the rate at which they are read."""

    rate: Fraction
    """Frames a second that the clip is read at."""
    is_even: bool
    """Whether every frame is shown once; else they are repeated or left out to reach ``rate``."""
    jitter: float
    """Seconds by which an even clip shows frames earlier or later than they say, at most."""
    shortest: float
    """Seconds from a frame to the next, at least."""
    longest: float
    """Seconds from a frame to the next, at most."""
    duration: Fraction
    """Seconds from the start of the first frame to the end of the last one."""
    slack: Fraction
    """Seconds by which rounding may make a frame start late."""

    @property
    def num_frames(self) -> int:
        """Frames that reading gives."""
        return math.ceil((self.duration - self.slack) * self.rate)


def plan_timing(
    ticks: Sequence[int],
    tick: Fraction,
    claims: Iterable[Fraction | None] = (),
    last_duration: int = 0,
) -> Timing:
    """Find the constant rate that a clip has, or the one that suits it best.

    Rounded times are those of a constant rate. So are a recorder's that is a few milliseconds
    early or late: no step is a half longer or shorter than the mean, and no frame is moved by more
    than a step. Else the rate varies, and most of its steps say which whole rate it is brought to.

    Args:
        ticks: Times at which frames start, rising.
        tick: Seconds.
        claims: Rates that the file names, the most trusted one first; only what agrees with
            ``ticks`` is believed.
        last_duration: Ticks that the last frame is shown; 0 where that is not known.
    """
    believable = [rate for rate in claims if rate is not None and 0 < rate <= MAX_RATE]
    starts = np.array(ticks, np.int64)
    steps = starts[1:] - starts[:-1]
    if not steps.any():
        rate = next(iter(believable), Fraction(25))
        return _even(rate, max(len(ticks), 1), np.zeros(1), 0.0)
    times = np.asarray(starts - starts[0], np.float64) * float(tick)  # in seconds
    measured = len(steps) / ((ticks[-1] - ticks[0]) * tick)
    claimed = sorted([*believable, *_usual_rates(measured)], key=_is_unusual)
    fit = _fit_constant(times, float(tick), measured, claimed)
    fit = fit or _fit_jittered(times, measured)
    if fit is not None:
        return _even(fit.rate, len(ticks), times[1:] - times[:-1], fit.jitter)
    usual = _usual_step(steps) * tick
    return Timing(
        rate=Fraction(min(MAX_RATE, max(1, round(1 / usual)))),
        is_even=False,
        jitter=0.0,
        shortest=float(int(steps.min()) * tick),
        longest=float(int(steps.max()) * tick),
        duration=(ticks[-1] - ticks[0]) * tick + (last_duration * tick or usual),
        slack=min(tick, Fraction(1, 1000)) / 2,
    )


class _Constant(NamedTuple):
    rate: Fraction
    jitter: float


def _even(rate: Fraction, num_frames: int, steps: NDArray[np.float64], jitter: float) -> Timing:
    return Timing(
        rate=rate,
        is_even=True,
        jitter=jitter,
        shortest=float(steps.min()),
        longest=float(steps.max()),
        duration=num_frames / rate,
        slack=Fraction(0),
    )


def _fit_constant(
    times: NDArray[np.float64], tick: float, measured: Fraction, claims: Sequence[Fraction]
) -> _Constant | None:
    """The rate that times were rounded from: the first claim they agree with, or their mean."""
    for tolerance in (tick, max(tick, SAME_SECONDS)):
        most = min(tolerance, 0.25 / float(measured)) + 1e-9
        for rate in (*claims, measured):
            rate = rate.limit_denominator(1001)
            if rate and np.abs(_offsets(times, rate)).max() <= most:
                return _Constant(rate, 0.0)
    return None


def _fit_jittered(times: NDArray[np.float64], measured: Fraction) -> _Constant | None:
    steps = (times[1:] - times[:-1]) * float(measured)
    if steps.min() <= 0.5 or steps.max() >= 1.5:
        return None
    for rate in (*_usual_rates(measured), measured.limit_denominator(1001)):
        jitter = float(np.ptp(_offsets(times, rate))) / 2 if rate else math.inf
        if jitter * float(rate) < 1:
            return _Constant(rate, jitter)
    return None


def _usual_rates(measured: Fraction) -> list[Fraction]:
    """Whole and NTSC rates near a measured one."""
    usual = (Fraction(round(measured)), *_NTSC)
    return [rate for rate in usual if abs(rate / measured - 1) < SNAP]


def _is_unusual(rate: Fraction) -> bool:
    """Whether a rate is neither whole nor one of NTSC: the writer of the file measured it."""
    return rate.denominator > 1 and rate not in _NTSC


def _offsets(times: NDArray[np.float64], rate: Fraction) -> NDArray[np.float64]:
    """Seconds by which each frame is later than at a constant rate."""
    return times - np.arange(len(times)) / float(rate)


def _usual_step(steps: NDArray[np.int64]) -> int:
    """The median step, or a much shorter one if more than a tenth of all are as short as that."""
    ordered = np.sort(steps[steps > 0])
    median, short = int(ordered[len(ordered) // 2]), int(ordered[len(ordered) // 10])
    return short if 1.5 * short < median else median


def exact_rate(fps: float) -> Fraction:
    """A frame rate as a fraction: 30000/1001 and its like come out exact."""
    return Fraction(fps).limit_denominator(1001)


def count_resampled(num_frames: int, rate: float, fps: float) -> int:
    """Frames that ``change_rate`` makes of some at a rate."""
    return math.ceil(num_frames * exact_rate(fps) / exact_rate(rate))


def make_even(timed: Iterable[tuple[Fraction, T]], timing: Timing) -> Iterator[T]:
    """Frames of a varying rate at a constant one: always the last one that has started.

    Args:
        timed: Frames, each with the seconds at which it starts, rising.
        timing: Timing of the clip, not even.
    """
    start, held, num_shown = Fraction(0), None, 0
    for time, frame in timed:
        if held is None:
            start = time
        else:
            stop = (time - start - timing.slack) * timing.rate
            while num_shown < stop:
                yield held
                num_shown += 1
        held = frame
    while held is not None and num_shown < timing.num_frames:
        yield held
        num_shown += 1


def change_rate(frames: Iterable[T], rate: Fraction, fps: Fraction, first: int = 0) -> Iterator[T]:
    """Frames at another constant rate: always the last one that has started, never a mix.

    Args:
        frames: At ``rate``, from frame ``first * rate // fps`` on.
        rate: Frames a second.
        fps: Frames a second of the result.
        first: First frame of the result.
    """
    num_shown = first
    for number, frame in enumerate(frames, int(first * rate // fps) + 1):
        while num_shown < number * fps / rate:
            yield frame
            num_shown += 1
