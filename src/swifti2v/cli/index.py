"""``swifti2v data index``: facts about a manifest's media, before a training needs them."""

import json
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.options import takes_options
from swifti2v.cli.ray_options import RayOptions, find_cluster
from swifti2v.cli.throttle import Throttle
from swifti2v.jobs.interruption import Interruption


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexOptions(RayOptions):
    """Options of the command."""

    manifest: Annotated[
        Path,
        typer.Argument(
            help="Manifest: CSV, JSONL, Parquet, webdataset .tar, folder or saved HF dataset."
        ),
    ]
    root: Annotated[
        Path | None, typer.Option(help="Folder with the media (default the manifest's).")
    ] = None
    split: Annotated[str | None, typer.Option(help="Split whose samples are used.")] = None
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Cache or run to keep it in (default MANIFEST.index beside it)."),
    ] = None
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read files (default one a core).")
    ] = None
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Part I (from 1) of N to read; the parts may run at once, on any machines.",
        ),
    ] = "1/1"
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")
    ] = False
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")] = False


@takes_options(IndexOptions)
def index(options: IndexOptions) -> None:
    """Look into all media of a manifest, so that a training starts at once.

    Training finds the index beside the manifest, or in the cache that it reads. Files that have not
    changed are not read again, so the same command continues after a stop.
    """
    with exit_codes(debug=options.debug), Interruption().catch():
        from swifti2v.cluster import RayExecutor, connect
        from swifti2v.shards import is_in_shard, parse_shard
        from swifti2v.training.data.probes import Probes, index_path
        from swifti2v.training.data.readers import read_manifest

        part, lines = parse_shard(options.shard), Throttle()
        listed = read_manifest(options.manifest, root=options.root, split=options.split)
        samples = [s for s in listed.samples if is_in_shard(s.media.name, *part)]
        directory = index_path(str(options.manifest))
        if options.output_dir is not None:
            directory = options.output_dir / "probes"
        cluster = find_cluster(options, options.shard)
        with (
            connect(cluster) if cluster else nullcontext(),
            Probes(directory) as probes,
            RayExecutor() if cluster else _start(options.workers) as executor,
        ):
            rejects = probes.look_into(
                samples,
                executor,
                lambda done: lines.say(f"{done} of {len(samples)} samples"),
            )
        account = {
            "directory": str(directory.resolve()),
            "samples": len(samples),
            "read": probes.num_new,
            "known": len(samples) - probes.num_new - len(rejects),
            "rejects": [asdict(reject) for reject in rejects],
        }
    for reject in rejects:
        typer.echo(f"{reject.id}: {reject.reason}", err=True)
    text = "{directory}\n{samples} samples: {read} read, {known} known before".format(**account)
    more = f", {len(rejects)} cannot be read" if rejects else ""
    typer.echo(json.dumps(account) if options.as_json else text + more)


def _start(workers: int | None) -> ProcessPoolExecutor:
    """Processes that a signal for all of them leaves to this one."""
    count = workers or os.cpu_count() or 1
    return ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )
