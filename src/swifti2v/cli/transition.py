"""``swifti2v data transition``: true clips as Stage I draws them, for training Stage II."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.flags import COMMAND_LINE, naming_flags
from swifti2v.cli.loras import LORA_FORM, LORA_HELP, parse_lora
from swifti2v.cli.options import Placement, read_layers, takes_options
from swifti2v.cli.ray_options import RayOptions, find_cluster
from swifti2v.cli.seeds import choose_seed
from swifti2v.cli.throttle import Throttle
from swifti2v.config import GenerationConfig, expand_shorthands
from swifti2v.errors import InputError
from swifti2v.jobs.devices import find_device
from swifti2v.jobs.input_files import InputFiles
from swifti2v.jobs.interruption import Interruption
from swifti2v.shards import parse_shard

if TYPE_CHECKING:
    from swifti2v.cluster import Cluster
    from swifti2v.models.loading.sources import LoraSource
    from swifti2v.pipelines.two_stage import SwiftI2VPipeline
    from swifti2v.training.data.samples import Manifest, Sample
    from swifti2v.training.transition.job import OnProgress, Outcome, TransitionJob
    from swifti2v.training.transition.store import TransitionStore

BATCH_SIZE = 4
"""Clips that an actor of a cluster makes before it reports."""
LEAST_GAIN = 1.0
"""dB over a still first frame below which the motion counts as lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransitionOptions(RayOptions):
    """Options of the command."""

    manifest: Annotated[
        Path,
        typer.Argument(help="Manifest of clips: CSV, JSONL, Parquet, folder or saved HF dataset."),
    ]
    output_dir: Annotated[
        Path,
        typer.Option(
            help="Directory for clips/ and manifest.jsonl, a training manifest of all parts."
        ),
    ]
    root: Annotated[
        Path | None, typer.Option(help="Folder with the clips (default the manifest's).")
    ] = None
    split: Annotated[str | None, typer.Option(help="Split whose samples are used.")] = None
    model: Annotated[
        str, typer.Option(help="Model: nano, paper, a YAML preset, a directory or a Hub id.")
    ] = "nano"
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar=LORA_FORM, help=f"LoRA to merge into Stage I; {LORA_HELP}"),
    ] = None
    without_loras: Annotated[
        bool,
        typer.Option(
            "--without-loras",
            help="Leave out the LoRAs of the model itself; give more steps with --set as well.",
        ),
    ] = False
    sigma: Annotated[
        str, typer.Option(metavar="LOW:HIGH", help="Range of the noise level, within (0, 1].")
    ] = "0.2:0.6"
    num_frames: Annotated[int | None, typer.Option(help="Frames of each clip, 4k + 1.")] = None
    height: Annotated[
        int | None, typer.Option(help="Height of the true clip; the new one has a fraction of it.")
    ] = None
    width: Annotated[
        int | None, typer.Option(help="Width of the true clip; the new one has a fraction of it.")
    ] = None
    fps: Annotated[int | None, typer.Option(help="Frames a second, of both clips.")] = None
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="A.B=C",
            help="Setting by path, such as stage1.sampling.num_inference_steps=8. May be repeated.",
        ),
    ] = None
    seed: Annotated[
        int, typer.Option(help="Seed of noise levels, noise and windows; -1 draws one.")
    ] = 0
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Part I (from 1) of N to make; the parts may run at once, on any machines.",
        ),
    ] = "1/1"
    device: Annotated[str | None, typer.Option(help="Device: cpu, cuda, cuda:1, ...")] = None
    placement: Annotated[
        Placement,
        typer.Option(
            help="Placement: streamed keeps the weights in host memory: less GPU memory, slower."
        ),
    ] = Placement.RESIDENT
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the inputs, print the settings and stop.")
    ] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")
    ] = False
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")] = False


@takes_options(TransitionOptions)
def transition(options: TransitionOptions) -> None:
    """Make stage-transition samples: scale clips down, noise them and denoise them with Stage I.

    The new clips keep the true motion and look like Stage I's. A stopped run keeps finished clips:
    run the same command again to continue. Clips that cannot be used are counted and named; it is
    an error if no clip can be used. The part of a clip depends on its id alone, so all parts
    together make the result of one run: each leaves its rows in manifest-I-of-N.jsonl, and the last
    one writes manifest.jsonl.
    """
    interruption = Interruption()
    with exit_codes(debug=options.debug), interruption.catch():
        report = _run(options, interruption)
    if report is not None:
        _warn_of_lost_motion(report)
        typer.echo(json.dumps(report) if options.as_json else "\n".join(_to_lines(report)))


def _run(options: TransitionOptions, interruption: Interruption) -> dict[str, Any] | None:
    """The account of the run; None of a dry run, which prints its plan."""
    low, high = _parse_sigma(options.sigma)
    loras = [InputFiles().lora(parse_lora(f"stage1={text}")) for text in options.lora or []]
    generation = _resolve(options)
    from swifti2v.training.data.readers import read_manifest
    from swifti2v.training.transition.job import TransitionJob
    from swifti2v.training.transition.samples import TransitionConfig, take_shard
    from swifti2v.training.transition.store import TransitionStore

    index, num_shards = parse_shard(options.shard)
    cluster = find_cluster(options, options.shard, options.device)
    config = TransitionConfig(
        generation=generation, sigma_low=low, sigma_high=high, seed=choose_seed(options.seed)
    )
    store = TransitionStore(options.output_dir)
    manifest = read_manifest(options.manifest, root=options.root, split=options.split)
    listed = take_shard(manifest, index, num_shards)
    load = partial(_load, options, generation, loras)
    pipe = load("cpu" if cluster else options.device)
    for line in pipe.components.describe_loras():
        _note(line)
    model = {
        "name": options.model,
        "without_loras": options.without_loras,
        "loras": [asdict(item) for item in loras],
    }
    with naming_flags():
        job = TransitionJob(pipe, config, store, model, _note)
    finished = job.find_finished(listed.samples)
    if options.dry_run:
        plan = job.describe(listed, len(finished))
        text = yaml.safe_dump(plan, sort_keys=False, allow_unicode=True).rstrip()
        typer.echo(json.dumps(plan) if options.as_json else text)
        return None
    lines, total = Throttle(), len(listed.samples)

    def say(done: int, refused: int) -> None:
        lines.say(f"{done} of {total} clips, {refused} refused")

    if cluster is None:
        outcome = job.run(listed, finished, interruption, say)
    else:
        left = [sample for sample in listed.samples if sample.id not in finished]
        arguments = (partial(load, cluster.device), config, store, model)
        outcome = _run_on(cluster, job, listed, left, arguments, say)
    return _finish(outcome, store, index, num_shards)


def _run_on(
    cluster: "Cluster",
    job: "TransitionJob",
    listed: "Manifest",
    left: "Sequence[Sample]",
    arguments: tuple[Any, ...],
    say: "OnProgress",
) -> "Outcome":
    """Make the samples that are left with the actors of a cluster; every node has to see the files."""
    from swifti2v.cluster import connect, make_with_actors
    from swifti2v.training.transition.job import TransitionActor, join_outcomes

    batches = [left[at : at + BATCH_SIZE] for at in range(0, len(left), BATCH_SIZE)]
    with connect(cluster):
        outcomes = make_with_actors(TransitionActor, arguments, batches, cluster)
        return join_outcomes(job, listed, outcomes, say)


def _note(text: str) -> None:
    typer.echo(f"note: {text}", err=True)


def _finish(
    outcome: "Outcome", store: "TransitionStore", index: int, num_shards: int
) -> dict[str, Any]:
    """Write the manifest and give the account of the run.

    Raises:
        InputError: There were clips, and none could be used.
    """
    for reject in outcome.rejects:
        typer.echo(f"refused {reject.id}: {reject.reason}", err=True)
    manifest = store.write_rows(outcome.rows, index, num_shards)
    if outcome.rejects and not outcome.rows:
        raise InputError(
            f"no sample was made: all {len(outcome.rejects)} clips were refused, the first for: "
            f"{outcome.rejects[0].reason}"
        )
    records, num_made = outcome.records, outcome.num_made
    return {
        "manifest": None if manifest is None else str(manifest.resolve()),
        "num_made": num_made,
        "num_kept": len(records) - num_made,
        "rejects": [asdict(reject) for reject in outcome.rejects],
        "psnr": round(fmean(r["psnr"] for r in records), 3) if records else None,
        "still_psnr": round(fmean(r["still_psnr"] for r in records), 3) if records else None,
        "seconds": round(outcome.seconds, 3),
    }


def _to_lines(report: dict[str, Any]) -> list[str]:
    if report["psnr"] is None:
        return ["no clip of the manifest belongs to this part"]
    causes = Counter(reject["reason"].partition(": ")[0] for reject in report["rejects"])
    return [
        report["manifest"] or "manifest.jsonl is written when the other parts are finished",
        f"{report['num_made']} samples made, {report['num_kept']} kept, {len(report['rejects'])} "
        f"refused, {report['seconds']:.1f} s",
        *(f"refused, {cause}: {count}" for cause, count in causes.most_common()),
        f"mean PSNR to the true clips {report['psnr']:.1f} dB; of their still first frames "
        f"{report['still_psnr']:.1f} dB",
    ]


def _warn_of_lost_motion(report: dict[str, Any]) -> None:
    if report["psnr"] is not None and report["psnr"] < report["still_psnr"] + LEAST_GAIN:
        typer.echo(
            "note: Stage I did not keep the motion: its clips are hardly nearer to the true ones "
            "than their still first frames; choose a lower --sigma or another model",
            err=True,
        )


def _parse_sigma(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    try:
        return float(low), float(high or low)
    except ValueError:
        raise InputError(f"sigma {text!r} is not LOW:HIGH or one number, as 0.2:0.6") from None


def _resolve(options: TransitionOptions) -> GenerationConfig:
    """Settings of the model, with ``--set`` and then the options on top."""
    from swifti2v.jobs.layers import resolve_config

    sizes = {name: getattr(options, name) for name in ("num_frames", "height", "width", "fps")}
    layers = [*read_layers(None, options.set_), (COMMAND_LINE, expand_shorthands(sizes))]
    with naming_flags(layers):
        return resolve_config(options.model, layers)


def _load(
    options: TransitionOptions,
    generation: GenerationConfig,
    loras: "list[LoraSource]",
    device: str | None,
) -> "SwiftI2VPipeline":
    from swifti2v.models.loading.components import STAGES
    from swifti2v.pipelines.two_stage import SwiftI2VPipeline

    typer.echo(f"loading {options.model}", err=True)
    return SwiftI2VPipeline.from_pretrained(
        options.model,
        device=find_device(device),
        placement=options.placement.value,
        loras=loras,
        speed={stage: getattr(generation, stage).speed for stage in STAGES},
        merges_own_loras=not options.without_loras,
    )
