"""The measured part of a model card as Markdown, and its place in the card's file."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from runs.card.camera import ASKS, FURTHER_ASKS, CameraRow, CameraStage
from runs.card.marks import Card, find_marks, over_carried
from runs.card.stages import CARRIED, MODEL, Stage2Row
from swifti2v.errors import ConfigError
from swifti2v.evaluation.intervals import Estimate, bootstrap_mean
from swifti2v.units import GB, MB

START, END = "<!-- tables -->", "<!-- /tables -->"
"""Lines of the card between which the tables stand."""
STAGES: tuple[CameraStage, ...] = ("Stage I", "Stage I + II")
STAGE2_COLUMNS: tuple[tuple[str, Callable[[Stage2Row], float], int], ...] = (
    ("PSNR, dB", lambda row: row.psnr_db, 2),
    ("detail coherence", lambda row: row.coherence, 3),
    ("seam score", lambda row: row.seam, 2),
    ("detail energy", lambda row: row.hf_ratio, 2),
    ("cadence", lambda row: row.cadence, 2),
    ("carried coherence", lambda row: row.carried, 3),
    ("blockiness", lambda row: row.blockiness, 3),
)
CAMERA_COLUMNS: tuple[tuple[str, Callable[[CameraRow], float], int], ...] = (
    ("displacement off, px", lambda row: row.displacement_px, 3),
    ("inliers", lambda row: row.inliers, 2),
    ("first frame, dB", lambda row: row.first_frame_psnr_db, 2),
    ("detail energy", lambda row: row.hf_ratio, 2),
    ("cadence", lambda row: row.cadence, 2),
    ("carried coherence", lambda row: row.carried, 3),
    ("blockiness", lambda row: row.blockiness, 3),
)


def render_tables(card: Card) -> str:
    """Markdown of all measurements, without the markers; ends with a line break."""
    parts = [
        f"_{card.setting} Brackets hold 95 % intervals (bootstrap over clips or photos, Wilson's "
        "for shares); with four clips they are hardly more than the range._",
        "### Marks",
        "After both stages, mean over photos and the seven moves that every photo is asked for; "
        "Stage I's displacement over all moves without parallax; Stage II alone over clips.",
        render_marks(card),
        *_codec_part(card),
        *_stage2_part(card),
        *_camera_part(card),
        *_cost_part(card),
    ]
    return "\n\n".join(parts) + "\n"


def read_card(path: Path) -> str:
    """Text of a card.

    Raises:
        ConfigError: There is no file.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: write the card's text first, with the lines "
            "'<!-- tables -->' and '<!-- /tables -->' where the tables belong"
        )
    return path.read_text(encoding="utf-8")


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


def render_marks(card: Card) -> str:
    """A Markdown table of the marks, with the measured values."""
    lines = [
        [
            mark.text,
            str(mark.bar),
            _estimate(mark.measured, 3),
            f"{mark.num_passing} of {mark.measured.num_items}",
            {True: "yes", False: "**no**", None: "not measured"}[mark.is_met],
        ]
        for mark in find_marks(card)
    ]
    return _table(["mark", "wanted", "measured", "passing alone", "met"], lines)


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
    names = [name for name, _, _ in STAGE2_COLUMNS]
    over = [f"over {CARRIED}: dB", "coherence"]
    parts = [
        "### Stage II alone, given the true low-resolution clip",
        "Mean over the clips; frame 0 is the photo and does not count. Seam score: 1 is no seam "
        "(baselines know no segments, theirs is the clips' own). Detail energy: 1 is as much fine "
        "detail as the clip has, right or wrong. Cadence: 1 is even motion within latent frames. "
        "Carried coherence: with the photo moved onto the frame. Blockiness: 1 is no steps at "
        "edges of 8-pixel blocks.",
    ]
    for group, rows in card.stage2_groups().items():
        if not rows:
            continue
        clips = dict.fromkeys(row.clip for row in rows)
        means = [
            _stage2_means(card, rows, method)
            for method in dict.fromkeys(row.method for row in rows)
        ]
        camera = "a still camera" if group == "still" else "a moving camera"
        parts += [
            f"**Clips with {camera}**: {', '.join(clips)}.",
            _table(["method", *names, *over], means),
        ]
    every = [
        [row.clip, _named(row.method, card.model)]
        + [_number(get(row), digits) for _, get, digits in STAGE2_COLUMNS]
        for row in card.stage2
    ]
    return [*parts, _folded("Every clip", _table(["clip", "method", *names], every))]


def _stage2_means(card: Card, rows: Sequence[Stage2Row], method: str) -> list[str]:
    own = [row for row in rows if row.method == method]
    values = [_interval([get(row) for row in own], digits) for _, get, digits in STAGE2_COLUMNS]
    for column, digits in ((lambda row: row.psnr_db, 2), (lambda row: row.coherence, 3)):
        added = bootstrap_mean(over_carried(rows, method, column))
        values.append("" if method == CARRIED else _estimate(added, digits, signed=True))
    return [_bold(method, card.model), *values]


def _camera_part(card: Card) -> list[str]:
    parts = [
        "### Does the camera do as the prompt says?",
        "Means over all prompts, the further ones included. Displacement off: mean distance of Stage "
        "I's displacement from the true one, in pixels of its frames, for moves without parallax.",
    ]
    lines = []
    for stage in STAGES:
        rows = [row for row in card.camera if row.stage == stage]
        named = [row for row in rows if row.is_right is not None]
        right = sum(bool(row.is_right) for row in named)
        values = [_interval([get(row) for row in rows], n) for _, get, n in CAMERA_COLUMNS]
        lines.append([stage, f"{right} of {len(named)}", *values])
    parts.append(_table(["output of", "as asked", *(name for name, _, _ in CAMERA_COLUMNS)], lines))
    parts += [
        "By prompt, after both stages, means over photos: shift, growth and turn of the picture. A "
        "dolly is as asked where it looks like a zoom; an orbit and a hand have no name to go by.",
        _by_prompt(card),
    ]
    for stage in STAGES:
        parts.append(_folded(f"{stage}: every photo", _by_photo(card, stage)))
    return parts


def _by_prompt(card: Card) -> str:
    lines = []
    for ask in (*ASKS, *FURTHER_ASKS):
        first, rows = (card.camera_rows(stage, [ask.prompt]) for stage in STAGES)
        if not rows:
            continue
        right = f"{sum(bool(row.is_right) for row in rows)} of {len(rows)}" if ask.labels else ""
        columns = (
            ([100 * row.pan for row in rows], 1),
            ([100 * row.tilt for row in rows], 1),
            ([100 * row.zoom for row in rows], 1),
            ([row.roll_degrees for row in rows], 1),
            ([row.displacement_px for row in first], 3),
            ([row.hf_ratio for row in rows], 2),
            ([row.cadence for row in rows], 2),
            ([row.carried for row in rows], 3),
        )
        cells = [_number(bootstrap_mean(values).value, digits) for values, digits in columns]
        lines.append([ask.prompt, right, *cells])
    header = ["prompt", "as asked", "right, % of width", "down, % of height", "larger, %"]
    header += ["clockwise, degrees", "displacement off, px"]
    return _table([*header, "detail energy", "cadence", "carried coherence"], lines)


def _by_photo(card: Card, stage: CameraStage) -> str:
    """Right, or the components that were measured instead."""
    prompts = [ask.prompt for ask in (*ASKS, *FURTHER_ASKS)]
    by_key = {(row.photo, row.prompt): row for row in card.camera_rows(stage, prompts)}
    photos = dict.fromkeys(photo for photo, _ in by_key)
    asked = [prompt for prompt in prompts if any((photo, prompt) in by_key for photo in photos)]
    lines = [
        [prompt, *(_verdict(by_key.get((photo, prompt))) for photo in photos)] for prompt in asked
    ]
    return _table(["prompt", *photos], lines)


def _verdict(row: CameraRow | None) -> str:
    if row is None:
        return ""
    return "right" if row.is_right else ", ".join(row.measured) or "static"


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
    return "\N{EN DASH}" if math.isnan(value) else f"{value:z.{digits}f}"


def _interval(values: Sequence[float], digits: int = 2) -> str:
    return _estimate(bootstrap_mean(values), digits)


def _estimate(estimate: Estimate, digits: int, *, signed: bool = False) -> str:
    if math.isnan(estimate.value):
        return _number(estimate.value)
    sign = "+" if signed else ""
    text = f"{estimate.value:{sign}.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{estimate.low:{sign}.{digits}f}, {estimate.high:{sign}.{digits}f}]"
