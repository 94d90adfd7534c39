"""Jobs in SQLite: every change of state happens once."""

import sqlite3
import threading
from typing import Any

import pytest

from swifti2v.serving.clip_order import ClipOrder
from swifti2v.serving.job import Job, NewJob, new_id
from swifti2v.serving.job_store import MAX_CRASHES, JobStore, KeyReusedError, QueueFullError
from tests.helpers.serving import full_disk


@pytest.fixture
def store(tmp_path):
    with_jobs = JobStore(tmp_path / "jobs.sqlite")
    yield with_jobs
    with_jobs.close()


def new(owner: str = "alice", key: str | None = None, digest: str = "same") -> NewJob:
    order = ClipOrder(model="nano", prompt="zoom", seed=1, changes={})
    return NewJob(
        id=new_id(), owner=owner, idempotency_key=key, body_sha256=digest, model="nano",
        prompt="zoom", order_json=order.to_json(), image_sha256="", motion_sha256=None, width=64,
        height=64, num_frames=17, fps=16, seed=1, seconds="1", notes="[]", segments_total=4,
        stage1_steps=2, segment_steps=3,
    )  # fmt: skip


def add(store: JobStore, **more: Any) -> Job:
    return store.add(new(**more), queue_size=100, jobs_per_key=100)


def test_jobs_are_taken_in_their_order_each_by_one(store, tmp_path):
    ids = [add(store).id for _ in range(20)]
    taken: list[str] = []

    def take() -> None:
        own = JobStore(tmp_path / "jobs.sqlite")
        while job := own.claim():
            taken.append(job.id)
        own.close()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(ids)
    add(store)
    first = add(store)
    assert store.claim().number < first.number


@pytest.mark.parametrize(
    "change", [lambda store, _: add(store), lambda store, id: store.cancel(id)]
)
def test_after_a_full_disk_the_database_goes_on(store, tmp_path, change):
    first = add(store)
    with full_disk(store), pytest.raises(sqlite3.OperationalError):
        change(store, first.id)
    other = JobStore(tmp_path / "jobs.sqlite")
    claimed = other.claim()
    assert claimed is not None
    assert claimed.id == first.id  # no lock is left, and nothing was half done
    other.close()
    assert store.cancel(first.id)
    assert store.totals() == {"jobs_cancelled": 1}


@pytest.mark.parametrize("end", ["cancel", "delete"])
def test_what_ends_first_stays(store, end):
    id = add(store).id
    store.claim()
    assert getattr(store, end)(id)
    assert not store.advance(id, stage="stage1", stage_seconds={})
    assert not store.complete(id, {}, 0)
    assert not store.fail(id, "x", "y")
    store.park(id)
    assert store.claim() is None
    id = add(store).id
    store.claim()
    assert store.complete(id, {"total": 1.0}, 5)
    assert not store.cancel(id)
    assert store.find(id).status == "completed"
    assert store.totals()["jobs_completed"] == 1


def test_a_segment_that_is_finished_as_its_job_is_cancelled_counts(store):
    id = add(store).id
    store.claim()
    store.cancel(id)
    assert not store.advance(id, stage="stage2", segments_done=1, stage_seconds={})
    job = store.find(id)
    assert (job.status, job.stage, job.segments_done) == ("cancelled", None, 1)


def test_an_interrupted_job_comes_first_again_with_what_it_had_finished(store):
    first, second = add(store).id, add(store).id
    store.claim()
    store.advance(first, stage="stage2", steps_done=9, segments_done=2, stage_seconds={})
    store.requeue_interrupted()
    again = store.claim()
    assert (again.id, again.steps_done, again.segments_done, again.runs) == (first, 8, 2, 2)
    store.advance(first, stage="stage2", steps_done=5, segments_done=1, stage_seconds={})
    assert store.find(first).steps_done == 8
    store.park(first)
    assert store.find(first).crashes == 1
    assert [job.id for job in store.unfinished_before(10**6)] == [first, second]


def test_a_job_that_kills_its_worker_is_given_up_unless_it_gets_on(store):
    id = add(store).id
    for _ in range(MAX_CRASHES):
        store.claim()
        store.requeue_interrupted()
    store.claim()
    store.advance(id, stage="stage2", segments_done=1, stage_seconds={})
    store.requeue_interrupted()
    assert store.find(id).status == "queued"
    for _ in range(MAX_CRASHES):
        store.claim()
        store.requeue_interrupted()
    job = store.find(id)
    assert (job.status, job.error_code) == ("failed", "worker_died")
    assert store.claim() is None


def test_limits_count_what_is_not_finished(store):
    store.add(new(), queue_size=2, jobs_per_key=2)
    store.claim()
    store.add(new(), queue_size=2, jobs_per_key=2)
    with pytest.raises(QueueFullError, match="2 jobs of this key are not finished"):
        store.add(new(), queue_size=2, jobs_per_key=2)
    store.add(new(owner="bob"), queue_size=2, jobs_per_key=2)
    with pytest.raises(QueueFullError, match="2 jobs are waiting"):
        store.add(new(owner="carol"), queue_size=2, jobs_per_key=2)


def test_an_idempotency_key_is_its_owners_own(store):
    first = add(store, key="k")
    assert add(store, key="k").id == first.id
    assert add(store, key="k", owner="bob").id != first.id
    assert add(store).id != add(store).id
    with pytest.raises(KeyReusedError):
        add(store, key="k", digest="other")


def test_time_is_predicted_from_jobs_that_ran_through(store):
    assert store.seconds_per_work("nano") is None
    id = add(store).id
    store.claim()
    store.complete(id, {}, 0)
    assert store.seconds_per_work("nano") >= 0
    assert store.seconds_per_work("paper") is None
