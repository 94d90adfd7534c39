"""``swifti2v bench``: published tables, made again by one command."""

from pathlib import Path
from typing import Annotated

import typer

from swifti2v.cli.bench_speed import speed
from swifti2v.cli.failures import exit_codes
from swifti2v.errors import InputError
from swifti2v.jobs.interruption import Interruption

bench_app = typer.Typer(no_args_is_help=True, help="Make published tables again.")
bench_app.command()(speed)


@bench_app.callback()
def bench() -> None:
    """Make published tables again."""


@bench_app.command()
def quality(
    config: Annotated[
        Path, typer.Option(help="YAML file of the table, or a name such as tables/baselines.")
    ],
    data: Annotated[Path, typer.Option(help="Folder of clips and photos.")],
    output_dir: Annotated[
        Path, typer.Option(help="Directory for the rows of each run, and table.md.")
    ],
    shard: Annotated[str, typer.Option(help="Part I (from 1) of N of the runs, as I/N.")] = "1/1",
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")] = False,
) -> None:
    """Train and measure every run of a table of ablations; prints the table's path.

    Finished runs are kept: the same command continues. Shards may run at the same time in the same
    directory; the table holds the results of all of them.
    """
    with exit_codes(debug=debug), Interruption().catch():
        from swifti2v.config import parse_config, read_config
        from swifti2v.shards import parse_shard
        from swifti2v.training.ablations.runs import AblationConfig
        from swifti2v.training.ablations.table import make_ablation_table

        settings = parse_config(AblationConfig, read_config(config), str(config))

        def say(arm: str, seed: int) -> None:
            typer.echo(f"{arm}, seed {seed}: done", err=True)

        table = make_ablation_table(settings, output_dir, data, parse_shard(shard), say)
        typer.echo(str(table.resolve()))


@bench_app.command()
def training(
    output_dir: Annotated[Path, typer.Option(help="Directory for the runs and table.md.")],
    part: Annotated[
        str, typer.Option(help="Part to train: stage1, stage2, vae or text.")
    ] = "stage2",
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the training, or a shipped name.")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="A.B=1,2,4", help="Values of one setting; may be repeated."),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps of each run; the first two are not measured.")
    ] = 6,
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")] = False,
) -> None:
    """Train a few steps with every combination of settings; prints samples/s and peak memory."""
    with exit_codes(debug=debug), Interruption().catch():
        from swifti2v.training.costs.throughput import (
            measure_throughput,
            parse_choices,
            render_throughput,
        )

        if output_dir.exists() and (output_dir.is_file() or any(output_dir.iterdir())):
            raise InputError(f"output directory {output_dir} is not empty; choose another one")
        choices = dict(parse_choices(text) for text in vary or [])
        results = measure_throughput(
            part,
            config,
            choices,
            output_dir,
            steps,
            lambda result: typer.echo(
                f"{dict(result.settings)}: {result.samples_per_second:.2f} samples/s", err=True
            ),
        )
        table = render_throughput(results)
        (output_dir / "table.md").write_text(table, encoding="utf-8")
        typer.echo(table, nl=False)
