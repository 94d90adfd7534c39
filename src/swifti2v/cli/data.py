"""``swifti2v data``: contents of a training set, before any training."""

import dataclasses
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.flags import naming_flags
from swifti2v.cli.throttle import Throttle
from swifti2v.errors import InputError
from swifti2v.jobs.paths import require_contact_sheet

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from swifti2v.training.data.buckets import Assignment, BucketedSample, BucketRules
    from swifti2v.training.data.probes import Probes
    from swifti2v.training.data.samples import Reject, Remark, Sample

FIRST_IDS = 5
"""Rejects named for each cause."""
SHEET_SAMPLES, SHEET_FRAMES = 3, 4
"""Rows for each bucket and frames of each row of a contact sheet."""
CELL_HEIGHT, CELL_WIDTH = 180, 320
"""Pixels of a picture on a contact sheet; frames are shown whole within it."""

data_app = typer.Typer(no_args_is_help=True, help="Inspect and prepare training data.")


@data_app.callback()
def data() -> None:
    """Inspect and prepare training data."""


@data_app.command()
def inspect(
    manifest: Annotated[
        Path,
        typer.Argument(
            help="Manifest: CSV, JSONL, Parquet, webdataset .tar, folder or saved HF dataset."
        ),
    ],
    root: Annotated[
        Path | None, typer.Option(help="Folder with the media (default the manifest's).")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split whose samples are used.")] = None,
    bucket: Annotated[
        list[str] | None,
        typer.Option(metavar="TxHxW", help="Frames x height x width. May be given more than once."),
    ] = None,
    fps: Annotated[
        float, typer.Option(help="Frames a second to which clips are resampled.")
    ] = 16.0,
    max_crop: Annotated[
        float | None,
        typer.Option(help="Largest part of a side that may be cut off (default 0.25)."),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="PNG to write with a few samples of each bucket.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="local|auto|ADDRESS", help="Ray cluster whose cores read the files."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Number of files to read at a time.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Report the samples that fit each bucket, and the others with the reason.

    Reads every file that ``data index`` has not read, also those without a caption. Fails if no sample fits.
    """
    with exit_codes(debug=debug), ExitStack() as stack:
        if sheet is not None:
            require_contact_sheet(sheet)
        from swifti2v.training.data.buckets import assign_buckets, probe
        from swifti2v.training.data.probes import Probes, index_path
        from swifti2v.training.data.readers import read_manifest

        with naming_flags():
            rules = _find_rules(bucket or [], fps, max_crop)
        listed = read_manifest(manifest, root=root, split=split)
        if sheet is not None:
            _require_no_input(sheet, listed.samples)
        uncaptioned = [item.uncaptioned for item in listed.rejects if item.uncaptioned is not None]
        lines, num_captioned = Throttle(), len(listed.samples)
        index = index_path(str(manifest))
        look = Probes(index) if index.is_dir() else probe
        if ray is not None:
            look = _look_on(ray, [*listed.samples, *uncaptioned], index, lines, stack)

        def say(num_done: int) -> None:
            total = num_captioned + len(uncaptioned)
            lines.say(f"looked into {num_done} of {total} samples")

        assigned = assign_buckets(
            listed.samples, rules, look=look, num_threads=threads, on_progress=say
        )
        unnamed = assign_buckets(
            uncaptioned,
            rules,
            look=look,
            num_threads=threads,
            on_progress=lambda num_done: say(num_captioned + num_done),
        )
        rejects = [*_with_fit(listed.rejects, unnamed), *assigned.rejects]
        shown: list[str] = []
        if sheet is not None:
            assigned, shown, unreadable = _save_sheet(assigned, sheet)
            rejects += unreadable
        report = _make_report(listed.samples, assigned, unnamed, rejects, shown)
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2) if as_json else _render(report))
        if not assigned.placements:
            more = f"; {len(unnamed.placements)} lack nothing but a caption"
            raise InputError(
                f"no sample of {manifest} can be trained on{more if unnamed.placements else ''}; see "
                "the reasons above"
            )


def _look_on(
    address: str, samples: "Sequence[Sample]", index: Path, lines: Throttle, stack: ExitStack
) -> "Probes":
    """Look into samples with the cores of a cluster; what is found out is kept for this call only."""
    from swifti2v.cluster import Cluster, RayExecutor, connect
    from swifti2v.training.data.probes import Probes

    look = Probes(Path(stack.enter_context(TemporaryDirectory())), [index])
    with connect(Cluster(address=address, cpus_per_actor=1)):
        look.look_into(
            samples,
            RayExecutor(),
            lambda done: lines.say(f"looked into {done} of {len(samples)} samples"),
        )
    return look


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketReport:
    """Samples of one bucket."""

    bucket: str
    """``FRAMESxHEIGHTxWIDTH``."""
    samples: int
    """Number of samples."""
    weight: float
    """Sum of their weights."""
    seconds: float
    """Seconds of video to choose pieces from; 0 for images."""
    uncaptioned: int
    """Further ones that would fit if they had a caption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectReport:
    """Samples that were refused or changed for one cause."""

    cause: str
    """Cause of all of them."""
    samples: int
    """Number of samples."""
    ids: list[str]
    """The first of them."""
    example: str
    """Reason in full of the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """Report that ``swifti2v data inspect`` prints."""

    videos: int
    """Listed with a caption and a file."""
    images: int
    """Listed with a caption and a file."""
    fps: float
    """Rate that clips are resampled to."""
    buckets: list[BucketReport]
    """Buckets in the requested order."""
    references: int
    """Placed samples with a reference clip."""
    captions: dict[str, dict[str, float]]
    """Minimum, median, 95th percentile and maximum of characters and words."""
    rejects: list[RejectReport]
    """Refused samples, the most frequent cause first."""
    notes: list[RejectReport]
    """Changes made to placed clips while they are read, such as resampling a varying rate."""
    shown: list[str]
    """Ids of the samples on the contact sheet, by row."""


def _with_fit(rejects: "Sequence[Reject]", unnamed: "Assignment") -> "list[Reject]":
    """Rejects without a caption also say what else is against them."""
    misfits = {reject.id: reject.reason for reject in unnamed.rejects}
    return [
        dataclasses.replace(reject, reason=f"{reject.cause}, and {misfits[reject.id]}")
        if reject.id in misfits
        else reject
        for reject in rejects
    ]


def _find_rules(buckets: Sequence[str], fps: float, max_crop: float | None) -> "BucketRules":
    from swifti2v.training.data.buckets import BucketRules, parse_bucket

    options: dict[str, Any] = {"fps": fps}
    if buckets:
        options["buckets"] = tuple(parse_bucket(text) for text in buckets)
    if max_crop is not None:
        options["max_crop_share"] = max_crop
    return BucketRules(**options)


def _require_no_input(path: Path, samples: "Sequence[Sample]") -> None:
    from swifti2v.training.data.samples import MediaFile

    if not path.exists():
        return
    for sample in samples:
        media = sample.media
        if not isinstance(media, MediaFile) or media.path.name != path.name:
            continue
        if media.path.samefile(path):
            raise InputError(f"contact sheet {path} is a sample; choose another name")


def _make_report(
    samples: "Sequence[Sample]",
    assigned: "Assignment",
    unnamed: "Assignment",
    rejects: "Sequence[Reject]",
    shown: list[str],
) -> DataReport:
    from swifti2v.training.data.buckets import format_bucket

    num_videos = sum(sample.kind == "video" for sample in samples)
    placements, uncaptioned = assigned.placements, unnamed.by_bucket()
    return DataReport(
        videos=num_videos,
        images=len(samples) - num_videos,
        fps=assigned.rules.fps,
        buckets=[
            BucketReport(
                bucket=format_bucket(shape),
                samples=len(group),
                weight=sum(placement.sample.weight for placement in group),
                seconds=sum(_seconds(placement, assigned.rules.fps) for placement in group),
                uncaptioned=len(uncaptioned[shape]),
            )
            for shape, group in assigned.by_bucket().items()
        ],
        references=sum(placement.sample.reference is not None for placement in placements),
        captions=_measure_captions([placement.sample.prompt for placement in placements]),
        rejects=_group(rejects),
        notes=_group([remark for placement in placements for remark in placement.remarks]),
        shown=shown,
    )


def _seconds(placement: "BucketedSample", fps: float) -> float:
    return placement.num_frames / fps if placement.sample.kind == "video" else 0.0


def _measure_captions(prompts: Sequence[str]) -> dict[str, dict[str, float]]:
    import numpy as np

    if not prompts:
        return {}
    lengths = {
        "characters": [len(prompt) for prompt in prompts],
        "words": [len(prompt.split()) for prompt in prompts],
    }
    names = ("min", "median", "p95", "max")
    return {
        unit: dict(zip(names, np.percentile(values, (0, 50, 95, 100)).tolist(), strict=True))
        for unit, values in lengths.items()
    }


def _group(remarks: "Sequence[Remark]") -> list[RejectReport]:
    groups: dict[str, list[Remark]] = {}
    for remark in remarks:
        groups.setdefault(remark.cause, []).append(remark)
    return [
        RejectReport(
            cause=cause,
            samples=len(group),
            ids=[remark.id for remark in group[:FIRST_IDS]],
            example=group[0].reason,
        )
        for cause, group in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]


def _render(report: DataReport) -> str:
    num_placed = sum(bucket.samples for bucket in report.buckets)
    num_rejects = sum(group.samples for group in report.rejects)
    seconds = sum(bucket.seconds for bucket in report.buckets)
    lines = [
        f"{num_placed} samples can be trained on ({seconds:.1f} s of video at {report.fps:g} fps, "
        f"{report.references} with a reference), {num_rejects} cannot"
    ]
    for bucket in report.buckets:
        more = f"; {bucket.uncaptioned} more if they had a caption" if bucket.uncaptioned else ""
        lines.append(
            f"bucket {bucket.bucket}: {bucket.samples} samples, weight {bucket.weight:g}, "
            f"{bucket.seconds:.1f} s{more}"
        )
    for unit, values in report.captions.items():
        stated = ", ".join(f"{name} {value:g}" for name, value in values.items())
        lines.append(f"captions, {unit}: {stated}")
    groups = [("rejected", group) for group in report.rejects]
    for kind, group in [*groups, *(("note", group) for group in report.notes)]:
        more = ", ..." if group.samples > len(group.ids) else ""
        lines.append(f"{kind}, {group.cause}: {group.samples} ({', '.join(group.ids)}{more})")
        lines.append(f"  the first: {group.example}")
    if report.shown:
        lines.append(f"contact sheet, by row: {', '.join(report.shown)}")
    return "\n".join(lines)


def _save_sheet(assigned: "Assignment", path: Path) -> "tuple[Assignment, list[str], list[Reject]]":
    """Show the first samples of each bucket; those that turn out damaged become rejects.

    Returns:
        The assignment without the damaged ones, the ids shown, and the rejects.
    """
    import numpy as np

    from swifti2v.errors import MediaError
    from swifti2v.media import contact_sheet
    from swifti2v.training.data.samples import Reject

    cells: list[npt.NDArray[np.uint8]] = []
    shown: list[str] = []
    damaged: dict[str, Reject] = {}
    for group in assigned.by_bucket().values():
        num_shown = 0
        for placement in group:
            if num_shown == SHEET_SAMPLES:
                break
            try:
                cells += _make_row(placement, assigned.rules.fps)
            except MediaError as error:
                id_ = placement.sample.id
                damaged[id_] = Reject(id_, f"cannot be read: {error}")
                continue
            shown.append(placement.sample.id)
            num_shown += 1
    if cells:
        contact_sheet(
            np.stack(cells), path, SHEET_FRAMES, len(shown), max_width=SHEET_FRAMES * CELL_WIDTH
        )
    kept = tuple(p for p in assigned.placements if p.sample.id not in damaged)
    return dataclasses.replace(assigned, placements=kept), shown, list(damaged.values())


def _make_row(placement: "BucketedSample", fps: float) -> "list[npt.NDArray[np.uint8]]":
    """Evenly spaced frames of a piece as it would be trained on, the first one named."""
    import numpy as np
    from PIL import Image, ImageDraw

    from swifti2v.media import fit_image
    from swifti2v.training.data.buckets import format_bucket
    from swifti2v.training.data.decoding import decode_clip

    frames = decode_clip(
        placement.sample,
        placement.bucket,
        fps,
        np.random.default_rng(0),
        facts=placement.facts,
    )
    places = np.unique(np.linspace(0, len(frames) - 1, SHEET_FRAMES).round().astype(int))
    pictures = [
        fit_image(Image.fromarray(frames[place]), CELL_HEIGHT, CELL_WIDTH, "pad").image
        for place in places
    ]
    label = f"{format_bucket(placement.bucket)} {placement.sample.id}"
    draw = ImageDraw.Draw(pictures[0])
    text = label.encode("ascii", errors="replace").decode()  # the built-in font has little more
    draw.rectangle((0, 0, draw.textlength(text) + 4, 13), fill=(0, 0, 0))
    draw.text((2, 1), text, fill=(255, 255, 255))
    blank = Image.new("RGB", (CELL_WIDTH, CELL_HEIGHT))
    pictures += [blank] * (SHEET_FRAMES - len(pictures))
    return [np.asarray(picture) for picture in pictures]
