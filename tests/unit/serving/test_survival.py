"""Nothing is lost and nothing is made twice, whoever dies."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openai import OpenAI

from swifti2v.errors import InputError
from swifti2v.serving.app import create_app
from swifti2v.serving.data_dir import DataDir
from swifti2v.serving.job_store import JobStore
from swifti2v.serving.worker import Worker
from tests.helpers.command_line import assert_same_frames, error_line, swifti2v
from tests.helpers.serving import (
    DirectChecker,
    NoWorker,
    form,
    full_disk,
    ok,
    photo,
    serve,
    wait,
)

NUM_KILLS = 6
START_SECONDS = 300.0
"""For what takes ten seconds on an idle machine: PyTorch is imported twice."""


def has_segment(video: dict[str, Any]) -> bool:
    return bool(video["segments_done"])


@pytest.mark.slow
def test_a_stopped_server_parks_its_job_and_the_next_one_goes_on(model, tmp_path):
    with serve(model, tmp_path) as live:
        id = live.submit(num_inference_steps=90)["id"]
        wait(lambda: live.get(id), has_segment)
    with serve(model, tmp_path) as live:
        assert live.finish(id)["status"] == "completed"
        again = live.finish(live.submit(num_inference_steps=90)["id"])
        assert [live.runs(each) for each in (id, again["id"])] == [2, 1]
        folders = [live.service.data_dir.job(each) for each in (id, again["id"])]
    assert_same_frames(folders[0].video, folders[1].video)
    assert folders[0].stream.read_bytes() == folders[1].stream.read_bytes()


@pytest.mark.slow
def test_while_the_disk_is_full_a_job_waits_and_then_goes_on(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("swifti2v.serving.worker.FULL_DISK_SECONDS", 0.1)
    with serve(model, tmp_path, worker=NoWorker) as live:
        worker = Worker(live.settings, live.service.data_dir, stop := threading.Event())
        thread = threading.Thread(target=worker.work)
        with full_disk(worker._store):
            thread.start()
            wait(lambda: caplog.text, lambda text: "jobs wait" in text)
        id = live.submit(num_inference_steps=90)["id"]
        wait(lambda: live.get(id), has_segment)
        caplog.clear()
        with full_disk(worker._store):
            wait(lambda: caplog.text, lambda text: "jobs wait" in text)
            assert live.get(id)["status"] == "in_progress"
        assert live.finish(id)["status"] == "completed"
        assert live.runs(id) == 2
        stop.set()
        thread.join()


@pytest.mark.slow
def test_a_job_that_another_version_began_begins_anew(model, tmp_path):
    with serve(model, tmp_path) as live:
        id = live.submit(num_inference_steps=90)["id"]
        wait(lambda: live.get(id), has_segment)
        plan = live.service.data_dir.job(id).work / "plan.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "version": "0.0.1"}))
    with serve(model, tmp_path) as live:
        assert live.finish(id)["status"] == "completed"


def test_a_second_server_on_the_same_folder_is_refused(model, tmp_path):
    async def begin(app: FastAPI) -> None:
        async with app.router.lifespan_context(app):
            pass

    with (
        serve(model, tmp_path, worker=NoWorker) as live,
        pytest.raises(InputError, match="another server runs on"),
    ):
        asyncio.run(begin(create_app(live.settings)))


class LateChecker(DirectChecker):
    """Does not answer before it may."""

    may_start = threading.Event()

    async def start(self) -> None:
        while not self.may_start.is_set():
            await asyncio.sleep(0.01)
        await super().start()


@pytest.mark.slow
def test_a_server_listens_before_it_can_check_requests(model, tmp_path):
    with serve(model, tmp_path, worker=NoWorker) as live:
        id = live.submit()["id"]
    with (
        serve(model, tmp_path, worker=NoWorker, checker=LateChecker) as live,
        ThreadPoolExecutor() as pool,
    ):
        assert live.get(id)["status"] == "queued"
        ready = live.client.get("/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, "the server is starting")
        job, models = pool.submit(live.submit), pool.submit(live.client.get, "/v1/models")
        time.sleep(0.2)
        assert not job.done()
        assert not models.done()
        LateChecker.may_start.set()
        assert job.result()["status"] == "queued"
        assert models.result().status_code == 200


def serve_here(model: Path, data_dir: Path, port: int) -> str:
    """Error of a server that cannot start."""
    arguments = ("serve", "--model", model, "--data-dir", data_dir, "--port", port)
    return error_line(swifti2v(*arguments))


def test_a_folder_or_port_in_use_and_an_unknown_model_are_refused_at_once(model, tmp_path):
    with serve(model, tmp_path / "used", worker=NoWorker):
        assert "another server runs on" in serve_here(model, tmp_path / "used", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port} cannot be listened at" in serve_here(model, tmp_path / "b", port)
    assert "unknown model 'nona'" in serve_here(Path("nona"), tmp_path / "c", 0)


def test_what_a_killed_server_left_of_requests_is_cleared(model, tmp_path):
    for folder in ("incoming/video_1", "jobs/video_2"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "photo.png").write_bytes(b"")
    with serve(model, tmp_path, worker=NoWorker) as live:
        id = live.submit()["id"]
    with serve(model, tmp_path, worker=NoWorker) as live:
        assert live.files() == {id, f"{id}/photo.png"}


def run_killed(model: Path, directory: Path, num_kills: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.helpers.serving_killed", str(model), str(directory)]
    command.append(str(num_kills))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_jobs_of_a_worker_that_is_killed_again_and_again_are_those_of_one_that_is_not(
    model, tmp_path
):
    killed = run_killed(model, tmp_path / "killed", NUM_KILLS)
    alone = run_killed(model, tmp_path / "alone", 0)
    assert min(killed["kills"].values()) >= 2
    assert {job["status"] for job in killed["jobs"]} == {"completed"}
    runs = [job.pop("runs") for job in killed["jobs"]]
    assert max(runs) > 1
    assert {job.pop("runs") for job in alone["jobs"]} == {1}
    assert killed["jobs"] == alone["jobs"]


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def process(
    model: Path, data_dir: Path, port: int | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """``swifti2v serve``, ready."""
    port = port or find_port()
    command = (sys.executable, "-m", "swifti2v", "serve", "--model", model, "--port", str(port), "--data-dir", data_dir)  # fmt: skip
    with (
        subprocess.Popen(command) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        try:
            wait(lambda: is_ready(client), bool, START_SECONDS)
            yield server, client
        finally:
            server.kill()


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def wait_for(client: httpx.Client, id: str, is_good: Callable[[dict[str, Any]], bool]) -> None:
    """Wait until a job is as wanted."""
    wait(lambda: ok(client.get(f"/v1/videos/{id}")), is_good, START_SECONDS)


def is_completed(video: dict[str, Any]) -> bool:
    return bool(video["status"] == "completed")


@pytest.mark.slow
def test_a_killed_server_goes_on_where_it_stopped_and_sigterm_parks_the_job(model, tmp_path):
    data_dir = DataDir(tmp_path / "data")
    request = form(num_inference_steps=60)
    with process(model, data_dir.path) as (server, client):
        id = ok(client.post("/v1/videos", **request))["id"]
        waiting = ok(client.post("/v1/videos", **request))["id"]
        wait_for(client, id, has_segment)
        server.send_signal(signal.SIGKILL)
    with process(model, data_dir.path) as (server, client):
        os.kill(JobStore(data_dir.database).worker_state()["pid"], signal.SIGKILL)
        for each in (id, waiting):
            wait_for(client, each, is_completed)
        last = ok(client.post("/v1/videos", **request))["id"]
        wait_for(client, last, has_segment)
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0
    assert_same_frames(data_dir.job(id).video, data_dir.job(waiting).video)
    parked = JobStore(data_dir.database).find(last)
    assert parked is not None
    assert (parked.status, parked.crashes) == ("queued", 0)
    assert list(data_dir.job(last).work.glob("segment_*.safetensors"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of client.videos
def test_a_call_of_the_openai_package_outlives_a_server_that_is_killed(model, tmp_path):
    """As where systemd or Kubernetes starts it again: the call sees no more than a delay."""
    data_dir, port = DataDir(tmp_path / "data"), find_port()
    fields: Any = {"num_inference_steps": 60, "seed": 7}
    with (
        OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=50) as client,
        ThreadPoolExecutor() as pool,
    ):
        with process(model, data_dir.path, port) as (server, http):
            call = pool.submit(
                client.videos.create_and_poll,
                prompt="zoom",
                input_reference=("photo.png", photo()),
                extra_body=fields,
            )
            (job,) = wait(lambda: ok(http.get("/v1/videos"))["data"], bool, START_SECONDS)
            wait_for(http, job["id"], has_segment)
            server.send_signal(signal.SIGKILL)
        with process(model, data_dir.path, port) as (_, http):
            video = call.result(timeout=START_SECONDS)
            assert (video.id, video.status) == (job["id"], "completed")
            content = client.videos.download_content(video.id).read()
            again = ok(http.post("/v1/videos", **form(**fields)))["id"]
            wait_for(http, again, is_completed)
    (tmp_path / "video.mp4").write_bytes(content)
    assert_same_frames(tmp_path / "video.mp4", data_dir.job(again).video)
