"""A worker killed again and again: ``serving_killed.py MODEL DIRECTORY NUM_KILLS``.

Every second kill comes while a file is written. Prints the kills of both kinds, and of every job its
state, how often it was run and the SHA-256 of its frames and of its stream. All workers are forks of
one process, which spares the imports.
"""

import hashlib
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

from swifti2v.serving.data_dir import DataDir
from swifti2v.serving.job import Job
from swifti2v.serving.job_store import JobStore
from swifti2v.serving.settings import ServerSettings
from swifti2v.serving.worker import Worker
from tests.helpers.command_line import frames_of
from tests.helpers.serving import NoWorker, serve

JOBS = (
    {"num_frames": 17, "num_inference_steps": 4},
    {"num_frames": 9, "num_inference_steps": 6, "seed": 3},
    {"num_frames": 17, "num_inference_steps": 3, "segment_size": 2},
)


class OneRound(threading.Event):
    """Says that a worker shall end once the queue is empty, where it would wait for more."""

    def wait(self, timeout: float | None = None) -> bool:
        self.set()
        return True


def start(settings: ServerSettings) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        Worker(settings, DataDir(settings.data_dir), OneRound()).work()
        code = 0
    finally:
        os._exit(code)


def is_writing(folder: Path) -> bool:
    return any(folder.rglob("*.writing"))


def has_ended(child: int) -> bool:
    pid, status = os.waitpid(child, os.WNOHANG)
    assert not pid or status == 0
    return bool(pid)


def kill_until_done(settings: ServerSettings, num_kills: int) -> dict[str, int]:
    """Run workers until no job is left; each is killed after some of its model calls."""
    rng = random.Random(0)
    kills = {"in_write": 0, "anywhere": 0}
    while True:
        child, seen = start(settings), {look(settings)}
        wants_write = kills["in_write"] < kills["anywhere"]
        num_calls = rng.randint(2, 12)
        while not (is_over := has_ended(child)):
            seen.add(look(settings))
            is_due = len(seen) > num_calls and sum(kills.values()) < num_kills
            if is_due and (not wants_write or is_writing(settings.data_dir)):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills["in_write" if wants_write else "anywhere"] += 1
                break
        if is_over:
            return kills


def look(settings: ServerSettings) -> tuple[int, ...]:
    """How far the jobs are."""
    store = JobStore(DataDir(settings.data_dir).database)
    jobs = store.page("local", 10)
    store.close()
    return tuple(job.steps_done for job in jobs)


def describe(data_dir: DataDir, job: Job) -> dict[str, object]:
    folder = data_dir.job(job.id)
    return {
        "status": job.status,
        "runs": job.runs,
        "frames": hashlib.sha256(frames_of(folder.video).tobytes()).hexdigest(),
        "stream": hashlib.sha256(folder.stream.read_bytes()).hexdigest(),
    }


def main(model: Path, directory: Path, num_kills: int) -> None:
    with serve(model, directory, worker=NoWorker) as live:
        settings = live.settings
        ids = [live.submit(**fields)["id"] for fields in JOBS]
    kills = kill_until_done(settings, num_kills)
    data_dir = DataDir(directory)
    store = JobStore(data_dir.database)
    jobs = [describe(data_dir, job) for id in ids if (job := store.find(id))]
    json.dump({"kills": kills, "jobs": jobs}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
