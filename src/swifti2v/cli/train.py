"""``swifti2v train``: training of models; so far the one that ships with the package."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from swifti2v.cli.failures import Interruption, exit_codes
from swifti2v.config import merge, parse_config, parse_override, read_yaml, to_dict
from swifti2v.errors import ConfigError, InputError

if TYPE_CHECKING:
    from swifti2v.training.nano_config import NanoConfig
    from swifti2v.training.optimization import StepMetrics

REPORT_SECONDS = 10.0
"""Between two lines on stderr."""

train_app = typer.Typer(no_args_is_help=True, help="Train a model.")


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
    config: Annotated[Path | None, typer.Option(help="YAML file, such as configs/nano.yaml.")] = (
        None
    ),
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="A.B=C", help="One setting by its path. May be given more than once."
        ),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Time for all parts together.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of each part instead.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue in the output dir.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, print the settings and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")] = False,
) -> None:
    """Train the nano model: text encoder, Stage I and Stage II, on clips and photos of a folder.

    Prints the model's directory. What is finished when it is stopped is kept; continue with
    --resume.
    """
    with exit_codes(debug=debug), Interruption().catch():
        settings = _resolve(config, set_ or [], minutes, steps)
        if data is not None and not data.is_dir():
            raise InputError(
                f"data folder {data} does not exist; name a folder of clips and photos"
            )
        if dry_run:
            typer.echo(yaml.safe_dump(to_dict(settings), sort_keys=False), nl=False)
            return
        import torch

        from swifti2v.training.nano import train_nano

        try:
            place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError:
            raise InputError(f"device {device!r} is unknown; use cpu, cuda or cuda:N") from None
        model_dir = train_nano(
            settings, output_dir, data, device=place, resume=resume, on_step=StepReport()
        )
        typer.echo(str(model_dir.resolve()))


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
        typer.echo(
            f"{part}: step {metrics.step}, {metrics.seconds:.0f} s, loss {metrics.loss:.4f}, "
            f"learning rate {metrics.learning_rate:.1e}",
            err=True,
        )


def _resolve(
    path: Path | None, overrides: list[str], minutes: float | None, steps: int | None
) -> "NanoConfig":
    from swifti2v.training.nano import limit_minutes, limit_steps
    from swifti2v.training.nano_config import NanoConfig

    if minutes is not None and steps is not None:
        raise ConfigError(f"give --minutes or --steps, not both ({minutes:g} and {steps})")
    values = read_yaml(path) if path is not None else {}
    config = parse_config(NanoConfig, values, str(path))
    for text in overrides:
        values = merge(values, parse_override(text))
        config = parse_config(NanoConfig, values, f"--set {text}")
    if minutes is not None:
        return limit_minutes(config, minutes)
    return limit_steps(config, steps) if steps is not None else config
