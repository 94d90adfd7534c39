"""All measurements of one model, and the marks that they are held against."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from runs.card.camera import ASKS, CameraRow
from runs.card.stages import CARRIED, MODEL, CodecRow, Stage2Row
from swifti2v.evaluation.clips.summary import plain
from swifti2v.evaluation.intervals import Estimate, bootstrap_mean, wilson_share
from swifti2v.units import MB


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsRow:
    """One component's file."""

    component: str
    """Role in the model."""
    num_parameters: int
    """Weights in it."""
    num_bytes: int
    """Size of the file."""
    sha256: str
    """SHA-256 of its bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """All measurements of one model."""

    model: str
    """Name in the tables."""
    setting: str
    """One sentence: sizes, frames, rate, seed."""
    codec: Sequence[CodecRow]
    """Rows at the output's and at Stage I's size."""
    stage2: Sequence[Stage2Row]
    """Rows of every clip and method."""
    moving: Sequence[str]
    """Names of the clips whose camera moves."""
    camera: Sequence[CameraRow]
    """Rows of every photo, prompt and stage."""
    seconds: dict[str, float]
    """Seconds of one clip by stage."""
    peak_rss_bytes: int
    """Most memory of the process up to the end of that clip, with the held-out clips in it."""
    weights: Sequence[WeightsRow] = ()
    """Files of the model."""
    machine: dict[str, str] = field(default_factory=dict)
    """Facts about the machine of the measurements, by name."""

    def camera_rows(self, stage: str, prompts: Iterable[str]) -> list[CameraRow]:
        """Rows of one stage and of some prompts."""
        wanted = set(prompts)
        return [row for row in self.camera if row.stage == stage and row.prompt in wanted]

    def stage2_groups(self) -> dict[str, list[Stage2Row]]:
        """Rows of the clips by their camera: ``still`` or ``moving``."""
        groups: dict[str, list[Stage2Row]] = {"still": [], "moving": []}
        for row in self.stage2:
            groups["moving" if row.clip in self.moving else "still"].append(row)
        return groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """Range in which a value has to lie."""

    low: float = -math.inf
    """Least value."""
    high: float = math.inf
    """Largest value."""
    is_open: bool = False
    """Whether the least value itself fails."""

    def holds(self, value: float) -> bool:
        """Whether a value lies in the range; NaN does not."""
        return self.low <= value <= self.high and not (self.is_open and value == self.low)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.is_open else 'at least'} {self.low:g}"
        return (
            f"at most {self.high:g}" if self.low == -math.inf else f"{self.low:g} to {self.high:g}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A bar, and the model's value."""

    text: str
    """Name of the measured quantity."""
    bar: Bar
    """Range in which the value has to lie."""
    measured: Estimate
    """Mean over clips; for seconds and sizes the single value."""
    num_passing: int
    """Clips that pass on their own."""

    @property
    def is_met(self) -> bool | None:
        """Whether the mean passes; None where nothing was measured."""
        return self.bar.holds(self.measured.value) if self.measured.num_items else None


PANS, ZOOMS = ("pan left", "pan right", "tilt up", "tilt down"), ("zoom in", "zoom out")


def find_marks(card: Card) -> list[Mark]:
    """Compare the model with the marks that ``nano`` has to reach.

    After Stage I + II the seven prompts of every photo count; for Stage I's displacement, all
    prompts whose true displacement is known.
    """
    rows = card.camera_rows("Stage I + II", (ask.prompt for ask in ASKS))
    first = [row for row in card.camera if row.stage == "Stage I"]
    num_bytes = sum(row.num_bytes for row in card.weights)
    shifts, zooms = (card.camera_rows("Stage I + II", prompts) for prompts in (PANS, ZOOMS))
    return [
        _share("camera as asked, share of clips", Bar(low=0.95), [bool(r.is_right) for r in rows]),
        _mark("Stage I's displacement, px off", Bar(high=0.15), [r.displacement_px for r in first]),
        _mark("carried coherence, pans and tilts", Bar(low=0.92), [r.carried for r in shifts]),
        _mark("carried coherence, zooms", Bar(low=0.8), [r.carried for r in zooms]),
        _mark("detail energy", Bar(low=0.8, high=1.3), [r.hf_ratio for r in rows]),
        _mark("cadence", Bar(high=1.15), [r.cadence for r in rows]),
        _mark("blockiness", Bar(high=1.05), [r.blockiness for r in rows]),
        _mark("first frame, dB", Bar(low=40), [r.first_frame_psnr_db for r in rows]),
        *_stage2_marks(card),
        _mark("seconds of a clip", Bar(high=10), [card.seconds["total"]]),
        _mark("weights, MB", Bar(high=40), [num_bytes / MB] if num_bytes else []),
    ]


def _stage2_marks(card: Card) -> list[Mark]:
    return [
        _mark(f"Stage II alone, {group} clips: {name} over {CARRIED}", bar, values)
        for group, rows in card.stage2_groups().items()
        for name, bar, values in (
            ("dB", Bar(low=0.3), over_carried(rows, MODEL, lambda row: row.psnr_db)),
            (
                "coherence",
                Bar(low=0, is_open=True),
                over_carried(rows, MODEL, lambda row: row.coherence),
            ),
        )
    ]


def over_carried(
    rows: Sequence[Stage2Row], method: str, column: Callable[[Stage2Row], float]
) -> list[float]:
    """Gain of a method over the photo's detail carried without a network, clip by clip."""
    by_key = {(row.clip, row.method): column(row) for row in rows}
    return [
        value - by_key[clip, CARRIED]
        for (clip, name), value in by_key.items()
        if name == method and (clip, CARRIED) in by_key
    ]


def _mark(text: str, bar: Bar, values: Sequence[float]) -> Mark:
    return Mark(
        text=text, bar=bar, measured=bootstrap_mean(values), num_passing=sum(map(bar.holds, values))
    )


def _share(text: str, bar: Bar, values: Sequence[bool]) -> Mark:
    right = sum(values)
    return Mark(text=text, bar=bar, measured=wilson_share(right, len(values)), num_passing=right)


def describe_card(card: Card) -> dict[str, Any]:
    """All fields as plain values for JSON, None where nothing was measured, and the marks."""
    marks = [
        {
            "text": mark.text,
            "wanted": str(mark.bar),
            **asdict(mark.measured),
            "num_passing": mark.num_passing,
            "is_met": mark.is_met,
        }
        for mark in find_marks(card)
    ]
    camera = [{**asdict(row), "is_right": row.is_right} for row in card.camera]
    described: dict[str, Any] = plain({**asdict(card), "camera": camera, "marks": marks})
    return described
