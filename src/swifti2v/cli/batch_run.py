"""The run of a batch: its display on stderr, its account on stdout."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from swifti2v.batch.making import ClipMaker
from swifti2v.batch.on_ray import make_on_ray
from swifti2v.batch.results import ClipRecord, ResultFolder
from swifti2v.batch.rows import ClipRow, Machine
from swifti2v.cluster import Cluster, connect
from swifti2v.jobs.interruption import Interruption


def run_batch(
    rows: Sequence[ClipRow],
    output: str,
    machine: Machine,
    cluster: Cluster | None,
    *,
    limit: int | None = None,
    dry_run: bool = False,
) -> bool:
    """Make the clips that are not finished, and write the manifest of results.

    Args:
        rows: The clips.
        output: See ``ResultFolder``.
        machine: The way in which they are computed.
        cluster: Actors to make them with; None makes them in this process.
        limit: Clips to make in this run.
        dry_run: Say what is to be done and stop.

    Returns:
        Whether a clip failed.

    Raises:
        SwiftI2VError: The batch cannot begin; nothing was made.
        KeyboardInterrupt: It was stopped; a note says what is finished.
    """
    interruption, results = Interruption(), ResultFolder(output)
    with interruption.catch(), nullcontext() if dry_run else results.open():
        records = {row.id: results.find(row) for row in rows}
        left = [row for row in rows if records[row.id] is None]
        typer.echo(f"{len(rows)} clips, {len(rows) - len(left)} are finished", err=True)
        if dry_run:
            return False
        try:
            with (
                BatchDisplay(left[:limit]) as display,
                connect(cluster) if cluster else nullcontext(),
            ):
                made = _make(left[:limit], results, machine, cluster, display, interruption)
                for record in made:
                    records[record.id] = record
                    display.on_record(record)
        except KeyboardInterrupt as error:
            error.add_note(
                f"{_count(records, 'completed')} of {len(rows)} clips are finished; run it again to go on"
            )
            raise
        finally:
            path = results.summarize([record for record in records.values() if record])
    num_failed = _count(records, "failed")
    typer.echo(path)
    typer.echo(f"{_count(records, 'completed')} of {len(rows)} clips finished, {num_failed} failed")
    return num_failed > 0


def _make(
    rows: Sequence[ClipRow],
    results: ResultFolder,
    machine: Machine,
    cluster: Cluster | None,
    display: "BatchDisplay",
    interruption: Interruption,
) -> Iterator[ClipRecord]:
    if cluster is None:
        maker = ClipMaker(results, machine, display.on_segment, interruption)
        return map(maker.make, rows)
    return make_on_ray(rows, results, machine, cluster, display.on_segment)


def _count(records: dict[str, ClipRecord | None], status: str) -> int:
    return sum(record is not None and record.status == status for record in records.values())


class BatchDisplay:
    """A bar for the batch and one for each clip that is being made; without a terminal, lines.

    Args:
        rows: Clips to make.
    """

    def __init__(self, rows: Sequence[ClipRow]) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bars = Bars(
            *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
        )
        self._all = self._bars.add_task("clips", total=len(rows))
        self._clips: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def on_segment(self, row: ClipRow, num_done: int, num_segments: int) -> None:
        """Show how far a clip is."""
        if row.id not in self._clips:
            self._clips[row.id] = self._bars.add_task(row.id, total=num_segments)
        self._bars.update(self._clips[row.id], completed=num_done)

    def on_record(self, record: ClipRecord) -> None:
        """Show that a clip has ended."""
        self._bars.advance(self._all)
        if record.id in self._clips:
            self._bars.remove_task(self._clips.pop(record.id))
        how = f"failed: {record.error}"
        if record.seconds is not None:
            how = f"{record.video}, {record.seconds['total']:.1f} s on {record.machine}"
        self._bars.console.print(f"{record.id}: {how}", markup=False, highlight=False)
