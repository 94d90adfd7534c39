"""A server inside the test process, with its real parts; and what clients send to it."""

import asyncio
import io
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image

from swifti2v.serving.app import create_app
from swifti2v.serving.checking import answer, describe_model, outline
from swifti2v.serving.data_dir import DataDir
from swifti2v.serving.job_store import JobStore
from swifti2v.serving.processes import Checker, WorkerProcess
from swifti2v.serving.service import Service
from swifti2v.serving.settings import Limits, ServerSettings
from swifti2v.serving.worker import Worker
from tests.helpers.tiny import SIZE

WAIT_SECONDS = 60.0
"""For what takes a second on an idle machine."""


class DirectChecker(Checker):
    """Checks in this process: what a fork would do, without the fork's limits."""

    async def start(self) -> None:
        models = self._settings.model_names
        self._outlines = {name: outline(model) for name, model in models.items()}
        self.models = {name: describe_model(pipe) for name, pipe in self._outlines.items()}

    async def ask(self, **question: Any) -> dict[str, Any]:
        async with self._places:
            return dict(await asyncio.to_thread(answer, question, self._settings, self._outlines))

    async def stop(self) -> None:
        pass


class ThreadWorker(WorkerProcess):
    """Works on a thread of this process."""

    pid = os.getpid()

    def start(self) -> None:
        self._stop = threading.Event()
        worker = Worker(self._settings, DataDir(self._settings.data_dir), self._stop)
        self._thread = threading.Thread(target=worker.work, daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.to_thread(self._thread.join)


class NoWorker(WorkerProcess):
    """Leaves every job in the queue."""

    pid = os.getpid()

    def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass


@dataclass
class Live:
    """A server that listens."""

    url: str
    client: httpx.Client
    service: Service
    settings: ServerSettings

    def submit(self, **fields: Any) -> dict[str, Any]:
        """Queue a video."""
        return ok(self.client.post("/v1/videos", **form(**fields)))

    def get(self, id: str) -> dict[str, Any]:
        """State of a job."""
        return ok(self.client.get(f"/v1/videos/{id}"))

    def finish(self, id: str) -> dict[str, Any]:
        """The job when it has ended."""
        found: dict[str, Any] = wait(
            lambda: self.get(id), lambda v: v["status"] not in ("queued", "in_progress")
        )
        return found

    def rest(self) -> None:
        """Wait until the worker has cleared up after its last job."""
        wait(lambda: self.service.store.worker_state()["state"], lambda state: state == "idle")

    def runs(self, id: str) -> int:
        """How often a job was begun or continued."""
        job = self.service.store.find(id)
        assert job is not None
        return job.runs

    def files(self) -> set[str]:
        """Everything below the folders of jobs."""
        folders = (self.service.data_dir.jobs, self.service.data_dir.incoming)
        return {str(p.relative_to(f)) for f in folders for p in f.rglob("*")}


@contextmanager
def serve(
    model: Path,
    data_dir: Path,
    *,
    limits: Limits | None = None,
    worker: type[WorkerProcess] = ThreadWorker,
    checker: type[DirectChecker] = DirectChecker,
    port: int = 0,
    **more: Any,
) -> Iterator[Live]:
    """Run a server on a thread, at a free port if none is given."""
    settings = ServerSettings(
        data_dir=data_dir, models=(str(model),), limits=limits or Limits(), **more
    )
    app = create_app(
        settings,
        lambda: server.should_exit,
        checker=checker(settings),
        worker=worker(settings),
    )
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            wait(lambda: server.started or not thread.is_alive(), bool)
            with httpx.Client(base_url=url, timeout=WAIT_SECONDS) as client:
                yield Live(url, client, app.state.service, settings)
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def full_disk(store: JobStore) -> Iterator[None]:
    """Let a database refuse all changes, as it does on a full or read-only disk."""
    store._run("PRAGMA query_only = ON")
    try:
        yield
    finally:
        store._run("PRAGMA query_only = OFF")


def wait(
    look: Callable[[], Any], is_good: Callable[[Any], bool], seconds: float = WAIT_SECONDS
) -> Any:
    """What ``look`` gives when it is good."""
    until = time.monotonic() + seconds
    while not is_good(found := look()):
        assert time.monotonic() < until, found
        time.sleep(0.02)
    return found


def ok(response: httpx.Response) -> dict[str, Any]:
    """The body of an answer that is not an error."""
    assert response.status_code == 200, response.text
    return dict(response.json())


def refusal(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which has OpenAI's shape."""
    assert 400 <= response.status_code < 500, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def photo(
    width: int = SIZE, height: int = SIZE, *, format: str = "PNG", mode: str = "RGB"
) -> bytes:
    """A photo's file."""
    size = width * height * len(mode)
    ramp = np.linspace(0, 255, size).reshape(height, width, len(mode)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(ramp, mode).save(buffer, format)
    return buffer.getvalue()


def form(**fields: Any) -> dict[str, Any]:
    """A request for a video as a form."""
    image = fields.pop("input_reference", photo())
    motion = fields.pop("motion_reference", None)
    files = [("input_reference", ("photo.png", image))] if image is not None else []
    if motion is not None:
        files.append(("motion_reference", ("clip.mkv", motion)))
    data = {"prompt": "zoom", "seed": "7", **{k: str(v) for k, v in fields.items()}}
    if not files:  # a form all the same
        return {"files": [(name, (None, value)) for name, value in data.items()]}
    return {"data": data, "files": files}
