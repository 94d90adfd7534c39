"""The process that makes the videos: ``python -m swifti2v.serving.worker SETTINGS``.

It takes one job after the other and keeps the models loaded between them. It may die at any moment: the
next worker continues the job from its finished segments. It stops between two model calls when the job
is cancelled or deleted; and, with the job put back at the head of the queue, when its stdin ends, which
is also how it learns that the server died.
"""

import fcntl
import logging
import os
import shutil
import signal
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from swifti2v.errors import (
    CancelledError,
    InputError,
    LoadingError,
    NumericalError,
    SwiftI2VError,
)
from swifti2v.jobs.check import check
from swifti2v.jobs.devices import choose_device
from swifti2v.jobs.loaded_models import LoadedModels
from swifti2v.jobs.report import RunReport
from swifti2v.jobs.resolve import Resolved, resolve
from swifti2v.jobs.run import run
from swifti2v.jobs.settings import FileRecord
from swifti2v.planning.measurement import memory_bytes
from swifti2v.serving.clip_order import JobFolder
from swifti2v.serving.data_dir import DataDir, find_storage_fault
from swifti2v.serving.job import Job
from swifti2v.serving.job_store import JobStore
from swifti2v.serving.settings import ServerSettings
from swifti2v.serving.watching import ParkedError, PreviewingWorkDir, Watcher

logger = logging.getLogger("swifti2v.serving.worker")

IDLE_SECONDS = 0.05
"""Between two looks at an empty queue."""
FULL_DISK_SECONDS = 5.0
"""Between two tries to write to the database."""
CODES = (
    (NumericalError, "numerical_error"),
    (LoadingError, "loading_failed"),
    (InputError, "invalid_input"),
    (SwiftI2VError, "generation_failed"),
    (MemoryError, "out_of_memory"),
    (OSError, "storage_failed"),
)
"""``error.code`` of a failed job, the first that fits."""


def main() -> None:
    """Work until stdin ends or SIGTERM comes."""
    logging.basicConfig(format="%(asctime)s worker: %(message)s")
    logging.getLogger("swifti2v.serving").setLevel(logging.INFO)
    logging.getLogger("swifti2v.progress").setLevel(logging.INFO)
    server = ServerSettings.from_json(sys.argv[1])
    stop = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server says when to end
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    threading.Thread(target=_stop_at_end_of_stdin, args=(stop,), daemon=True).start()
    data_dir = DataDir(server.data_dir)
    with _only_worker(data_dir.worker_lock, stop):
        if not stop.is_set():
            Worker(server, data_dir, stop).work()


def _stop_at_end_of_stdin(stop: threading.Event) -> None:
    sys.stdin.read()
    stop.set()


@contextmanager
def _only_worker(path: Path, stop: threading.Event) -> Iterator[None]:
    """Wait until a worker whose server died has ended: a job is made by one at a time."""
    with path.open("a") as file:
        while not stop.is_set():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                stop.wait(IDLE_SECONDS)
        yield


class Worker:
    """Makes the jobs of a data directory.

    Args:
        server: Settings of the server.
        data_dir: Where the jobs are.
        stop: Set when it is to end.
    """

    def __init__(self, server: ServerSettings, data_dir: DataDir, stop: threading.Event) -> None:
        self._server = server
        self._data_dir = data_dir
        self._stop = stop
        self._store = JobStore(data_dir.database, survives_power_cut=False)
        budget = server.memory_bytes or memory_bytes(choose_device(server.device)) // 2
        self._models = LoadedModels(budget)

    def work(self) -> None:
        """Take jobs until it is to end; while the disk takes no more, wait."""
        while not self._stop.is_set():
            try:
                self._store.requeue_interrupted()
                self._take_jobs()
            except sqlite3.OperationalError as error:
                if (fault := find_storage_fault(error)) is None:
                    raise
                logger.warning("jobs wait, as nothing can be stored: %s", fault)
                self._stop.wait(FULL_DISK_SECONDS)
        self._store.close()

    def _take_jobs(self) -> None:
        self._tell("idle")
        while not self._stop.is_set():
            job = self._store.claim()
            if job is None:
                self._stop.wait(IDLE_SECONDS)
                continue
            self._tell("working", job.id)
            logger.info("%s begins, run %d", job.id, job.runs)
            self._do(job)
            self._tell("idle")

    def _tell(self, state: str, job: str | None = None) -> None:
        names = {model: name for name, model in self._server.model_names.items()}
        models = [names[model] for model in self._models.names]
        self._store.tell_worker_state(state=state, job=job, pid=os.getpid(), models=models)

    def _do(self, job: Job) -> None:
        """Make a job, and note how it ended."""
        folder = self._data_dir.job(job.id)
        try:
            report = self._make(job, folder)
        except ParkedError:
            self._store.park(job.id)
            logger.info("%s is parked", job.id)
        except CancelledError:
            logger.info("%s is cancelled", job.id)
        except (SwiftI2VError, OSError, MemoryError) as error:
            self._note_failure(job, folder, error)
        except Exception as error:
            if find_storage_fault(error) is None:
                self._store.fail(job.id, "internal_error", "the worker failed; its log says why")
            raise  # a new process knows nothing of what went wrong in this one
        else:
            peak = report.peak_device_bytes or report.peak_rss_bytes
            self._store.complete(job.id, report.seconds, peak)
            logger.info("%s is completed in %.1f s", job.id, report.seconds["total"])
        finally:
            self._tidy(job, folder)

    def _note_failure(self, job: Job, folder: JobFolder, error: BaseException) -> None:
        is_out_of_memory = isinstance(error.__cause__, torch.OutOfMemoryError)
        code = next(code for kind, code in CODES if isinstance(error, kind))
        text = str(error)
        if (fault := find_storage_fault(error.__cause__ or error)) is not None:
            code, text = "storage_failed", f"the server cannot store the video: {fault}"
        for path in (folder.path, self._server.lora_dir):
            text = text.replace(f"{path}/", "")
        if self._store.fail(job.id, "out_of_memory" if is_out_of_memory else code, text):
            logger.warning("%s failed: %s", job.id, text)
        if is_out_of_memory:
            raise SystemExit("the device's memory is given back by a new process") from error

    def _tidy(self, job: Job, folder: JobFolder) -> None:
        """Remove what a job that has ended needs no more; of a deleted one, everything."""
        now = self._store.find(job.id)
        if now is None:
            shutil.rmtree(folder.path, ignore_errors=True)
        elif now.has_ended:
            shutil.rmtree(folder.work, ignore_errors=True)

    def _make(self, job: Job, folder: JobFolder) -> RunReport:
        resolved = resolve(job.order.to_request(folder, self._server))
        pipe = self._models.get(resolved)
        resolved = _with_work_dir(_with_public_names(resolved, job), folder)
        checked = check(resolved, pipe)
        # The video is written under two names. When it is complete, the one with an index takes
        # the place of the first; readers of the stream keep the fragments.
        folder.stream.touch()
        folder.video.unlink(missing_ok=True)
        folder.video.hardlink_to(folder.stream)
        watcher = Watcher(self._store, job, folder, self._stop)
        watcher.advance("loading")
        return run(checked, watcher.on_progress, watcher.on_segment, stopwatch=watcher.stopwatch)


def _with_public_names(resolved: Resolved, job: Job) -> Resolved:
    """The request with settings that name uploads, model and LoRAs as the client does.

    They are stored in the video, so that ``--like`` knows the photo again, and tell nobody where the
    server keeps its files.
    """
    loras = [replace(lora, path=Path(lora.path).stem) for lora in resolved.settings.loras]
    motion = FileRecord(path="motion_reference", sha256=job.motion_sha256 or "")
    settings = replace(
        resolved.settings,
        image=FileRecord(path="input_reference", sha256=job.image_sha256),
        motion=motion if job.motion_sha256 else None,
        model=job.model,
        loras=tuple(loras),
    )
    return replace(resolved, settings=settings)


def _with_work_dir(resolved: Resolved, folder: JobFolder) -> Resolved:
    """The request with its work dir; one that another version of this software began is emptied."""
    work_dir = PreviewingWorkDir(folder)
    work_dir.forget_other(resolved.settings.plan())
    return replace(resolved, work_dir=work_dir)


if __name__ == "__main__":
    main()
