"""Progress and previews of a running job, and the places where it may be stopped."""

import threading

from swifti2v.errors import CancelledError
from swifti2v.jobs.work_dir import WorkDir
from swifti2v.pipelines.decoding import SegmentOutput
from swifti2v.pipelines.progress import Progress, Stopwatch
from swifti2v.pipelines.transition import MotionReference
from swifti2v.serving.clip_order import JobFolder
from swifti2v.serving.job import Job
from swifti2v.serving.job_store import JobStore
from swifti2v.serving.previews import save_frame, save_sheet


class ParkedError(CancelledError):
    """The worker is to end; the job goes on later."""


class Watcher:
    """Notes how far a job is, and stops it between two model calls.

    Args:
        store: Where it is noted; a job that was cancelled or deleted cannot be noted any more.
        job: As it was claimed.
        folder: Where previews go.
        stop: Set when the worker is to end.
    """

    def __init__(self, store: JobStore, job: Job, folder: JobFolder, stop: threading.Event) -> None:
        self._store = store
        self._job = job
        self._folder = folder
        self._stop = stop
        self.stopwatch = Stopwatch()
        self._stage1_steps = job.stage1_steps  # unless Stage I tells that it is still at work
        self._stage2_steps = 0

    def on_progress(self, progress: Progress) -> None:
        """Note a model call; see ``advance``."""
        if progress.stage == "stage1":
            self._stage1_steps = progress.step
        else:
            self._stage2_steps = progress.segment * self._job.segment_steps + progress.step
        self.advance(progress.stage, steps_done=self._stage1_steps + self._stage2_steps)

    def on_segment(self, segment: SegmentOutput) -> None:
        """Save a preview of a segment and note it; see ``advance``."""
        frame = segment.frames[-1 if segment.index else 0]
        save_frame(frame, self._folder.segment_preview(segment.index))
        num_done = segment.index + 1
        self._stage2_steps = num_done * self._job.segment_steps
        steps_done = self._stage1_steps + self._stage2_steps
        self.advance("stage2", steps_done=steps_done, segments_done=num_done)

    def advance(self, stage: str, *, steps_done: int = 0, segments_done: int = 0) -> None:
        """Note a state.

        Raises:
            CancelledError: The job was cancelled or deleted, or the worker is to end.
        """
        is_wanted = self._store.advance(
            self._job.id,
            stage=stage,
            steps_done=steps_done,
            segments_done=segments_done,
            stage_seconds=self.stopwatch.seconds,
        )
        if not is_wanted:
            raise CancelledError("it was cancelled")
        if self._stop.is_set():
            raise ParkedError("the worker is to end")


class PreviewingWorkDir(WorkDir):
    """The work dir of a job, which shows Stage I's clip as soon as it is kept.

    Args:
        folder: Of the job.
    """

    def __init__(self, folder: JobFolder) -> None:
        super().__init__(folder.work, resume=True)
        self._preview = folder.stage1_preview

    def save_motion_reference(self, motion: MotionReference) -> None:
        """Keep what Stage I made, and save its preview."""
        super().save_motion_reference(motion)
        save_sheet(motion.frames, self._preview)
