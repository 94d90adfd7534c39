"""A batch on a Ray cluster: an actor for each GPU, or for some cores, makes one clip at a time.

An actor that dies, alone or with its node, loses no finished segment: its clip goes to the head of
the queue, and another actor continues it from the results' folder. Frames never travel through Ray.

Source:
    Ray 2.60, https://docs.ray.io/en/latest/ray-core/fault_tolerance/actors.html; ``ActorPool`` has
    no replacement of dead actors, so the loop over ``ray.wait`` is here.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from swifti2v.batch.making import ClipMaker, OnSegment
from swifti2v.batch.results import ClipRecord, ResultFolder
from swifti2v.batch.rows import ClipRow, Machine
from swifti2v.cluster import Cluster, count_places
from swifti2v.config import to_dict
from swifti2v.errors import InputError

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at the progress of the actors."""


def make_on_ray(
    rows: Sequence[ClipRow],
    results: ResultFolder,
    machine: Machine,
    cluster: Cluster,
    on_segment: OnSegment,
) -> Iterator[ClipRecord]:
    """Make clips on the cluster that ``connect`` joined.

    Args:
        rows: The clips, in the order of their start.
        results: Where they go; every node has to see it.
        machine: The way in which they are computed.
        cluster: The actors.
        on_segment: See ``ClipMaker``.

    Yields:
        A record as soon as a clip ends.

    Raises:
        InputError: A node does not see the results' folder.
    """
    yield from _Crew(rows, results, machine, cluster, on_segment).work()


class ClipActor:
    """The process that makes clips on a node.

    Args:
        url: See ``ResultFolder``.
        machine: The way in which clips are computed.
    """

    def __init__(self, url: str, machine: Machine) -> None:
        self._results = ResultFolder(url)
        self._maker = ClipMaker(self._results, machine, self._note)
        self._progress = ("", 0, 0)

    def is_ready(self) -> bool:
        """Whether it sees the results' folder."""
        return self._results.is_visible()

    def make(self, row: ClipRow, attempts: int) -> ClipRecord:
        """Make a clip, see ``ClipMaker.make``."""
        return self._maker.make(row, attempts)

    def progress(self) -> tuple[str, int, int]:
        """Id of the clip, its finished segments, and how many it has."""
        return self._progress

    def _note(self, row: ClipRow, num_done: int, num_segments: int) -> None:
        self._progress = (row.id, num_done, num_segments)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """A clip that an actor makes, or (without a row) an actor that is starting."""

    actor: Any
    row: ClipRow | None = None


class _Crew:
    """Actors, the clips they make and those that wait."""

    def __init__(
        self,
        rows: Sequence[ClipRow],
        results: ResultFolder,
        machine: Machine,
        cluster: Cluster,
        on_segment: OnSegment,
    ) -> None:
        ray: Any = import_module("ray")  # its types know nothing of actors
        self._ray = ray
        self._rows = {row.id: row for row in rows}
        self._waiting = deque(rows)
        self._attempts = dict.fromkeys(self._rows, 0)
        self._running: dict[Any, _Run] = {}
        self._results = results
        self._cluster = cluster
        self._on_segment = on_segment
        self._machine = machine
        self._kind: Any = ray.remote(ClipActor).options(
            **cluster.resources,
            # A second thread answers for the progress. Restarts are ours: a clip must not go back to
            # a machine that is gone.
            max_concurrency=2,
            max_restarts=0,
            max_task_retries=0,
        )

    def work(self) -> Iterator[ClipRecord]:
        try:
            while self._waiting or any(run.row for run in self._running.values()):
                self._hire()
                yield from self._take_finished()
                self._show_progress()
        finally:
            for run in self._running.values():
                self._ray.kill(run.actor)

    def _hire(self) -> None:
        """Start actors while there are clips that wait and places for them."""
        num_places = count_places(self._ray.nodes(), self._cluster.demands)
        num_starting = sum(run.row is None for run in self._running.values())
        num_wanted = min(num_places - len(self._running), len(self._waiting) - num_starting)
        for _ in range(num_wanted):
            actor = self._kind.remote(self._results.url, self._machine)
            self._running[actor.is_ready.remote()] = _Run(actor=actor)

    def _take_finished(self) -> Iterator[ClipRecord]:
        if not self._running:  # all nodes are gone; others may come
            logger.warning("no node of the cluster has room for an actor")
            time.sleep(LOOK_SECONDS)
            return
        done, _ = self._ray.wait(list(self._running), timeout=LOOK_SECONDS)
        for reference in done:
            run = self._running.pop(reference)
            try:
                answer = self._ray.get(reference)
            except self._ray.exceptions.RayActorError as error:
                yield from self._replace(run, error)
                continue
            if run.row is None and not answer:
                raise InputError(
                    f"a node of the cluster does not see {self._results.url}; give a folder that all "
                    "nodes share, or a URL such as s3://bucket/folder"
                )
            if run.row is not None:
                yield answer
            self._give_next(run.actor)

    def _give_next(self, actor: Any) -> None:
        if not self._waiting:
            self._ray.kill(actor)
            return
        row = self._waiting.popleft()
        self._attempts[row.id] += 1
        reference = actor.make.remote(row, self._attempts[row.id])
        self._running[reference] = _Run(actor=actor, row=row)

    def _replace(self, run: _Run, error: BaseException) -> Iterator[ClipRecord]:
        """Put the clip of an actor that died back, or give it up after too many runs."""
        self._ray.kill(run.actor)  # one that may come back must not
        row = run.row
        if row is None:
            return
        attempts = self._attempts[row.id]
        logger.warning(
            "clip %s: its actor died in run %d (%s)", row.id, attempts, _first_line(error)
        )
        if attempts < self._cluster.max_attempts:
            self._waiting.appendleft(row)
            return
        record = ClipRecord(
            id=row.id,
            status="failed",
            row=to_dict(row),
            attempts=attempts,
            error=f"its actors died {attempts} times, last: {_first_line(error)}",
        )
        self._results.save(record)
        yield record

    def _show_progress(self) -> None:
        busy = [run.actor for run in self._running.values() if run.row]
        if not busy:
            return
        asked = [actor.progress.remote() for actor in busy]
        answers, _ = self._ray.wait(asked, num_returns=len(busy), timeout=LOOK_SECONDS)
        for answer in answers:
            try:
                id_, num_done, num_segments = self._ray.get(answer)
            except self._ray.exceptions.RayActorError:
                continue  # its clip is put back when its run is looked at
            if id_:
                self._on_segment(self._rows[id_], num_done, num_segments)


def _first_line(error: BaseException) -> str:
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
