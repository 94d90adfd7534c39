"""The measured part of a model card as Markdown, and its place in the card's file."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from swifti2v.errors import ConfigError
from swifti2v.evaluation.intervals import Estimate, bootstrap_mean, wilson_share
from swifti2v.evaluation.metrics.camera import CAMERA_LABELS
from swifti2v.evaluation.model_card import (
    CAMERA_PROMPTS,
    CARRIED,
    FLOW_WARP,
    LANCZOS,
    MODEL,
    MODEL_NO_ANCHOR,
    CameraRow,
    CameraStage,
    CodecRow,
    Stage2Row,
)
from swifti2v.units import GB, MB

START, END = "<!-- tables -->", "<!-- /tables -->"
"""Lines of the card between which the tables stand."""
COHERENCE_MARK = 0.15
"""Detail coherence that the model has to add to Lanczos."""
PSNR_MARK_DB = -4.0
"""PSNR against Lanczos that it may cost."""
CARRIED_MARK_DB = 0.3
"""PSNR that it has to add to the photo's detail carried along without a network."""
STAGES: tuple[CameraStage, ...] = ("Stage I", "Stage I + II")


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
    """Of its bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """All measurements of one model."""

    model: str
    """Name in the tables."""
    setting: str
    """One sentence: sizes, frames, rate, seed."""
    codec: Sequence[CodecRow]
    """At the output's and at Stage I's size."""
    stage2: Sequence[Stage2Row]
    """Every clip and method."""
    camera: Sequence[CameraRow]
    """Every photo and prompt."""
    seconds: dict[str, float]
    """Of one clip, by stage."""
    peak_rss_bytes: int
    """Most memory of the process up to the end of that clip, with the held-out clips in it."""
    weights: Sequence[WeightsRow] = ()
    """Files of the model."""
    machine: dict[str, str] = field(default_factory=dict)
    """What it was measured on, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A bar for Stage II and where it stands."""

    text: str
    """What is compared."""
    difference: Estimate
    """Over the clips, paired."""
    num_above: int
    """Clips that pass by themselves."""
    is_met: bool
    """Whether the mean passes."""


def stage2_marks(rows: Sequence[Stage2Row]) -> list[Mark]:
    """Compare the model with ways that need no network, and with itself without the photo.

    Args:
        rows: Of all clips; methods that are missing give no mark.
    """
    bars = (
        (LANCZOS, "coherence", COHERENCE_MARK, f"at least +{COHERENCE_MARK:.2f}"),
        (LANCZOS, "psnr_db", PSNR_MARK_DB, f"at least \N{MINUS SIGN}{-PSNR_MARK_DB:.0f} dB"),
        (MODEL_NO_ANCHOR, "coherence", 0.0, "above 0"),
        (MODEL_NO_ANCHOR, "psnr_db", 0.0, "above 0 dB"),
        (CARRIED, "coherence", 0.0, "above 0"),
        (CARRIED, "psnr_db", CARRIED_MARK_DB, f"at least +{CARRIED_MARK_DB:.1f} dB"),
        (FLOW_WARP, "coherence", 0.0, "goal: above 0"),
        (FLOW_WARP, "psnr_db", 0.0, "goal: above 0 dB"),
    )
    by_key = {(row.clip, row.method): row for row in rows}
    marks = []
    for other, column, bar, wanted in bars:
        pairs = [
            (row, by_key[clip, other])
            for (clip, method), row in by_key.items()
            if method == MODEL and (clip, other) in by_key
        ]
        if not pairs:
            continue
        differences = [getattr(a, column) - getattr(b, column) for a, b in pairs]
        passes = [value > bar if bar == 0 else value >= bar for value in differences]
        mean = bootstrap_mean(differences)
        name = "coherence" if column == "coherence" else "PSNR"
        marks.append(
            Mark(
                text=f"{name}, {MODEL} \N{MINUS SIGN} {other}: {wanted}",
                difference=mean,
                num_above=sum(passes),
                is_met=mean.value > bar if bar == 0 else mean.value >= bar,
            )
        )
    return marks


def render_tables(card: Card) -> str:
    """Markdown of all measurements, without the markers; ends with a line break."""
    parts = [
        f"_{card.setting} Brackets hold 95 % intervals (bootstrap over clips or photos, Wilson's "
        "for shares); with three clips they are hardly more than the range._",
        *_codec_part(card),
        *_stage2_part(card),
        *_camera_part(card),
        *_cost_part(card),
    ]
    return "\n\n".join(parts) + "\n"


def replace_tables(text: str, tables: str) -> str:
    """Put tables between the markers of a card and leave the rest as it is.

    Raises:
        ConfigError: The markers are not there exactly once each, in order.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end or START in rest or END in before + after:
        raise ConfigError(
            f"the card needs the lines '{START}' and '{END}' once each, in this order; "
            "the tables go between them"
        )
    return f"{before}{START}\n\n{tables.strip()}\n\n{END}{after}"


def _codec_part(card: Card) -> list[str]:
    lines = [
        [row.clip, f"{row.width}x{row.height}", _number(row.psnr_db), _number(row.coherence, 3)]
        for row in card.codec
    ]
    sizes = dict.fromkeys((row.width, row.height) for row in card.codec)
    for width, height in sizes:
        rows = [row for row in card.codec if (row.width, row.height) == (width, height)]
        lines.append(
            [
                "**mean**",
                f"{width}x{height}",
                _interval([row.psnr_db for row in rows]),
                _interval([row.coherence for row in rows], 3),
            ]
        )
    return [
        "### Codec: encode and decode",
        _table(["clip", "size", "PSNR, dB", "detail coherence"], lines),
    ]


def _stage2_part(card: Card) -> list[str]:
    columns: list[tuple[str, Callable[[Stage2Row], float], int]] = [
        ("PSNR, dB", lambda row: row.psnr_db, 2),
        ("detail coherence", lambda row: row.coherence, 3),
        ("seam score", lambda row: row.seam, 2),
        ("HF energy", lambda row: row.hf_ratio, 2),
        ("cadence", lambda row: row.cadence, 2),
        ("carried coherence", lambda row: row.carried, 3),
        ("blockiness", lambda row: row.blockiness, 3),
    ]
    methods = dict.fromkeys(row.method for row in card.stage2)
    means = []
    for method in methods:
        rows = [row for row in card.stage2 if row.method == method]
        values = [_interval([get(row) for row in rows], digits) for _, get, digits in columns]
        means.append([_bold(method, card.model), *values])
    clips = [
        [row.clip, _named(row.method, card.model)]
        + [_number(get(row), digits) for _, get, digits in columns]
        for row in card.stage2
    ]
    names = [name for name, _, _ in columns]
    marks = [
        [
            _named(mark.text, card.model),
            _estimate(mark.difference, 2, signed=True),
            f"{mark.num_above} of {mark.difference.num_items}",
            "yes" if mark.is_met else "**no**",
        ]
        for mark in stage2_marks(card.stage2)
    ]
    return [
        "### Stage II alone, given the true low-resolution clip",
        "Mean over the clips; frame 0 is the photo and does not count. Seam score: 1 is no seam "
        "(baselines know no segments, theirs is the clips' own). HF energy: 1 is as much fine "
        "detail as the clip has, right or wrong. Cadence: 1 is even motion within latent frames. "
        "Carried coherence: with the photo moved onto the frame. Blockiness: 1 is no steps at "
        "edges of 8-pixel blocks.",
        _table(["method", *names], means),
        _table(["mark", "difference", "clips", "met"], marks),
        _folded("Every clip", _table(["clip", "method", *names], clips)),
    ]


def _camera_part(card: Card) -> list[str]:
    parts = ["### Stage I: does the camera do as the prompt says?"]
    lines = []
    for stage in STAGES:
        rows = [row for row in card.camera if row.stage == stage]
        if not rows:
            continue
        right = sum(row.is_right for row in rows)
        photos = dict.fromkeys(row.photo for row in rows)
        lines.append(
            [
                stage,
                f"{right} of {len(rows)}",
                str(len(photos)),
                _estimate(wilson_share(right, len(rows)), 2),
                _interval([_first_frame(rows, photo) for photo in photos]),
                _number(sum(row.inliers for row in rows) / len(rows)),
                _interval([row.cadence for row in rows]),
                _interval([row.carried for row in rows], 3),
                _interval([row.blockiness for row in rows], 3),
            ]
        )
    header = [
        "output of",
        "right",
        "photos",
        "share",
        "first frame's PSNR to the photo, dB",
        "inliers",
    ]
    header += ["cadence", "carried coherence", "blockiness"]
    parts.append(_table(header, lines))
    for stage in STAGES:
        rows = [row for row in card.camera if row.stage == stage]
        if rows:
            parts.append(_folded(f"{stage}: asked (rows) and measured (columns)", _confusion(rows)))
            parts.append(_folded(f"{stage}: every photo", _by_photo(rows)))
    return parts


def _first_frame(rows: Iterable[CameraRow], photo: str) -> float:
    values = [row.first_frame_psnr_db for row in rows if row.photo == photo]
    return sum(values) / len(values)


def _confusion(rows: Sequence[CameraRow]) -> str:
    lines = []
    for asked in CAMERA_LABELS:
        of_asked = [row for row in rows if row.asked == asked]
        counts = [sum(row.measured == label for row in of_asked) for label in CAMERA_LABELS]
        cells = [
            f"**{count}**" if label == asked else str(count)
            for label, count in zip(CAMERA_LABELS, counts, strict=True)
        ]
        lines.append([asked, *cells])
    return _table(["", *CAMERA_LABELS], lines)


def _by_photo(rows: Sequence[CameraRow]) -> str:
    lines = []
    for photo in dict.fromkeys(row.photo for row in rows):
        by_prompt = {row.prompt: row for row in rows if row.photo == photo}
        cells = [
            "" if row is None else "right" if row.is_right else row.measured
            for row in (by_prompt.get(prompt) for prompt in CAMERA_PROMPTS)
        ]
        lines.append([photo, *cells, _number(_first_frame(rows, photo))])
    return _table(["photo", *CAMERA_PROMPTS, "first frame, dB"], lines)


def _cost_part(card: Card) -> list[str]:
    seconds = [[stage, _number(value, 1)] for stage, value in card.seconds.items()]
    memory = f"{card.peak_rss_bytes / GB:.2f} GB"
    weights = [
        [
            row.component,
            f"{row.num_parameters / 1e6:.2f} M",
            f"{row.num_bytes / MB:.2f} MB",
            f"`{row.sha256[:12]}`",
        ]
        for row in card.weights
    ]
    total = sum(row.num_bytes for row in card.weights)
    weights.append(["**all**", "", f"{total / MB:.2f} MB", ""])
    return [
        "### Cost of one clip",
        _table(
            ["stage", "seconds"],
            [*seconds, ["peak memory of the process, held-out clips included", memory]],
        ),
        _table(["weights", "parameters", "file", "SHA-256"], weights),
        "\n".join(f"- {name}: {value}" for name, value in card.machine.items()),
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines
    )


def _folded(title: str, table: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{table}\n\n</details>"


def _named(text: str, model: str) -> str:
    """A method's name, or a text with it, with the model's own name in place of ``model``."""
    return text.replace(MODEL, model)


def _bold(method: str, model: str) -> str:
    return f"**{model}**" if method == MODEL else _named(method, model)


def _number(value: float, digits: int = 2) -> str:
    if math.isnan(value):
        return "\N{EN DASH}"
    return "exact" if math.isinf(value) else f"{value:.{digits}f}"


def _interval(values: Sequence[float], digits: int = 2) -> str:
    return _estimate(bootstrap_mean(values), digits)


def _estimate(estimate: Estimate, digits: int, *, signed: bool = False) -> str:
    if math.isnan(estimate.value) or math.isinf(estimate.value):
        return _number(estimate.value, digits)
    sign = "+" if signed else ""
    text = f"{estimate.value:{sign}.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{estimate.low:{sign}.{digits}f}, {estimate.high:{sign}.{digits}f}]"
