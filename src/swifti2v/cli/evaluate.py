"""``swifti2v evaluate``: measure clips with every metric that needs no weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.flags import naming_flags
from swifti2v.cli.options import Fit

if TYPE_CHECKING:
    from swifti2v.evaluation.clips.inputs import ClipFile, ClipInputs, PhotoFile
    from swifti2v.evaluation.clips.pairing import Files
    from swifti2v.evaluation.report.page import ClipResult
    from swifti2v.jobs.settings import RunSettings

MAX_PICTURED = 100
"""Clips with plots and pictures in a report; more would make a file that no browser opens."""


class Reading(NamedTuple):
    """Settings for reading all clips."""

    fps: float | None
    """Rate to resample to."""
    fit: str | None
    """Way in which photos were fitted, for clips without settings."""
    segment_starts: tuple[int, ...] | None
    """First pixel frames of segments, for every clip."""


def evaluate(
    video: Annotated[
        Path, typer.Argument(help="A video, a folder of videos, or a manifest (.csv, .jsonl).")
    ],
    image: Annotated[
        Path | None,
        typer.Option(help="The photo, or a folder of photos paired by file name."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The true video, or a folder of them.")
    ] = None,
    motion_reference: Annotated[
        Path | None, typer.Option(help="Stage I's video, or a folder of them.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="The same videos made in another way, for paired differences."),
    ] = None,
    segment_starts: Annotated[
        str | None,
        typer.Option(
            metavar="13,25,...",
            help="First frames of segments (default those stored in the video).",
        ),
    ] = None,
    fit: Annotated[
        Fit | None,
        typer.Option(help="Way in which the photo was fitted, if the video does not store it."),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Rate to which videos are resampled (default their own).")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for metrics.json, metrics.csv, report.html."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Measure fidelity, detail, steadiness, seams, noise and drift of videos; no weights needed."""
    with exit_codes(debug=debug):
        from swifti2v.evaluation.clips.pairing import MANIFEST_SUFFIXES, find_files, parse_starts
        from swifti2v.evaluation.report.result_files import require_folder

        if output is not None:
            require_folder(output)
        reading = Reading(
            fps, fit and fit.value, None if segment_starts is None else parse_starts(segment_starts)
        )
        others = {"image": image, "reference": reference, "baseline": baseline}
        others["motion_reference"] = motion_reference
        files = find_files(video, others)
        _require_baselines(video, files)
        is_set = video.is_dir() or video.suffix.lower() in MANIFEST_SUFFIXES
        with naming_flags():
            inputs = [_open(one, one.video, reading) for one in files]
            baselines = [_open(one, one.baseline, reading) for one in files if one.baseline]
        results = _measure(inputs, has_pictures=output is not None)
        _finish(results, _measure(baselines, has_pictures=False), output, is_set, as_json)


def _require_baselines(video: Path, files: Sequence["Files"]) -> None:
    from swifti2v.errors import InputError

    num_given = sum(one.baseline is not None for one in files)
    if 0 < num_given < len(files):
        raise InputError(
            f"{video} names a baseline for {num_given} of {len(files)} clips; name one for each, "
            "or for none"
        )


def _open(files: "Files", video: Path, reading: Reading) -> "ClipInputs":
    """Read and check a clip and all it is compared with."""
    from swifti2v.evaluation.clips.inputs import ClipInputs, check_clip

    clip = check_clip(video, reading.fps)
    settings, reason = _settings(video)
    starts, source = _segments(files.segment_starts or reading.segment_starts, clip, settings)
    notes = [*clip.notes, *_length_notes(clip, settings), *_photo_notes(files, settings)]
    photo = None if files.image is None else _photo(files.image, settings, reading)
    if photo is not None:
        _, note = photo.load(clip.height, clip.width)
        notes += [note] if note else []
    others = {
        role: check_clip(path, reading.fps)
        for role, path in (
            ("reference", files.reference),
            ("motion_reference", files.motion_reference),
        )
        if path is not None
    }
    notes += [f"{other.path}: {note}" for other in others.values() for note in other.notes]
    inputs = ClipInputs(
        name=files.name,
        video=clip,
        photo=photo,
        reference=others.get("reference"),
        motion_reference=others.get("motion_reference"),
        segment_starts=starts,
        segments_source=source or reason,
        notes=tuple(notes),
    )
    inputs.check()
    return inputs


def _settings(video: Path) -> tuple["RunSettings | None", str]:
    """Settings stored in a video, or the reason why there are no settings."""
    from swifti2v.errors import ConfigError, InputError
    from swifti2v.jobs.settings import read_settings

    try:
        return read_settings(video), ""
    except (InputError, ConfigError) as error:
        return None, f"{error}; give --segment-starts"


def _segments(
    given: tuple[int, ...] | None, clip: "ClipFile", settings: "RunSettings | None"
) -> tuple[tuple[int, ...] | None, str]:
    """Latent frames at which segments start, and where that is from."""
    from swifti2v.evaluation.clips.inputs import latent_starts
    from swifti2v.shapes import latent_frames

    if given is not None:
        return latent_starts(given, clip.num_frames), "given"
    if settings is None:
        return None, ""
    if clip.resample_fps is not None:
        return None, "resampling moved the frames; give --segment-starts"
    segments = settings.config.stage2.plan(latent_frames(clip.num_frames))
    return tuple(max(1, segment.target[0]) for segment in segments), "from the video's own settings"


def _photo(path: Path, settings: "RunSettings | None", reading: Reading) -> "PhotoFile":
    from swifti2v.evaluation.clips.inputs import PhotoFile
    from swifti2v.jobs.settings import parse_color

    fit = reading.fit or (settings.fit if settings else None)
    background = settings.background if settings else None
    return PhotoFile(
        path=path,
        fit=fit,  # type: ignore[arg-type]
        background=parse_color(background) if background else None,
    )


def _length_notes(clip: "ClipFile", settings: "RunSettings | None") -> list[str]:
    if settings is None or clip.resample_fps is not None:
        return []
    asked = settings.config.num_frames
    if clip.num_frames >= asked:
        return []
    return [f"it has {clip.num_frames} of the {asked} frames asked for: interrupted, or cut off"]


def _photo_notes(files: "Files", settings: "RunSettings | None") -> list[str]:
    from swifti2v.storage import hash_file

    if files.image is None:
        return ["no photo was given: frame 0 stands in for it over time"]
    if settings is not None and hash_file(files.image) != settings.image.sha256:
        return [f"{files.image} is not the photo the video was made from ({settings.image.path})"]
    return []


def _measure(inputs: Sequence["ClipInputs"], *, has_pictures: bool) -> list["ClipResult"]:
    from swifti2v.evaluation.clips.offline import evaluate_clip
    from swifti2v.evaluation.report.page import ClipResult
    from swifti2v.evaluation.report.pictures import picture_clip

    results = []
    for index, one in enumerate(inputs):
        typer.echo(f"{index + 1} of {len(inputs)}: {one.video.path}", err=True)
        pictures = picture_clip(one) if has_pictures and index < MAX_PICTURED else None
        results.append(ClipResult(inputs=one, scores=evaluate_clip(one), pictures=pictures))
    return results


def _finish(
    results: Sequence["ClipResult"],
    baselines: Sequence["ClipResult"],
    output: Path | None,
    is_set: bool,
    as_json: bool,
) -> None:
    """Write the files and print."""
    from swifti2v.cli.evaluate_tables import describe_measured, tabulate_clip, tabulate_means
    from swifti2v.evaluation.clips.summary import paired_differences, summarize
    from swifti2v.evaluation.report.result_files import (
        HTML_NAME,
        describe_clip,
        describe_set,
        versions,
        write_files,
    )
    from swifti2v.storage import encode_text

    has_means = is_set or bool(baselines)
    summary = summarize([result.scores for result in results]) if has_means else None
    differences = None
    if baselines:
        differences = paired_differences(_by_name(results), _by_name(baselines))

    def describe(*, curves: bool) -> dict[str, Any]:
        if summary is None:
            return {**describe_clip(results[0], curves=curves), "versions": versions()}
        return describe_set(results, summary, baselines or None, differences, curves=curves)

    if output is not None:
        write_files(output, results, describe(curves=True), summary, differences)
    if as_json:
        typer.echo(
            encode_text(json.dumps(describe(curves=False), ensure_ascii=False, allow_nan=False))
        )
        return
    lines = describe_measured(results, baselines)
    if summary is None:
        for note in results[0].inputs.notes:
            typer.echo(f"note: {note}", err=True)
        lines += tabulate_clip(results[0])
    else:
        lines += tabulate_means(summary, differences)
    typer.echo("\n".join(lines))
    if output is not None:
        typer.echo(str((output / HTML_NAME).resolve()))


def _by_name(results: Sequence["ClipResult"]) -> dict[str, Any]:
    return {result.inputs.name: result.scores for result in results}
