"""Count the votes of one or many people."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from swifti2v.config import parse_config, settings
from swifti2v.errors import InputError
from swifti2v.evaluation.intervals import Estimate, wilson_share
from swifti2v.evaluation.side_by_side.page import FORMAT

Choice = Literal["first", "second", "tie"]


@settings
class Vote:
    """Vote of one person on one pair."""

    pair: str
    """Name of the pair."""
    vote: Choice
    """Set that was better."""
    left: Literal["first", "second"]
    """Set that was on the left."""
    seconds: float
    """Seconds from first sight to the vote."""


@settings
class ViewerResult:
    """A file that the page exported."""

    format: int
    """Format of the file."""
    page: str
    """Identity of the page."""
    viewer: str
    """Random, the same for one browser and page."""
    names: tuple[str, str]
    """Names of the two sets."""
    num_pairs: int
    """Pairs on the page."""
    votes: tuple[Vote, ...]
    """One a pair; pairs may be left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """All votes."""

    names: tuple[str, str]
    """Names of the two sets."""
    num_viewers: int
    """Number of people."""
    num_first: int
    """Votes for the first set."""
    num_second: int
    """Votes for the second set."""
    num_ties: int
    """Votes for neither."""
    num_open: int
    """Pairs without a vote, summed over viewers."""
    share_first: Estimate
    """Share of the first set in the votes for either, with every vote counted as independent."""
    share_left: Estimate
    """Share of the left side in the votes for either: far from 0.5, people voted by side."""


def read_result(path: Path) -> ViewerResult:
    """Read one exported file.

    Raises:
        InputError: It cannot be read, is of another format, or votes twice on a pair.
        ConfigError: It has unknown or missing keys.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; check the path") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); export it from the page again") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(f"{path} is not a result of 'swifti2v compare' in format {FORMAT}")
    result = parse_config(ViewerResult, values, str(path))
    voted = [vote.pair for vote in result.votes]
    if twice := next((pair for pair in voted if voted.count(pair) > 1), None):
        raise InputError(f"{path} has two votes on {twice!r}; export it from the page again")
    if not voted:
        raise InputError(f"{path} has no votes")
    if len(voted) > result.num_pairs:
        raise InputError(
            f"{path} has {len(voted)} votes on {result.num_pairs} pairs; export it from the page again"
        )
    return result


def tally(paths: Sequence[Path]) -> Tally:
    """Add up results of the same two sets, from one page or from pages with other seeds.

    Raises:
        InputError: A file cannot be used, is of other sets, or one viewer's file is given twice.
    """
    results = [read_result(path) for path in paths]
    viewers: dict[str, Path] = {}
    for path, result in zip(paths, results, strict=True):
        if result.names != results[0].names:
            raise InputError(
                f"{path} compares {' and '.join(result.names)}, {paths[0]} "
                f"{' and '.join(results[0].names)}; tally one comparison at a time"
            )
        if (before := viewers.setdefault(f"{result.page} {result.viewer}", path)) != path:
            raise InputError(f"{before} and {path} are of one viewer; give the later one")
    if len(viewers) < len(results):
        raise InputError("a file is given twice; give every file once")
    votes = [vote for result in results for vote in result.votes]
    counts = {choice: sum(vote.vote == choice for vote in votes) for choice in _CHOICES}
    decided = [vote for vote in votes if vote.vote != "tie"]
    return Tally(
        names=results[0].names,
        num_viewers=len(results),
        num_first=counts["first"],
        num_second=counts["second"],
        num_ties=counts["tie"],
        num_open=sum(result.num_pairs - len(result.votes) for result in results),
        share_first=wilson_share(counts["first"], len(decided)),
        share_left=wilson_share(sum(vote.vote == vote.left for vote in decided), len(decided)),
    )


_CHOICES: tuple[Choice, ...] = ("first", "second", "tie")
