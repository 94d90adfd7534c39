"""A batch in this process: one clip after the other."""

from collections.abc import Iterator, Sequence

from swifti2v.batch.making import ClipMaker, OnSegment
from swifti2v.batch.results import ClipRecord, ResultFolder
from swifti2v.batch.rows import ClipRow, Machine
from swifti2v.jobs.interruption import Interruption


def make_here(
    rows: Sequence[ClipRow],
    results: ResultFolder,
    machine: Machine,
    on_segment: OnSegment,
    interruption: Interruption,
) -> Iterator[ClipRecord]:
    """Make clips in this process; models stay loaded between them.

    Args:
        rows: The clips, in the order of their making.
        results: Where they go.
        machine: The way in which they are computed.
        on_segment: See ``ClipMaker``.
        interruption: See ``swifti2v.jobs.run.run``.

    Yields:
        A record as soon as a clip ends.
    """
    maker = ClipMaker(results, machine, on_segment, interruption)
    for row in rows:
        yield maker.make(row)
