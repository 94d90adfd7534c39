"""Parts of a running server that its routes share, and jobs as clients see them."""

import asyncio
import json
import logging
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field

from swifti2v.serving.data_dir import DataDir, find_storage_fault
from swifti2v.serving.failures import ApiError
from swifti2v.serving.job import Job
from swifti2v.serving.job_store import JobStore
from swifti2v.serving.keys import Keys
from swifti2v.serving.processes import Checker, WorkerProcess
from swifti2v.serving.schemas import Video, VideoError
from swifti2v.serving.settings import ServerSettings

logger = logging.getLogger("swifti2v.serving")

TICK_SECONDS = 0.1
"""Between two looks at a job that someone waits for."""
CLEANING_SECONDS = 30.0


@dataclass(kw_only=True)
class Service:
    """The parts of a running server."""

    settings: ServerSettings
    data_dir: DataDir
    store: JobStore
    keys: Keys
    checker: Checker
    worker: WorkerProcess
    is_stopping: Callable[[], bool] = field(default=lambda: False)
    """Whether the server is about to end; streams end then."""
    is_ready: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once requests can be checked; until then the server listens and lets them wait."""

    def find(self, id: str, owner: str, *, param: str | None = None) -> Job:
        """A job of an owner.

        Args:
            id: Of the job.
            owner: Others do not find it.
            param: Field that names it, for the error.

        Raises:
            ApiError: The id is unknown.
        """
        job = self.store.find(id, owner)
        if job is None:
            raise ApiError(404, "not_found", "there is no such video", param=param)
        return job

    def forget(self, id: str) -> None:
        """Delete a job and its files; a worker that is at it stops, and clears up what it wrote."""
        job = self.store.find(id)
        if job is not None and job.has_ended:
            self.data_dir.clear_job(id)  # first, as the database cannot change on a full disk
        self.store.delete(id)
        self.data_dir.clear_job(id)

    async def forget_expired(self) -> None:
        """Delete jobs that have been kept long enough, again and again."""
        while True:
            try:
                for id in self.store.expired(self.settings.limits.keep_seconds):
                    await asyncio.to_thread(self.forget, id)
            except sqlite3.OperationalError as error:
                if (fault := find_storage_fault(error)) is None:
                    raise
                logger.warning("expired jobs cannot be forgotten: %s", fault)
            await asyncio.sleep(CLEANING_SECONDS)

    def show(self, job: Job) -> Video:
        """A job as a client sees it."""
        is_queued = job.status == "queued"
        ended = round(job.ended_at) if job.ended_at is not None else None
        error = None
        if job.status == "failed":
            error = VideoError(code=job.error_code or "", message=job.error_message or "")
        return Video(
            id=job.id,
            status=job.status,
            progress=self._progress(job),
            created_at=round(job.created_at),
            completed_at=ended if job.status == "completed" else None,
            expires_at=ended and ended + self.settings.limits.keep_seconds,
            error=error,
            model=job.model,
            prompt=job.prompt,
            seconds=job.seconds,
            size=f"{job.width}x{job.height}",
            num_frames=job.num_frames,
            fps=job.fps,
            seed=job.seed,
            stage=job.stage if job.status == "in_progress" else None,
            segments_done=job.segments_done,
            segments_total=job.segments_total,
            stage_seconds=json.loads(job.stage_seconds),
            peak_memory_bytes=job.peak_memory_bytes,
            queue_position=self.store.queue_position(job) if is_queued else None,
            eta_seconds=self._eta_seconds(job),
            notes=json.loads(job.notes),
            polling_url=f"/v1/videos/{job.id}",
        )

    @staticmethod
    def _progress(job: Job) -> int:
        if job.status == "completed":
            return 100
        return min(99, 100 * job.steps_done // max(1, job.steps_total))

    def predict_seconds(self, model: str, work: float) -> float | None:
        """Seconds that a job takes, from the speed of earlier ones; None before the first."""
        rate = self.store.seconds_per_work(model)
        return None if rate is None else rate * work

    def _eta_seconds(self, job: Job) -> float | None:
        if job.has_ended:
            return None
        total = 0.0
        for each in [*self.store.unfinished_before(job.number), job]:
            seconds = self.predict_seconds(each.model, each.work)
            if seconds is None:
                return None
            total += seconds * (1 - each.steps_done / max(1, each.steps_total))
        return round(total, 1)
