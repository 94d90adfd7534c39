"""``swifti2v data cache``: output of a training's frozen encoders, computed beforehand."""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.options import takes_options
from swifti2v.cli.ray_options import RayOptions, find_cluster
from swifti2v.cli.throttle import Throttle
from swifti2v.cli.train import resolve_settings
from swifti2v.errors import InputError
from swifti2v.jobs.devices import choose_device
from swifti2v.jobs.interruption import Interruption

if TYPE_CHECKING:
    from swifti2v.cluster import Cluster
    from swifti2v.training.stages.cache_making import CachePlan, CacheReport, OnProgress

NUM_BATCHES = 64
"""Batches of a cache's prompts, and at least as many of its pieces, that actors share."""


class Stage(StrEnum):
    """Stage that the configuration trains."""

    STAGE1 = "stage1"
    STAGE2 = "stage2"


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions(RayOptions):
    """Options of the command."""

    config: Annotated[Path, typer.Option(help="YAML file of the training, or a shipped name.")]
    output_dir: Annotated[
        Path,
        typer.Option(help="Directory for prompts/, latents, probes/; name it as cache.directory."),
    ]
    stage: Annotated[Stage, typer.Option(help="Training that the file configures.")] = Stage.STAGE2
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Setting by its path; may be repeated."),
    ] = None
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Number of steps to cache the clips of; by default all."),
    ] = None
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Part I (from 1) of N to make; the parts may run at once, on any machines.",
        ),
    ] = "1/1"
    device: Annotated[str | None, typer.Option(help="Device: cpu, cuda, cuda:1, ...")] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the clips' headers, count, print and stop.")
    ] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")
    ] = False
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")] = False


@takes_options(CacheOptions)
def cache(options: CacheOptions) -> None:
    """Encode the prompts and clips that a training needs.

    Train with --set cache.directory=OUTPUT_DIR then: it reads latents instead of frames, and its
    text encoder leaves the device. With 'cache.latents=false' it encodes prompts only. It keeps
    only the windows of a clip that the steps need. After a stop, the same command keeps finished
    entries and makes the missing ones, and makes entries of changed clips anew.
    """
    with exit_codes(debug=options.debug), Interruption().catch():
        from swifti2v.shards import parse_shard
        from swifti2v.training.stages.cache_making import CacheMaking
        from swifti2v.training.stages.config import Stage1FineTuning, Stage2FineTuning

        shard, directory = parse_shard(options.shard), options.output_dir
        kind: type[Stage1FineTuning | Stage2FineTuning] = (
            Stage2FineTuning if options.stage == Stage.STAGE2 else Stage1FineTuning
        )
        config = resolve_settings(kind, options.config, options.set_)
        if directory.is_file():
            raise InputError(f"output dir {directory} is a file; name a directory")
        cluster, lines = find_cluster(options, options.shard, options.device), Throttle()
        device = choose_device("cpu" if cluster else options.device)
        making = CacheMaking(config, directory, device, shard)
        plan = making.plan(options.max_steps)
        account = {
            "directory": str(directory.resolve()),
            "prompts": len(plan.prompts),
            "pieces": len(plan.jobs),
            "entries": plan.num_entries,
            "latent_bytes": plan.num_bytes,
        }
        if not options.dry_run:
            try:

                def say(done: int, total: int) -> None:
                    lines.say(f"{done} of {total} prompts and pieces")

                if cluster is None:
                    report = making.run(plan, say)
                else:
                    report = _run_on(cluster, plan, (config, directory.resolve()), say)
                account |= asdict(report)
            except KeyboardInterrupt as error:
                error.add_note("finished entries are kept; run the same command again to continue")
                raise
    typer.echo(json.dumps(account) if options.as_json else _render(account))


def _run_on(
    cluster: "Cluster", plan: "CachePlan", arguments: tuple[Any, ...], say: "OnProgress"
) -> "CacheReport":
    """Make a plan with the actors of a cluster; every node has to see the directory."""
    from swifti2v.cluster import connect, make_with_actors
    from swifti2v.training.stages.cache_making import CacheActor, CacheReport

    whole, done = CacheReport(), 0
    batches = plan.split(NUM_BATCHES)
    with connect(cluster):
        for report in make_with_actors(CacheActor, (*arguments, cluster.device), batches, cluster):
            whole.add(report)
            done += 1
            say(done * sum(map(len, batches)) // len(batches), sum(map(len, batches)))
    return whole


def _render(account: dict[str, object]) -> str:
    lines = [
        str(account["directory"]),
        "{prompts} prompts, {entries} entries of {pieces} pieces of clips, {latent_bytes:,} bytes of "
        "latents".format(**account),
    ]
    if "prompts_made" in account:
        lines.append(
            "made {prompts_made} prompts and {entries_made} entries, kept {prompts_kept} and "
            "{entries_kept}; {unreadable} pieces could not be read".format(**account)
        )
    return "\n".join(lines)
