"""``swifti2v compare``: a page for blind comparison of two sets of videos, and its tally."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.seeds import choose_seed, require_seed

BUILD = "build"


class _BuildByDefault(TyperGroup):
    """``compare A B`` means ``compare build A B``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = [BUILD, *args]
        return super().parse_args(ctx, args)


compare_app = typer.Typer(
    cls=_BuildByDefault,
    no_args_is_help=True,
    help="Let people compare two sets of videos, blind: compare A B -o DIR.",
)

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@compare_app.command(BUILD)
def build(
    first: Annotated[Path, typer.Argument(help="A video, or a folder of videos.")],
    second: Annotated[
        Path, typer.Argument(help="The same videos made in another way, with equal names.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="New folder for the page.")],
    seed: Annotated[
        int, typer.Option(help="Seed of the sides and of the order of pairs; -1 draws one.")
    ] = 0,
    debug: Debug = False,
) -> None:
    """Build a page that plays pairs of videos in step, and takes votes by keyboard.

    Names are shown only after the last vote. Each viewer exports a JSON file for 'compare tally'.
    """
    with exit_codes(debug=debug):
        from swifti2v.evaluation.side_by_side.page import build_page, require_new_folder
        from swifti2v.evaluation.side_by_side.pairs import find_pairs, name_sets

        require_seed(seed)
        require_new_folder(output)
        pairs = find_pairs(first, second)
        page = build_page(pairs, name_sets(first, second), choose_seed(seed), output)
        typer.echo(str(page.resolve()))
        typer.echo(f"{len(pairs)} pairs; open the page in a browser", err=True)


@compare_app.command()
def tally(
    results: Annotated[
        list[Path], typer.Argument(help="Files that viewers exported from the page.")
    ],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Add up the votes of all viewers."""
    with exit_codes(debug=debug):
        from dataclasses import asdict

        from swifti2v.evaluation.clips.summary import plain
        from swifti2v.evaluation.side_by_side.tally import tally as add_up
        from swifti2v.storage import encode_text

        votes = add_up(results)
        if as_json:
            typer.echo(encode_text(json.dumps(plain(asdict(votes)), ensure_ascii=False)))
            return
        for name, number in zip(votes.names, (votes.num_first, votes.num_second), strict=True):
            typer.echo(f"{name}: {number} votes")
        typer.echo(f"ties: {votes.num_ties}, not voted on: {votes.num_open}")
        typer.echo(f"viewers: {votes.num_viewers}")
        for about, share in (
            (f"votes for {votes.names[0]} without ties", votes.share_first),
            ("votes for the left side without ties", votes.share_left),
        ):
            if share.low is None or share.high is None:
                typer.echo(f"{about}: none")
            else:
                ends = f"{share.low:.1%} to {share.high:.1%}"
                typer.echo(f"{about}: {share.value:.1%} of {share.num_items}, 95 % interval {ends}")
