"""``swifti2v train``: a command for each part that can be trained."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
import yaml

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.options import takes_options
from swifti2v.cli.training_display import TrainingDisplay
from swifti2v.config import merge, parse_config, parse_override, read_config, to_dict
from swifti2v.errors import ConfigError, InputError, LoadingError
from swifti2v.jobs.devices import choose_device
from swifti2v.jobs.interruption import Interruption

if TYPE_CHECKING:
    from collections.abc import Callable

    from swifti2v.training.costs.plan import TrainingPlan
    from swifti2v.training.nano.config import NanoConfig

Config = TypeVar("Config")
NUM_RANKS = (1, 2, 4, 8, 16, 32, 64)
"""Memory is predicted for these where no launcher says how many there are."""

train_app = typer.Typer(no_args_is_help=True, help="Train a model.")


@train_app.callback()
def train() -> None:
    """Train a model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Options of all commands."""

    output_dir: Annotated[
        Path, typer.Option(help="Directory for config.yaml, metrics, checkpoints, weights.")
    ]
    config: Annotated[
        Path | None, typer.Option(help="YAML file, or a name from 'swifti2v configs list'.")
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Setting by its path; may be repeated."),
    ] = None
    device: Annotated[str | None, typer.Option(help="Device: cpu, cuda, cuda:1, ...")] = None
    resume: Annotated[bool, typer.Option("--resume", help="Continue in the output dir.")] = False
    allow_changed_data: Annotated[
        bool,
        typer.Option(
            "--allow-changed-data",
            help="Continue although the data differs from that of the start.",
        ),
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check settings and packages, print sizes and predicted memory, and stop.",
        ),
    ] = False
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions(RunOptions):
    """Options of a part."""

    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Number of steps in all after which to stop.")
    ] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NanoOptions(RunOptions):
    """Options of ``train nano``."""

    data: Annotated[
        Path | None,
        typer.Option(help="Folder of clips and photos (default procedural material)."),
    ] = None
    minutes: Annotated[float | None, typer.Option(help="Minutes of training, for all parts.")] = (
        None
    )
    steps: Annotated[int | None, typer.Option(help="Steps of each part, instead of minutes.")] = (
        None
    )


@train_app.command()
@takes_options(NanoOptions)
def nano(options: NanoOptions) -> None:
    """Train the nano model: text encoder, Stage I and Stage II, on clips and photos of a folder.

    Prints the model's directory. A stopped training keeps its finished parts; continue with
    --resume.
    """
    with exit_codes(debug=options.debug), Interruption().catch():
        settings = _resolve_nano(options)
        if options.data is not None and not options.data.is_dir():
            raise InputError(
                f"data folder {options.data} is not a folder; name one of clips and photos"
            )
        if options.dry_run:
            from swifti2v.training.nano.plan import plan_nano

            _print_plan(settings, lambda: plan_nano(settings), (1,))
            return
        from swifti2v.training.nano.training import train_nano

        with TrainingDisplay() as display:
            model_dir = train_nano(
                settings,
                options.output_dir,
                options.data,
                device=choose_device(options.device),
                resume=options.resume,
                allows_changed_data=options.allow_changed_data,
                on_step=display,
            )
        typer.echo(str(model_dir.resolve()))


@train_app.command()
@takes_options(TrainOptions)
def stage1(options: TrainOptions) -> None:
    """Train Stage I on clips of its size: a LoRA on the frozen base, or all weights.

    Prints the path of the result: lora.safetensors, or a transformer's directory.
    """
    _train("stage1", options)


@train_app.command()
@takes_options(TrainOptions)
def stage2(options: TrainOptions) -> None:
    """Train Stage II on segments of clips, with teacher forcing.

    Prints the transformer's directory.
    """
    _train("stage2", options)


@train_app.command()
@takes_options(TrainOptions)
def relay(options: TrainOptions) -> None:
    """Train Stage II for a larger size from images alone: two LoRAs; sampling uses the second.

    Prints the path of relay2.safetensors, or the output dir if it stopped earlier.
    """
    _train("relay", options)


@train_app.command()
@takes_options(TrainOptions)
def vae(options: TrainOptions) -> None:
    """Train a video VAE of Wan's kind on crops of clips. Prints its directory."""
    _train("vae", options)


@train_app.command()
@takes_options(TrainOptions)
def text(options: TrainOptions) -> None:
    """Train nano's text encoder to tell camera motions apart. Prints its directory."""
    _train("text", options)


def _train(name: str, options: TrainOptions) -> None:
    """Join the ranks, begin the directory and train; the first rank prints the result's path."""
    with exit_codes(debug=options.debug), Interruption().catch():
        from swifti2v.training.costs.requirements import require_packages
        from swifti2v.training.engine.ranks import join_ranks
        from swifti2v.training.engine.run_directory import (
            begin_run_directory,
            require_run_directory,
        )
        from swifti2v.training.engine.session import Session
        from swifti2v.training.engine.trackers import open_trackers
        from swifti2v.training.parts import PARTS

        part = PARTS[name]
        settings = resolve_settings(part.settings, options.config, options.set_)
        require_packages(settings)
        if options.dry_run:
            _print_plan(settings, lambda: part.plan(settings), _find_num_ranks())
            return
        device, directory = choose_device(options.device), options.output_dir
        run = settings.run
        with (
            join_ranks(device, run.num_replicas, run.timeout_minutes) as ranks,
            TrainingDisplay() as display,
        ):
            values = to_dict(settings)
            require_run_directory(directory, values, resume=options.resume)
            ranks.wait()
            if ranks.is_first:
                begin_run_directory(directory, values)
            session = Session(
                directory=directory,
                ranks=ranks,
                resume=options.resume,
                allows_changed_data=options.allow_changed_data,
                max_steps=options.max_steps,
                trackers=open_trackers(run.trackers, directory, values) if ranks.is_first else (),
                on_step=display.of(name),
            )
            written = part.train(settings, session)
            if ranks.is_first:
                typer.echo(str(written.resolve()))


def _print_plan(
    settings: Any, plan: "Callable[[], Sequence[TrainingPlan]]", num_ranks: Sequence[int]
) -> None:
    """Print the settings and, as comments, their costs; only the first process prints."""
    if os.environ.get("RANK", "0") != "0":
        return
    from swifti2v.cli.training_plan import to_comments
    from swifti2v.training.costs.requirements import find_missing_data
    from swifti2v.training.engine.run_directory import to_plain

    for path in find_missing_data(settings):
        typer.echo(f"note: manifest {path} is not there yet", err=True)

    try:
        comments = to_comments(plan(), num_ranks)
    except LoadingError as error:
        comments = (
            f"# Sizes and memory are not predicted, the model's config.json is needed: {error}"
        )
    typer.echo(yaml.safe_dump(to_plain(to_dict(settings)), sort_keys=False), nl=False)
    typer.echo(comments)


def _find_num_ranks() -> tuple[int, ...]:
    """Number of ranks that a launcher started, else typical numbers."""
    launched = os.environ.get("WORLD_SIZE")
    return NUM_RANKS if launched is None else (int(launched),)


def resolve_settings(
    kind: type[Config], path: Path | None, overrides: Sequence[str] | None
) -> Config:
    """Settings of a YAML file with ``--set`` on top.

    Raises:
        ConfigError: Naming the file or the override.
    """
    values = read_config(path) if path is not None else {}
    config = parse_config(kind, values, str(path))
    for override in overrides or []:
        values = merge(values, parse_override(override))
        config = parse_config(kind, values, f"--set {override}")
    return config


def _resolve_nano(options: NanoOptions) -> "NanoConfig":
    from swifti2v.training.nano.budget import limit_minutes, limit_steps
    from swifti2v.training.nano.config import NanoConfig

    minutes, steps = options.minutes, options.steps
    if minutes is not None and steps is not None:
        raise ConfigError(f"give --minutes or --steps, not both ({minutes:g} and {steps})")
    config = resolve_settings(NanoConfig, options.config, options.set_)
    if minutes is not None:
        return limit_minutes(config, minutes)
    return limit_steps(config, steps) if steps is not None else config
