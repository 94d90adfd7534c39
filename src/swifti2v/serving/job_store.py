"""Jobs in SQLite: the one truth that server and worker share, whichever of them dies.

A job is *queued*, then *in_progress*, then *completed*, *failed* or *cancelled*. Each change is one
statement that names the state it starts from, so of two that race one does nothing and says so.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from swifti2v.serving.job import Job, NewJob, Status

MAX_CRASHES = 5
"""Deaths of the worker at one job, without a finished segment between them, after which it is given up."""
RATE_JOBS = 5
"""Finished jobs of a model that predict the seconds of the next one."""
BUSY_SECONDS = 30
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  owner TEXT NOT NULL,
  idempotency_key TEXT,
  body_sha256 TEXT NOT NULL,
  status TEXT NOT NULL,
  model TEXT NOT NULL,
  prompt TEXT NOT NULL,
  order_json TEXT NOT NULL,
  image_sha256 TEXT NOT NULL,
  motion_sha256 TEXT,
  width INTEGER NOT NULL,
  height INTEGER NOT NULL,
  num_frames INTEGER NOT NULL,
  fps INTEGER NOT NULL,
  seed INTEGER NOT NULL,
  seconds TEXT NOT NULL,
  notes TEXT NOT NULL,
  segments_total INTEGER NOT NULL,
  stage1_steps INTEGER NOT NULL,
  segment_steps INTEGER NOT NULL,
  created_at REAL NOT NULL,
  started_at REAL,
  ended_at REAL,
  stage TEXT,
  steps_done INTEGER NOT NULL DEFAULT 0,
  segments_done INTEGER NOT NULL DEFAULT 0,
  stage_seconds TEXT NOT NULL DEFAULT '{}',
  peak_memory_bytes INTEGER,
  runs INTEGER NOT NULL DEFAULT 0,
  crashes INTEGER NOT NULL DEFAULT 0,
  error_code TEXT,
  error_message TEXT,
  UNIQUE (owner, idempotency_key)
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, number);
CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, value REAL NOT NULL);
CREATE TABLE IF NOT EXISTS worker (one INTEGER PRIMARY KEY CHECK (one = 1), state TEXT NOT NULL);
"""


class QueueFullError(Exception):
    """No room for another job; the message says whose limit it is."""


class KeyReusedError(Exception):
    """An idempotency key came with another request."""


class JobStore:
    """The database of one data directory; safe to use from several threads and processes.

    Args:
        path: The file; made if it is not there.
        survives_power_cut: Sync every change to the disk, not only the order of changes.
    """

    def __init__(self, path: Path, *, survives_power_cut: bool = True) -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect(
            path, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None
        )
        self._database.row_factory = sqlite3.Row
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute(f"PRAGMA synchronous = {'FULL' if survives_power_cut else 'NORMAL'}")
        self._database.executescript(SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _run(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._database.execute(statement, values).fetchall()

    def _changes(self, statement: str, *values: Any) -> bool:
        """Whether a statement changed anything."""
        with self._lock:
            return self._database.execute(statement, values).rowcount > 0

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Change several rows at once; after an error, a full disk's among them, none."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # SQLite ends it by itself after some errors
                    self._database.execute("ROLLBACK")
                raise

    # What the server does.

    def add(self, new: NewJob, queue_size: int, jobs_per_key: int) -> Job:
        """Queue a job; a repeated request with an idempotency key gives the job of the first one.

        Raises:
            QueueFullError: As said.
            KeyReusedError: As said.
        """
        with self._transaction():
            return self._find_repeated(new) or self._insert(new, queue_size, jobs_per_key)

    def _find_repeated(self, new: NewJob) -> Job | None:
        rows = self._database.execute(
            "SELECT * FROM jobs WHERE owner = ? AND idempotency_key = ?",
            (new.owner, new.idempotency_key),
        ).fetchall()
        if rows and rows[0]["body_sha256"] != new.body_sha256:
            raise KeyReusedError
        return Job(**rows[0]) if rows else None

    def _insert(self, new: NewJob, queue_size: int, jobs_per_key: int) -> Job:
        waiting, own = self._database.execute(
            "SELECT sum(status = 'queued'), sum(owner = ?) FROM jobs "
            "WHERE status IN ('queued', 'in_progress')",
            (new.owner,),
        ).fetchone()
        if (waiting or 0) >= queue_size:
            raise QueueFullError(f"{waiting} jobs are waiting, which is the limit; try again later")
        if (own or 0) >= jobs_per_key:
            raise QueueFullError(
                f"{own} jobs of this key are not finished, which is the limit; try again later"
            )
        values = {item.name: getattr(new, item.name) for item in fields(NewJob)}
        values |= {"status": "queued", "created_at": time.time()}
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        (row,) = self._database.execute(
            f"INSERT INTO jobs ({names}) VALUES ({marks}) RETURNING *", tuple(values.values())
        ).fetchall()
        return Job(**row)

    def find(self, id: str, owner: str | None = None) -> Job | None:
        """A job; None if it is unknown or another owner's."""
        rows = self._run(
            "SELECT * FROM jobs WHERE id = ? AND owner = coalesce(?, owner)", id, owner
        )
        return Job(**rows[0]) if rows else None

    def find_repeated(self, owner: str, key: str) -> Job | None:
        """The job that was queued with an idempotency key."""
        rows = self._run("SELECT * FROM jobs WHERE owner = ? AND idempotency_key = ?", owner, key)
        return Job(**rows[0]) if rows else None

    def page(
        self, owner: str, limit: int, after: int | None = None, *, is_ascending: bool = False
    ) -> list[Job]:
        """Jobs of an owner, the newest first.

        Args:
            owner: Name of the API key.
            limit: Most jobs that are given.
            after: Number of the job before the first one.
            is_ascending: The oldest first.
        """
        sign, order = (">", "ASC") if is_ascending else ("<", "DESC")
        after = after if after is not None else (-1 if is_ascending else 2**62)
        rows = self._run(
            f"SELECT * FROM jobs WHERE owner = ? AND number {sign} ? ORDER BY number {order} LIMIT ?",
            owner,
            after,
            limit,
        )
        return [Job(**row) for row in rows]

    def cancel(self, id: str) -> bool:
        """End a job that has not ended; a worker that runs it notices at its next model call."""
        return self._end(id, "cancelled", "status IN ('queued', 'in_progress')", stage=None)

    def delete(self, id: str) -> bool:
        """Forget a job; a worker that runs it notices at its next model call."""
        return self._changes("DELETE FROM jobs WHERE id = ?", id)

    def expired(self, keep_seconds: float) -> list[str]:
        """Jobs that ended longer ago."""
        limit = time.time() - keep_seconds
        return [row["id"] for row in self._run("SELECT id FROM jobs WHERE ended_at < ?", limit)]

    def ids(self) -> set[str]:
        """All jobs."""
        return {row["id"] for row in self._run("SELECT id FROM jobs")}

    def count(self) -> dict[str, int]:
        """Jobs by status."""
        rows = self._run("SELECT status, count(*) AS jobs FROM jobs GROUP BY status")
        return {row["status"]: row["jobs"] for row in rows}

    def totals(self) -> dict[str, float]:
        """Counts since the database was made, by name."""
        return {row["name"]: row["value"] for row in self._run("SELECT * FROM totals")}

    def queue_position(self, job: Job) -> int:
        """Jobs that are taken before a queued one."""
        (row,) = self._run(
            "SELECT count(*) AS ahead FROM jobs WHERE status = 'queued' AND number < ?", job.number
        )
        return int(row["ahead"])

    def unfinished_before(self, number: int) -> list[Job]:
        """Jobs that run or wait, and came before."""
        rows = self._run(
            "SELECT * FROM jobs WHERE status IN ('queued', 'in_progress') AND number < ? "
            "ORDER BY number",
            number,
        )
        return [Job(**row) for row in rows]

    def seconds_per_work(self, model: str) -> float | None:
        """Median of a model's last jobs; None before the first one."""
        rows = self._run(
            "SELECT * FROM jobs WHERE model = ? AND status = 'completed' AND runs = 1 "
            "ORDER BY ended_at DESC LIMIT ?",
            model,
            RATE_JOBS,
        )
        jobs = [Job(**row) for row in rows]
        rates = sorted(((job.ended_at or 0) - (job.started_at or 0)) / job.work for job in jobs)
        return rates[len(rates) // 2] if rates else None

    # What the worker does.

    def claim(self) -> Job | None:
        """Take the next job."""
        rows = self._run(
            "UPDATE jobs SET status = 'in_progress', stage = 'loading', started_at = ?, "
            "runs = runs + 1 WHERE number = (SELECT number FROM jobs WHERE status = 'queued' "
            "ORDER BY number LIMIT 1) RETURNING *",
            time.time(),
        )
        return Job(**rows[0]) if rows else None

    def advance(
        self,
        id: str,
        *,
        stage: str,
        steps_done: int = 0,
        segments_done: int = 0,
        stage_seconds: Mapping[str, float],
    ) -> bool:
        """Note how far a job is; False if it was cancelled or deleted meanwhile.

        Of a cancelled job the segments count that were finished nevertheless.
        """
        rows = self._run(
            "UPDATE jobs SET stage = iif(status = 'in_progress', ?, stage), "
            "steps_done = max(steps_done, ?), crashes = iif(segments_done < ?, 0, crashes), "
            "segments_done = max(segments_done, ?), stage_seconds = ? "
            "WHERE id = ? AND status IN ('in_progress', 'cancelled') RETURNING status",
            stage,
            steps_done,
            segments_done,
            segments_done,
            json.dumps({name: round(value, 3) for name, value in stage_seconds.items()}),
            id,
        )
        return [row["status"] for row in rows] == ["in_progress"]

    def complete(self, id: str, stage_seconds: Mapping[str, float], peak_memory_bytes: int) -> bool:
        """End a job whose video is there; False if it was cancelled or deleted meanwhile."""
        return self._end(
            id,
            "completed",
            "status = 'in_progress'",
            stage=None,
            stage_seconds=json.dumps(dict(stage_seconds)),
            peak_memory_bytes=peak_memory_bytes,
        )

    def fail(self, id: str, code: str, message: str) -> bool:
        """End a job that cannot be made."""
        condition = "status IN ('queued', 'in_progress')"
        return self._end(id, "failed", condition, error_code=code, error_message=message)

    def park(self, id: str) -> None:
        """Put a job back at the head of the queue."""
        self._changes(f"{_REQUEUE} WHERE id = ? AND status = 'in_progress'", id)

    def requeue_interrupted(self) -> None:
        """Put back what a worker that died had begun; give up a job that has killed too many."""
        for row in self._run("SELECT * FROM jobs WHERE status = 'in_progress'"):
            job = Job(**row)
            if job.crashes >= MAX_CRASHES:
                self.fail(job.id, "worker_died", f"the worker died {job.crashes + 1} times at it")
            else:
                self._changes(f"{_REQUEUE}, crashes = crashes + 1 WHERE id = ?", job.id)

    def _end(self, id: str, status: Status, condition: str, **values: Any) -> bool:
        """Change a job to a last state, and count it, at once."""
        values |= {"status": status, "ended_at": time.time()}
        names = ", ".join(f"{name} = ?" for name in values)
        with self._transaction():
            is_ended = self._database.execute(
                f"UPDATE jobs SET {names} WHERE id = ? AND {condition}", (*values.values(), id)
            ).rowcount
            if is_ended:
                self._database.execute(
                    "INSERT INTO totals VALUES (?, 1) "
                    "ON CONFLICT (name) DO UPDATE SET value = value + 1",
                    (f"jobs_{status}",),
                )
        return bool(is_ended)

    # What they tell each other.

    def tell_worker_state(self, **state: Any) -> None:
        """Say what the worker does now."""
        self._run(
            "INSERT INTO worker VALUES (1, ?) ON CONFLICT (one) DO UPDATE SET state = excluded.state",
            json.dumps(state),
        )

    def worker_state(self) -> dict[str, Any]:
        """Last state that the worker told; empty before the first one."""
        rows = self._run("SELECT state FROM worker")
        return dict(json.loads(rows[0]["state"])) if rows else {}


_REQUEUE = (
    "UPDATE jobs SET status = 'queued', stage = NULL, "
    "steps_done = iif(segments_done, stage1_steps + segments_done * segment_steps, 0)"
)
