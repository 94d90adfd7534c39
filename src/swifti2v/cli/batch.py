"""``swifti2v batch``: a table of photos and prompts to a folder of videos."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swifti2v.cli.failures import ERROR, exit_codes
from swifti2v.cli.models_dir import ModelsDir, models_environment
from swifti2v.cli.options import Placement, RunDtype, read_layers

if TYPE_CHECKING:
    pass


def batch(
    manifest: Annotated[
        Path,
        typer.Argument(
            help="Table (.csv, .jsonl): a row has image and prompt, and where wanted id, seed and "
            "any setting by its name, such as num_frames."
        ),
    ],
    output_dir: Annotated[
        str,
        typer.Option(
            "-o", "--output-dir", help="Folder of the videos: a path, or a URL such as s3://A/B."
        ),
    ],
    config: Annotated[
        Path | None, typer.Option(help="YAML of settings for what rows leave open.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="A=B",
            help="Column or setting for what rows leave open, such as model=paper.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Clips to make in this run; the rest are left.")
    ] = None,
    models_dir: ModelsDir = None,
    device: Annotated[str | None, typer.Option(help="Device: cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[
        RunDtype | None, typer.Option(help="Number type of the weights, as in swifti2v generate.")
    ] = None,
    placement: Annotated[
        Placement | None, typer.Option(help="Placement of the weights, as in swifti2v generate.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="auto|GB", help="Device memory to use, as in swifti2v generate."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="local|auto|ADDRESS",
            help="Ray cluster to make the clips on; local starts one on this machine.",
        ),
    ] = None,
    cpus_per_actor: Annotated[
        int | None,
        typer.Option(min=1, help="Cores for each clip on a cluster without GPUs (default a GPU)."),
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="Further runs of a clip whose actor died.")
    ] = 3,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the rows, say what is left to make and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")] = False,
) -> None:
    """Make many clips; run it again to go on after a stop, finished ones are not made again."""
    del models_dir  # read from the environment
    with exit_codes(debug=debug):
        from swifti2v.batch.placing import predict_host_bytes
        from swifti2v.batch.rows import Machine, read_rows
        from swifti2v.cli.batch_run import run_batch
        from swifti2v.cluster import Cluster
        from swifti2v.config import merge

        defaults: dict[str, object] = {}
        for _, layer in read_layers(config, set_):
            defaults = merge(defaults, layer)
        rows = read_rows(manifest, defaults)
        machine = Machine(
            device=device,
            dtype=dtype.value if dtype else None,
            placement=placement.value if placement else None,
            memory=memory,
        )
        cluster = None
        if ray and not dry_run:
            cluster = Cluster(
                address=ray,
                cpus_per_actor=cpus_per_actor,
                max_attempts=retries + 1,
                host_bytes=predict_host_bytes(rows, machine, is_cpu=cpus_per_actor is not None),
                environment=models_environment(),
            )
        failed = run_batch(
            rows,
            output_dir,
            machine,
            cluster,
            limit=limit,
            dry_run=dry_run,
        )
        if failed:
            raise typer.Exit(ERROR)
