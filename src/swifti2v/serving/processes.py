"""The two processes beside the server: one that checks requests, one that makes the videos."""

import asyncio
import json
import logging
import sys
import time
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from typing import Any

from swifti2v.errors import SwiftI2VError
from swifti2v.serving.settings import ServerSettings

logger = logging.getLogger("swifti2v.serving")

LINE_BYTES = 4 * 1024**2
"""Longest answer of the checker."""
STOP_SECONDS = 30.0
"""Patience with a worker that is told to end; then it is killed, which loses no segment."""
SOON_SECONDS = 5.0
"""A worker that dies sooner than this after its start is not started again at once."""
MAX_DELAY_SECONDS = 30.0
SIDE_BY_SIDE = 2
"""Requests that are checked at a time; each may take ``Limits.check_bytes``."""


async def _start(module: str, settings: ServerSettings, stdout: int | None = None) -> Process:
    """Start a module with the settings; it ends when its stdin does, so also when this one dies."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"swifti2v.serving.{module}",
        settings.to_json(),
        stdin=PIPE,
        stdout=stdout,
        limit=LINE_BYTES,
        start_new_session=True,  # Ctrl-C in a terminal is for the server
    )


class Checker:
    """Asks ``swifti2v.serving.checking``, a few requests at a time."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._process: Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._start_lock = asyncio.Lock()
        self._places = asyncio.Semaphore(SIDE_BY_SIDE)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self.models: dict[str, dict[str, Any]] = {}
        """Facts of each model, by name."""

    async def start(self) -> None:
        """Start the process and wait until it answers.

        Raises:
            SwiftI2VError: A model that it cannot describe.
        """
        self._process = await _start("checking", self._settings, PIPE)
        ready = await self._read(self._process)
        if "error" in ready:
            raise SwiftI2VError(ready["error"])
        self.models = ready["models"]
        self._reading = asyncio.create_task(self._hand_out(self._process))

    async def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to a question; a checker that has died is replaced once."""
        async with self._places:
            for _ in range(2):
                async with self._start_lock:
                    if self._process is None:
                        await self.start()
                try:
                    return await self._exchange(question)
                except (ConnectionError, EOFError):
                    logger.warning("the process that checks requests died and is started again")
        raise SwiftI2VError("the process that checks requests dies at this one")

    async def _exchange(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        if process is None:
            raise EOFError
        assert process.stdin is not None
        self._number += 1
        number, answer = self._number, asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            process.stdin.write(json.dumps({**question, "number": number}).encode() + b"\n")
            await process.stdin.drain()
            return dict(await answer)
        finally:
            del self._waiting[number]

    async def _hand_out(self, process: Process) -> None:
        """Give each answer to who waits for it, if any; at the process's end all get an error."""
        with suppress(EOFError):
            while True:
                answer = await self._read(process)
                waiting = self._waiting.get(answer["number"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        self._process = None
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(EOFError())

    async def stop(self) -> None:
        """End the process."""
        if self._reading is not None:
            self._reading.cancel()
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    @staticmethod
    async def _read(process: Process) -> dict[str, Any]:
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            raise EOFError
        return dict(json.loads(line))


class WorkerProcess:
    """Keeps ``swifti2v.serving.worker`` running."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._process: Process | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Id of the process; None while it does not run."""
        is_running = self._process is not None and self._process.returncode is None
        return self._process.pid if is_running and self._process else None

    def start(self) -> None:
        """Run a worker from now on."""
        self._task = asyncio.create_task(self._keep_running())

    async def stop(self) -> None:
        """Let the worker put its job back and end; one that does not is killed."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        process = self._process
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _keep_running(self) -> None:
        delay = 0.0
        while True:
            started = time.monotonic()
            self._process = await _start("worker", self._settings)
            code = await self._process.wait()
            is_soon = time.monotonic() - started < SOON_SECONDS
            delay = min(MAX_DELAY_SECONDS, 2 * delay or 1.0) if is_soon else 0.0
            logger.warning("the worker ended (%d) and is started again", code)
            await asyncio.sleep(delay)
