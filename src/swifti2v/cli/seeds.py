"""Seeds that a command line names."""

import typer

from swifti2v.jobs.request import RANDOM, draw_seed


def choose_seed(asked: int) -> int:
    """The seed that is asked for, or one drawn for ``RANDOM`` and said on stderr, to be repeated.

    Raises:
        typer.BadParameter: See ``require_seed``.
    """
    require_seed(asked)
    if asked != RANDOM:
        return asked
    seed = draw_seed()
    typer.echo(f"seed: {seed} (drawn; repeat or continue with --seed {seed})", err=True)
    return seed


def require_seed(asked: int | None) -> None:
    """Refuse a negative seed that does not mean a random one.

    Raises:
        typer.BadParameter: As said.
    """
    if asked is not None and asked < RANDOM:
        raise typer.BadParameter(
            f"{asked} is below 0; give 0 or more, or {RANDOM} for a random one", param_hint="--seed"
        )
