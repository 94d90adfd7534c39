"""``swifti2v vbench``: make the videos of VBench-I2V, measure them, and score the results."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.options import Placement, read_layers
from swifti2v.cli.seeds import choose_seed
from swifti2v.jobs.interruption import Interruption

if TYPE_CHECKING:
    from swifti2v.evaluation.vbench.lite import LiteResult
    from swifti2v.evaluation.vbench.scores import Scores

vbench_app = typer.Typer(
    no_args_is_help=True, help="Make, measure and score the videos of VBench-I2V."
)

Suite = Annotated[Path, typer.Option(help="Suite: vbench2_i2v_full_info.json, or a file like it.")]
Images = Annotated[
    Path, typer.Option(help="Folder with a folder of crops for every ratio: VBench's data/crop.")
]
Samples = Annotated[
    int, typer.Option(help="Number of videos of a prompt; the published scores use 5.")
]
NoCamera = Annotated[
    bool, typer.Option("--no-camera", help="Leave out the prompts for camera motion.")
]
Ratio = Annotated[
    str, typer.Option(metavar="W-H", help="Ratio of the photos' crops, also for 20:11.")
]
Dimensions = Annotated[
    list[str] | None,
    typer.Option(
        "--dimension", help="Dimension to measure (default all). May be given more than once."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")]


@vbench_app.command()
def setup(
    folder: Annotated[Path, typer.Argument(help="Folder for the script and the pins.")],
    debug: Debug = False,
) -> None:
    """Write a script that installs the official code at one commit; nothing is downloaded yet."""
    with exit_codes(debug=debug):
        from swifti2v.evaluation.vbench.official import COMMIT, write_setup

        script = write_setup(folder)
        typer.echo(f"bash {script.resolve()}")
        typer.echo(
            f"This installs VBench at {COMMIT} with an environment of its own, and the suite's "
            "photos (about 12 GB). It needs Python 3.11, git, wget, unzip and an NVIDIA GPU to run. "
            "Three of its models are for non-commercial use only.",
            err=True,
        )


@vbench_app.command()
def generate(
    suite: Suite,
    images: Images,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the videos.")],
    samples: Samples = 1,
    no_camera: NoCamera = False,
    ratio: Ratio = "16-9",
    shard: Annotated[str, typer.Option(help="Part I (from 1) of N of the videos, as I/N.")] = "1/1",
    model: Annotated[
        str, typer.Option(help="Model: nano, paper, a directory or a Hub id.")
    ] = "nano",
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the first sample; the next samples take the next seeds; -1 draws one."
        ),
    ] = 0,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with settings, or a shipped name.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Setting by its path.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device: cpu, cuda, cuda:1, ...")] = None,
    placement: Annotated[
        Placement, typer.Option(help="Placement: streamed keeps the weights in host memory.")
    ] = Placement.RESIDENT,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print and stop.")] = False,
    debug: Debug = False,
) -> None:
    """Make the suite's videos with the names that VBench needs; the same command continues.

    Shards may run at the same time into the same folder.
    """
    interruption = Interruption()
    with exit_codes(debug=debug), interruption.catch():
        from swifti2v import __version__
        from swifti2v.config import to_dict
        from swifti2v.evaluation.vbench.generation import (
            CRF,
            VIDEOS,
            GenerationRecord,
            generate_videos,
            open_output,
            request_video,
            require_prompts,
            take_shard,
        )
        from swifti2v.evaluation.vbench.photos import check_photo, plan_photo_fit
        from swifti2v.evaluation.vbench.suite import find_photos, list_videos
        from swifti2v.jobs.layers import resolve_config
        from swifti2v.jobs.load import load
        from swifti2v.jobs.resolve import resolve
        from swifti2v.sampling import SAMPLING_VERSION
        from swifti2v.shards import parse_shard
        from swifti2v.storage import encode_text, hash_file

        index, num_shards = parse_shard(shard)
        _, entries = _choose(suite, None, no_camera=no_camera)
        videos = take_shard(list_videos(entries, samples), index, num_shards)
        settings = resolve_config(model, read_layers(config, set_))
        fit = plan_photo_fit(ratio, settings.height, settings.width)
        photos = find_photos(entries, images, ratio)
        for photo in sorted(set(photos.values())):
            check_photo(photo, ratio)
        record = GenerationRecord(
            version=__version__,
            sampling_version=SAMPLING_VERSION,
            suite_sha256=hash_file(suite),
            num_samples=samples,
            has_camera=not no_camera,
            model=model,
            seed=choose_seed(seed),
            photo_fit=fit,
            crf=CRF,
            config=settings,
        )
        if dry_run:
            plan = {"num_videos": len(videos), **to_dict(record)}
            typer.echo(encode_text(json.dumps(plan, ensure_ascii=False, indent=1)))
            return
        requests = [
            request_video(record, video, photos[video.entry.image_name]) for video in videos
        ]
        there = next(p for p in (output, *output.absolute().parents) if p.is_dir())
        pipe = None
        if requests:
            first = replace(requests[0], output=there / requests[0].output)
            pipe = load(resolve(replace(first, device=device, placement=placement.value)))
            pipe.require_fit(settings)
            require_prompts(pipe, videos)
        open_output(output, record)
        num_done = 0

        def say(name: str, is_new: bool) -> None:
            nonlocal num_done
            num_done += 1
            state = "made" if is_new else "was there"
            typer.echo(f"{num_done} of {len(videos)}: {name} {state}", err=True)

        if pipe is not None:
            generate_videos(pipe, requests, output, say, interruption)
        typer.echo(str((output / VIDEOS).resolve()))


@vbench_app.command()
def run(
    videos: Annotated[Path, typer.Argument(help="Folder that holds the videos and nothing else.")],
    vbench: Annotated[Path, typer.Option(help="Folder that 'vbench setup' filled.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the results.")],
    suite: Annotated[
        Path | None,
        typer.Option(
            help="Suite: vbench2_i2v_full_info.json, or a file like it (default the installed one)."
        ),
    ] = None,
    samples: Samples = 1,
    no_camera: NoCamera = False,
    ratio: Ratio = "16-9",
    dimension: Dimensions = None,
    debug: Debug = False,
) -> None:
    """Measure videos with the official code, a dimension at a time; the same command continues."""
    with exit_codes(debug=debug), Interruption().catch():
        from swifti2v.evaluation.vbench import official
        from swifti2v.evaluation.vbench.photos import parse_ratio
        from swifti2v.evaluation.vbench.suite import find_videos
        from swifti2v.storage import hash_file

        parse_ratio(ratio)
        install = official.find_installation(vbench)
        suite = suite or install.repository / official.SUITE
        dimensions, entries = _choose(suite, dimension, no_camera=no_camera)
        present = find_videos(entries, samples, videos)
        _require_only(videos, {path.name for _, path in present})
        official.require_photos(install, entries, dimensions, ratio)
        record = {
            "commit": official.COMMIT,
            "environment": official.describe_environment(install),
            "videos": str(videos.resolve()),
            "suite_sha256": hash_file(suite),
            "num_samples": samples,
            "ratio": ratio,
            "generation": _generation(videos, samples, ratio),
        }
        official.open_run(output, record)
        for name in dimensions:
            typer.echo(f"{name} ...", err=True)
            typer.echo(str(official.run_dimension(install, name, videos, suite, ratio, output)))


@vbench_app.command()
def lite(
    videos: Annotated[Path, typer.Argument(help="Folder of videos.")],
    suite: Suite,
    images: Images,
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")],
    samples: Samples = 1,
    ratio: Ratio = "16-9",
    dimension: Dimensions = None,
    weights: Annotated[
        Path | None, typer.Option(help="Folder of feature extractors (default: download them).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device: cpu, cuda, cuda:1, ...")] = None,
    debug: Debug = False,
) -> None:
    """Measure seven dimensions with our own code; do not mix them with official results."""
    with exit_codes(debug=debug), Interruption().catch():
        from dataclasses import asdict

        from swifti2v.evaluation.report.result_files import versions
        from swifti2v.evaluation.vbench.lite import KIND, LiteVideo, load_measure, measure_all
        from swifti2v.evaluation.vbench.suite import find_photos, find_videos
        from swifti2v.jobs.devices import choose_device
        from swifti2v.jobs.paths import require_writable_file
        from swifti2v.media import probe_clip
        from swifti2v.storage import hash_file, write_whole

        names, entries = _choose(suite, dimension, is_lite=True)
        present = find_videos(entries, samples, videos)
        photos = find_photos(entries, images, ratio)
        require_writable_file(output)
        target = choose_device(device)
        items = [
            LiteVideo(video=video, path=path, photo=photos[video.entry.image_name])
            for video, path in present
        ]
        for item in items:
            for note in probe_clip(item.path).notes:
                typer.echo(f"note: {item.path}: {note}", err=True)
        results: dict[str, LiteResult] = {}
        for name in names:
            measure = load_measure(name, weights, target)

            def say(file: str, num_done: int, name: str = name) -> None:
                typer.echo(f"{name}, {num_done}: {file}", err=True)

            results[name] = measure_all(name, items, measure, say)
            values = {
                "kind": KIND,
                "videos": str(videos.resolve()),
                "suite_sha256": hash_file(suite),
                "num_samples": samples,
                "ratio": ratio,
                "device": str(target),
                "generation": _generation(videos, samples, ratio),
                "dimensions": {key: asdict(value) for key, value in results.items()},
                "versions": versions(),
            }
            write_whole(output, json.dumps(values, ensure_ascii=False, indent=1) + "\n")
        _print_lite(results)


@vbench_app.command()
def score(
    results: Annotated[list[Path], typer.Argument(help="Result files of VBench, or folders.")],
    partial: Annotated[
        bool,
        typer.Option("--partial", help="Score the dimensions at hand and name the missing ones."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Normalise and average the official results; a missing dimension never counts as zero."""
    with exit_codes(debug=debug):
        from swifti2v.evaluation.vbench.scores import (
            find_result_files,
            read_results,
            require_complete,
        )
        from swifti2v.evaluation.vbench.scores import score as compute

        scores = compute(read_results(find_result_files(results)))
        if not partial:
            require_complete(scores)
        if as_json:
            typer.echo(json.dumps(_describe(scores), allow_nan=False))
        else:
            _print_scores(scores)


def _choose(
    suite: Path, asked: list[str] | None, *, no_camera: bool = False, is_lite: bool = False
) -> tuple[Any, Any]:
    """Dimensions asked for that the suite has entries for, and those entries."""
    from swifti2v.evaluation.vbench.dimensions import DIMENSIONS, LITE, choose_dimensions
    from swifti2v.evaluation.vbench.suite import read_suite, select_entries, without_camera

    names = choose_dimensions(asked, LITE if is_lite else DIMENSIONS)
    names = without_camera(names) if no_camera else names
    entries = select_entries(read_suite(suite), names)
    measured = tuple(n for n in names if any(n in entry.dimension for entry in entries))
    return measured, entries


def _require_only(folder: Path, names: set[str]) -> None:
    """Refuse other files: the official code would take the first file and every sample."""
    from swifti2v.errors import InputError

    if others := sorted(path.name for path in folder.iterdir() if path.name not in names):
        raise InputError(
            f"{folder} holds {len(others)} other files ({', '.join(others[:5])}); move them away, or "
            "ask for more --samples or with camera motion"
        )


def _generation(videos: Path, samples: int, ratio: str) -> dict[str, Any] | None:
    """Settings of the videos, if this program made them; they must agree with the request."""
    from swifti2v.config import to_dict
    from swifti2v.errors import InputError
    from swifti2v.evaluation.vbench.generation import read_record

    record = read_record(videos.resolve().parent)
    if record is None:
        return None
    if record.photo_fit.ratio != ratio or record.num_samples < samples:
        raise InputError(
            f"the videos in {videos} were made with --ratio {record.photo_fit.ratio} --samples "
            f"{record.num_samples}, not {ratio} and {samples}"
        )
    return to_dict(record)


def _print_lite(results: "dict[str, LiteResult]") -> None:
    typer.echo("vbench-lite             value   95 % interval over prompts   prompts  videos")
    for name, result in results.items():
        low, high = result.interval.low, result.interval.high
        interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
        num_prompts, num_videos = result.interval.num_items, len(result.videos)
        typer.echo(f"{name:22} {result.value:.4f}   {interval:26} {num_prompts:9} {num_videos:7}")


def _describe(scores: "Scores") -> dict[str, Any]:
    from dataclasses import asdict

    from swifti2v.evaluation.clips.summary import plain

    described: dict[str, Any] = plain(
        {**asdict(scores), "is_partial": bool(scores.missing), "missing": scores.missing}
    )
    return described


def _print_scores(scores: "Scores") -> None:
    from swifti2v.evaluation.vbench.dimensions import DIMENSIONS

    typer.echo("dimension                value  normalised  prompts  of the suite's  videos")
    for name, result in scores.results.items():
        item = DIMENSIONS[name]
        scaled = "" if item.group == "unscored" else f"{item.normalize(result.value):.4f}"
        counts = f"{result.num_prompts:8} {item.num_prompts:15} {result.num_videos:7}"
        typer.echo(f"{name:22} {result.value:7.4f}  {scaled:>10} {counts}")
    for title, value, missing in (
        ("Quality", scores.quality.value, scores.quality.missing),
        ("I2V", scores.i2v.value, scores.i2v.missing),
        ("Total", scores.total, scores.missing),
    ):
        label = f"{title}, PARTIAL: without {', '.join(missing)}" if missing else title
        typer.echo(f"{label}: {'none' if value != value else f'{value:.4f}'}")
