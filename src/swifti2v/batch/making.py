"""One clip of a batch, from a row to a record."""

import logging
import socket
from collections.abc import Callable
from dataclasses import replace

from swifti2v.batch.results import ClipRecord, ResultFolder, Workplace
from swifti2v.batch.rows import ClipRow, Machine
from swifti2v.config import to_dict
from swifti2v.errors import SwiftI2VError
from swifti2v.jobs.check import check
from swifti2v.jobs.devices import choose_device
from swifti2v.jobs.interruption import Interruption
from swifti2v.jobs.loaded_models import LoadedModels
from swifti2v.jobs.resolve import Resolved, resolve
from swifti2v.jobs.run import run
from swifti2v.jobs.settings import FileRecord
from swifti2v.jobs.work_dir import WorkDir
from swifti2v.pipelines.decoding import SegmentOutput
from swifti2v.planning.measurement import memory_bytes
from swifti2v.storage import hash_file

logger = logging.getLogger(__name__)

OnSegment = Callable[[ClipRow, int, int], None]
"""Called with a clip, how many of its segments are finished, and how many it has."""


class ClipMaker:
    """Makes clips one after the other and keeps their models loaded.

    Args:
        results: Where they go.
        machine: The way in which they are computed.
        on_segment: Called when a clip begins and when a segment is finished.
        interruption: See ``swifti2v.jobs.run.run``.
    """

    def __init__(
        self,
        results: ResultFolder,
        machine: Machine,
        on_segment: OnSegment,
        interruption: Interruption | None = None,
    ) -> None:
        self._results = results
        self._machine = machine
        self._on_segment = on_segment
        self._interruption = interruption
        self._models = LoadedModels(memory_bytes(choose_device(machine.device)) // 2)

    def make(self, row: ClipRow, attempts: int = 1) -> ClipRecord:
        """Make a clip, or go on with it; its record is kept.

        Args:
            row: The clip.
            attempts: Runs so far, this one included.

        Returns:
            The record, also of a failure that another run would meet again.
        """
        try:
            with self._results.workplace(row) as place:
                record = self._make(row, place)
        except (SwiftI2VError, OSError, MemoryError) as error:
            logger.debug("clip %s failed", row.id, exc_info=True)
            text = str(error) or type(error).__name__
            record = ClipRecord(id=row.id, status="failed", row=to_dict(row), error=text)
        record = replace(record, attempts=attempts, machine=socket.gethostname())
        self._results.save(record)
        return record

    def _make(self, row: ClipRow, place: Workplace) -> ClipRecord:
        request = row.to_request(place.video, self._machine, place.files)
        resolved = _with_work_dir(_with_given_names(resolve(request), row), place)
        job = check(resolved, self._models.get(resolved))
        num_segments = len(job.pipe.plan(job.settings.config))

        def on_segment(segment: SegmentOutput) -> None:
            place.keep()
            self._on_segment(row, segment.index + 1, num_segments)

        self._on_segment(row, 0, num_segments)
        report = run(job, on_segment=on_segment, interruption=self._interruption)
        sha256, num_bytes = hash_file(place.video), place.video.stat().st_size
        place.publish()
        inputs = (job.settings.image, *([job.settings.motion] if job.settings.motion else []))
        return ClipRecord(
            id=row.id,
            status="completed",
            row=to_dict(row),
            video=place.video.name,
            sha256=sha256,
            num_bytes=num_bytes,
            inputs_sha256=tuple(record.sha256 for record in inputs),
            seed=report.seed,
            width=report.width,
            height=report.height,
            num_frames=report.num_frames,
            fps=report.fps,
            seconds=report.seconds,
        )


def _with_given_names(resolved: Resolved, row: ClipRow) -> Resolved:
    """The request with settings that name files as the row does, not as copies on this machine."""
    settings = resolved.settings
    image = FileRecord(path=row.image, sha256=settings.image.sha256)
    motion = settings.motion
    if motion is not None and row.motion is not None:
        motion = FileRecord(path=row.motion, sha256=motion.sha256)
    return replace(resolved, settings=replace(settings, image=image, motion=motion))


def _with_work_dir(resolved: Resolved, place: Workplace) -> Resolved:
    """The request with its work dir; one that was begun with other settings is emptied."""
    work_dir = WorkDir(place.run, resume=True)
    work_dir.forget_other(resolved.settings.plan())
    return replace(resolved, work_dir=work_dir)
