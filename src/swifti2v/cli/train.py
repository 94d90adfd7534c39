"""``swifti2v train``: a command for each part that can be trained."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
import yaml

from swifti2v.cli.failures import Interruption, exit_codes
from swifti2v.config import merge, parse_config, parse_override, read_yaml, to_dict
from swifti2v.errors import ConfigError, InputError

if TYPE_CHECKING:
    import torch

    from swifti2v.training.nano_config import NanoConfig
    from swifti2v.training.ranks import Ranks
    from swifti2v.training.run_config import RunConfig
    from swifti2v.training.trackers import Tracker
    from swifti2v.training.trainer import StepMetrics

REPORT_SECONDS = 10.0
"""Between two lines on stderr."""
Config = TypeVar("Config")

train_app = typer.Typer(no_args_is_help=True, help="Train a model.")

OutputDir = Annotated[Path, typer.Option(help="Gets config.yaml, metrics, checkpoints, weights.")]
ConfigPath = Annotated[Path | None, typer.Option(help="YAML file, such as those in configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="One setting by its path; may be repeated."),
]
MaxSteps = Annotated[int | None, typer.Option(help="Stop after so many steps in all.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue in the output dir.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check, print the settings and stop.")]
Debug = Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")]


@train_app.callback()
def train() -> None:
    """Train a model."""


@train_app.command()
def nano(
    output_dir: Annotated[Path, typer.Option(help="Gets model/, config.yaml and training/.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of clips and photos; procedural material if not given."),
    ] = None,
    config: ConfigPath = None,
    set_: Overrides = None,
    minutes: Annotated[float | None, typer.Option(help="Time for all parts together.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of each part instead.")] = None,
    device: Device = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train the nano model: text encoder, Stage I and Stage II, on clips and photos of a folder.

    Prints the model's directory. What is finished when it is stopped is kept; continue with
    --resume.
    """
    with exit_codes(debug=debug), Interruption().catch():
        settings = _resolve_nano(config, set_ or [], minutes, steps)
        if data is not None and not data.is_dir():
            raise InputError(
                f"data folder {data} does not exist; name a folder of clips and photos"
            )
        if dry_run:
            _print_settings(settings)
            return
        from swifti2v.training.nano import train_nano

        model_dir = train_nano(
            settings,
            output_dir,
            data,
            device=_find_device(device),
            resume=resume,
            on_step=StepReport(),
        )
        typer.echo(str(model_dir.resolve()))


@train_app.command()
def stage1(
    output_dir: OutputDir,
    config: ConfigPath = None,
    set_: Overrides = None,
    max_steps: MaxSteps = None,
    device: Device = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train Stage I on clips of its size: a LoRA on the frozen base, or all weights.

    Prints what was written: lora.safetensors, or a transformer's directory.
    """
    with exit_codes(debug=debug), Interruption().catch():
        from swifti2v.training.fine_tuning import Stage1FineTuning

        settings = _resolve(Stage1FineTuning, config, set_ or [])
        _fine_tune(
            "stage1", settings, output_dir, max_steps, device, resume=resume, dry_run=dry_run
        )


@train_app.command()
def stage2(
    output_dir: OutputDir,
    config: ConfigPath = None,
    set_: Overrides = None,
    max_steps: MaxSteps = None,
    device: Device = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train Stage II on segments of clips, with teacher forcing.

    Prints the transformer's directory.
    """
    with exit_codes(debug=debug), Interruption().catch():
        from swifti2v.training.fine_tuning import Stage2FineTuning

        settings = _resolve(Stage2FineTuning, config, set_ or [])
        _fine_tune(
            "stage2", settings, output_dir, max_steps, device, resume=resume, dry_run=dry_run
        )


@train_app.command()
def vae(
    output_dir: OutputDir,
    config: ConfigPath = None,
    set_: Overrides = None,
    max_steps: MaxSteps = None,
    device: Device = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train a video VAE of Wan's kind on crops of clips. Prints its directory."""
    with exit_codes(debug=debug), Interruption().catch():
        from swifti2v.training.vae_training import VaeTrainingConfig, train_vae

        settings = _resolve(VaeTrainingConfig, config, set_ or [])

        def run(ranks: "Ranks", trackers: "list[Tracker]") -> Path:
            return train_vae(
                settings,
                output_dir,
                ranks,
                resume=resume,
                max_steps=max_steps,
                trackers=trackers,
                on_step=StepReport().of("vae"),
            )

        _launch(settings, settings.run, output_dir, device, run, resume=resume, dry_run=dry_run)


@train_app.command()
def text(
    output_dir: OutputDir,
    config: ConfigPath = None,
    set_: Overrides = None,
    max_steps: MaxSteps = None,
    device: Device = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train nano's text encoder to tell camera motions apart. Prints its directory."""
    with exit_codes(debug=debug), Interruption().catch():
        from swifti2v.training.nano_config import TextEncoderConfig
        from swifti2v.training.text_encoder import train_text_encoder

        settings = _resolve(TextEncoderConfig, config, set_ or [])

        def run(ranks: "Ranks", trackers: "list[Tracker]") -> Path:
            return train_text_encoder(
                settings,
                output_dir,
                ranks,
                resume=resume,
                max_steps=max_steps,
                trackers=trackers,
                on_step=StepReport().of("text"),
            )

        _launch(settings, settings.run, output_dir, device, run, resume=resume, dry_run=dry_run)


class StepReport:
    """A line on stderr every few seconds."""

    def __init__(self) -> None:
        self._last_part = ""
        self._said_at = 0.0

    def __call__(self, part: str, metrics: "StepMetrics") -> None:
        """Tell of a step, unless it is too soon after the last line of the same part."""
        now = time.monotonic()
        if part == self._last_part and now - self._said_at < REPORT_SECONDS:
            return
        self._last_part, self._said_at = part, now
        memory = (
            f", {metrics.peak_device_bytes / 2**30:.1f} GiB" if metrics.peak_device_bytes else ""
        )
        typer.echo(
            f"{part}: step {metrics.step}, {metrics.seconds:.0f} s, loss {metrics.loss:.4f}, "
            f"learning rate {metrics.lr:.1e}, {metrics.samples_per_second:.2f} samples/s{memory}",
            err=True,
        )

    def of(self, part: str) -> "Callable[[StepMetrics], None]":
        """The report of one part."""
        return lambda metrics: self(part, metrics)


def _fine_tune(
    part: str,
    settings: Any,
    output_dir: Path,
    max_steps: int | None,
    device: str | None,
    *,
    resume: bool,
    dry_run: bool,
) -> None:
    def run(ranks: "Ranks", trackers: "list[Tracker]") -> Path:
        from swifti2v.training.fine_tuning import FineTuning

        return FineTuning(settings, output_dir, ranks).run(
            resume=resume, max_steps=max_steps, trackers=trackers, on_step=StepReport().of(part)
        )

    _launch(settings, settings.run, output_dir, device, run, resume=resume, dry_run=dry_run)


def _launch(
    settings: Any,
    run_config: "RunConfig",
    output_dir: Path,
    device: str | None,
    run: "Callable[[Ranks, list[Tracker]], Path]",
    *,
    resume: bool,
    dry_run: bool,
) -> None:
    """Join the ranks, begin the directory and train; the first rank prints what was written."""
    if dry_run:
        _print_settings(settings)
        return
    from swifti2v.training.ranks import join_ranks
    from swifti2v.training.run_directory import begin_run_directory, require_run_directory
    from swifti2v.training.trackers import open_trackers

    with join_ranks(_find_device(device), run_config.num_replicas) as ranks:
        values = to_dict(settings)
        require_run_directory(output_dir, values, resume=resume)
        ranks.wait()
        trackers = []
        if ranks.is_first:
            begin_run_directory(output_dir, values)
            trackers = open_trackers(run_config.trackers, output_dir, values)
        written = run(ranks, trackers)
        if ranks.is_first:
            typer.echo(str(written.resolve()))


def _print_settings(settings: Any) -> None:
    from swifti2v.training.run_directory import to_plain

    typer.echo(yaml.safe_dump(to_plain(to_dict(settings)), sort_keys=False), nl=False)


def _find_device(name: str | None) -> "torch.device":
    import torch

    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown; use cpu, cuda or cuda:N") from None


def _resolve(kind: type[Config], path: Path | None, overrides: list[str]) -> Config:
    values = read_yaml(path) if path is not None else {}
    config = parse_config(kind, values, str(path))
    for text in overrides:
        values = merge(values, parse_override(text))
        config = parse_config(kind, values, f"--set {text}")
    return config


def _resolve_nano(
    path: Path | None, overrides: list[str], minutes: float | None, steps: int | None
) -> "NanoConfig":
    from swifti2v.training.nano import limit_minutes, limit_steps
    from swifti2v.training.nano_config import NanoConfig

    if minutes is not None and steps is not None:
        raise ConfigError(f"give --minutes or --steps, not both ({minutes:g} and {steps})")
    config = _resolve(NanoConfig, path, overrides)
    if minutes is not None:
        return limit_minutes(config, minutes)
    return limit_steps(config, steps) if steps is not None else config
