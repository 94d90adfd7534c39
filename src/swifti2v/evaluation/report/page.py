"""One HTML file with everything in it: tables, plots and pictures of an evaluation."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from swifti2v.evaluation.clips.inputs import ClipInputs, pixel_starts
from swifti2v.evaluation.clips.offline import METRICS, Metric, Scores
from swifti2v.evaluation.intervals import Estimate
from swifti2v.evaluation.report.pictures import ClipPictures
from swifti2v.evaluation.report.plots import bar_plot, line_plot

BETTER = {
    "high": "higher is better",
    "low": "lower is better",
    "one": "1 is best",
    "zero": "0 is best",
}
SEAM, BLOCK, OTHER = "segment starts", "other latent frame starts", "other frames"
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#222;margin:2rem auto;max-width:1180px;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.2rem .7rem;text-align:right;
border-bottom:1px solid #ddd;font-variant-numeric:tabular-nums;white-space:nowrap}th:first-child,td:first-child,
td.text{text-align:left;white-space:normal}td.text{color:#666}.scroll{overflow-x:auto}.plots{display:grid;
grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:1rem}.sheet{display:grid;
grid-template-columns:repeat(4,1fr);gap:.5rem}figure{margin:0}figcaption{font-size:12px;color:#666}
img,svg{width:100%;height:auto;display:block}.slice img{height:220px}.slice{position:relative;margin-top:1.5rem}.slice i{position:absolute;
top:0;bottom:0;border-left:2px solid #fff;mix-blend-mode:difference}
section{border-top:2px solid #222;margin-top:2.5rem}.note{color:#666}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipResult:
    """One clip of a report."""

    inputs: ClipInputs
    """The clip and its comparisons."""
    scores: Scores
    """Measurements of the clip."""
    pictures: ClipPictures | None = None
    """Pictures of the clip; None shows only its row in the table."""


def render_report(
    results: Sequence[ClipResult],
    summary: Mapping[str, Estimate] | None,
    differences: Mapping[str, Estimate] | None,
    versions: Mapping[str, str],
) -> str:
    """Write the page: clips in order, their means, and paired differences to a baseline."""
    parts = ["<h1>Evaluation</h1>"]
    if summary is not None:
        parts += _summary(len(results), summary, differences)
        parts.append(_all_clips(results))
    parts += [_clip(result) for result in results if result.pictures is not None]
    if any(result.pictures is None for result in results):
        parts.append('<p class="note">Further clips are in the table only.</p>')
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts.append(f'<p class="note">{escape(software)}</p>')
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _summary(
    num_clips: int, summary: Mapping[str, Estimate], differences: Mapping[str, Estimate] | None
) -> list[str]:
    header = ["metric", "mean", "95 % interval", "clips"]
    if differences is not None:
        header += ["minus baseline", "95 % interval"]
    rows = []
    for metric in METRICS:
        if not summary[metric.name].num_items:
            continue
        cells = [*estimate_cells(summary[metric.name], metric), str(summary[metric.name].num_items)]
        if differences is not None:
            cells += estimate_cells(differences[metric.name], metric, signed=True)
        rows.append([_named(metric), *(f"<td>{cell}</td>" for cell in cells)])
    return [
        f"<p>{num_clips} clips. Intervals are bootstrapped over clips; fewer than three give "
        "none. Differences are paired, clip by clip. Metrics without values are left out.</p>",
        _table(header, rows),
    ]


def _all_clips(results: Sequence[ClipResult]) -> str:
    columns = [
        metric
        for metric in METRICS
        if any(metric.name not in result.scores.not_measured for result in results)
    ]
    rows = [
        [
            f"<td>{escape(result.inputs.name)}</td>",
            *(f"<td>{number(result.scores.values[m.name], m.digits)}</td>" for m in columns),
        ]
        for result in results
    ]
    return _table(["clip", *(metric.name for metric in columns)], rows)


def _clip(result: ClipResult) -> str:
    inputs, pictures = result.inputs, result.pictures
    assert pictures is not None
    video = inputs.video
    starts = [] if inputs.segment_starts is None else pixel_starts(inputs.segment_starts)
    facts = f"{video.size}, {video.num_frames} frames at {video.fps:g} fps; segments: " + (
        f"start at frames {', '.join(map(str, starts))} ({inputs.segments_source})"
        if inputs.segment_starts is not None
        else f"unknown ({inputs.segments_source})"
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in inputs.notes)
    return (
        f"<section><h2>{escape(inputs.name)}</h2><p>{escape(facts)}</p>{notes}"
        f"{_sheet(pictures)}{_values(result.scores)}"
        f'<div class="plots">{"".join(_plots(result, starts, pictures))}</div>'
        f"{_slice(pictures, starts, video.num_frames)}</section>"
    )


def _sheet(pictures: ClipPictures) -> str:
    figures = (
        f'<figure><img alt="frame {index}" src="{_data("jpeg", data)}">'
        f"<figcaption>frame {index}</figcaption></figure>"
        for index, data in pictures.thumbnails.items()
    )
    return f'<div class="sheet">{"".join(figures)}</div>'


def _values(scores: Scores) -> str:
    rows = []
    for metric in METRICS:
        reason = scores.not_measured.get(metric.name)
        value = number(scores.values[metric.name], metric.digits)
        about = f"not measured: {reason}" if reason else BETTER[metric.better]
        rows.append([_named(metric), f"<td>{value}</td>", f'<td class="text">{escape(about)}</td>'])
    return _table(["metric", "value", ""], rows)


def _plots(result: ClipResult, starts: Sequence[int], pictures: ClipPictures) -> list[str]:
    curves = result.scores.curves
    by_frame = [
        ("Photo followed through the clip, dB", ("fidelity_over_time",)),
        ("Fine detail relative to the photo", ("hf_energy_ratio",)),
        ("Distance of the mean colour from the photo's, Lab", ("colour_drift",)),
        (
            "Contrast, and part of the frame that is followed",
            ("contrast_drift", "visible_over_time"),
        ),
        ("PSNR, dB", ("psnr", "stage_agreement")),
        ("Against the truth", ("ssim", "detail_coherence")),
        ("Coherence with the photo moved onto the frame", ("carried_coherence",)),
        ("Mean change to the frame before", ("frame_change",)),
        ("Steps at the edges of 8-pixel blocks", ("blockiness",)),
    ]
    plots = []
    for title, names in by_frame:
        drawn = {name: _points(name, curves[name]) for name in names if name in curves}
        if drawn:
            plots.append(line_plot(title, "frame", drawn, starts))
    spectra = {
        name: [
            ((ring + 0.5) / len(values) / 2, 10 * math.log10(energy) if energy > 0 else math.nan)
            for ring, energy in enumerate(values)
        ]
        for name, values in pictures.spectra.items()
    }
    plots.append(line_plot("Radial spectrum of luma, dB", "cycles per pixel", spectra))
    plots.append(_residuals(curves["motion_residual"], result.inputs.segment_starts))
    return [f"<figure>{plot}</figure>" for plot in plots]


def _points(name: str, curve: Sequence[float]) -> list[tuple[float, float]]:
    """Frame and value; a metric of every fourth frame is drawn over the frames between."""
    points = [(float(frame), value) for frame, value in enumerate(curve)]
    if name == "carried_coherence":
        return [point for point in points if not math.isnan(point[1])]
    return points


def _residuals(residuals: Sequence[float], starts: Sequence[int] | None) -> str:
    """Plot the residuals of motion at every frame's start, joins in their own colour."""
    segments = set(pixel_starts(starts or ())) - {1}
    blocks = {frame for frame in range(5, len(residuals) + 1) if frame % 4 == 1} - segments
    bars = [
        (float(frame), value, SEAM if frame in segments else BLOCK if frame in blocks else OTHER)
        for frame, value in enumerate(residuals, start=1)
    ]
    title = "Change to the frame before that motion does not explain"
    return bar_plot(title, "frame", bars, (OTHER, SEAM, BLOCK))


def _slice(pictures: ClipPictures, starts: Sequence[int], num_frames: int) -> str:
    marks = "".join(f'<i style="left:{100 * start / num_frames:.3f}%"></i>' for start in starts)
    return (
        f'<figure><div class="slice"><img alt="middle column over time" '
        f'src="{_data("png", pictures.time_slice)}">{marks}</div><figcaption>Seam strip: the middle '
        "column of every frame, time from left to right; lines are starts of segments. A seam is a "
        "vertical edge at a line.</figcaption></figure>"
    )


def _named(metric: Metric) -> str:
    return f"<td>{escape(metric.title)} <code>{metric.name}</code></td>"


def estimate_cells(estimate: Estimate, metric: Metric, *, signed: bool = False) -> list[str]:
    """Value and 95 % interval for people; a missing interval is empty."""
    digits = metric.digits
    if estimate.low is None or estimate.high is None:
        return [number(estimate.value, digits, signed=signed), ""]
    low, high = (number(end, digits, signed=signed) for end in (estimate.low, estimate.high))
    return [number(estimate.value, digits, signed=signed), f"{low} to {high}"]


def number(value: float, digits: int, *, signed: bool = False) -> str:
    """A value for people; a dash for NaN."""
    if math.isnan(value):
        return "\N{EN DASH}"
    return f"{value:{'+' if signed else ''}.{digits}f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _data(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
