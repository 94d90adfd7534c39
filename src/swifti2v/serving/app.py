"""The application: its parts, what stands before its routes, and how it begins and ends."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI

from swifti2v import __version__
from swifti2v.errors import SwiftI2VError
from swifti2v.serving.data_dir import DataDir
from swifti2v.serving.failures import add_handlers
from swifti2v.serving.guard import Guard
from swifti2v.serving.job_store import JobStore
from swifti2v.serving.keys import Keys
from swifti2v.serving.metrics import CountRequests, Metrics
from swifti2v.serving.openapi import describe
from swifti2v.serving.processes import Checker, WorkerProcess
from swifti2v.serving.routes import operations, videos
from swifti2v.serving.service import Service
from swifti2v.serving.settings import ServerSettings
from swifti2v.serving.web_page import add_page


def create_app(
    settings: ServerSettings,
    is_stopping: Callable[[], bool] = lambda: False,
    on_failure: Callable[[SwiftI2VError], None] = lambda _: None,
    checker: Checker | None = None,
    worker: WorkerProcess | None = None,
) -> FastAPI:
    """The application of a server; its processes run from its start to its end.

    Args:
        settings: Of the server.
        is_stopping: Whether the server is about to end, so that streams end too.
        on_failure: Called where a model of the settings cannot be served.
        checker: Checks requests; by default a process of its own.
        worker: Makes the videos; by default a process of its own.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        data_dir = DataDir(settings.data_dir)
        with data_dir.only_server():
            service = Service(
                settings=settings,
                data_dir=data_dir,
                store=JobStore(data_dir.database),
                keys=Keys(data_dir.keys),
                checker=checker or Checker(settings),
                worker=worker or WorkerProcess(settings),
                is_stopping=is_stopping,
            )
            app.state.service = service
            metrics.watch(service)
            async with _running(service, on_failure):
                yield

    app = FastAPI(
        title="swifti2v",
        version=__version__,
        description="One photo and a prompt become a video.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    app.state.metrics = metrics
    add_handlers(app)
    app.include_router(videos)
    app.include_router(operations)
    add_page(app)
    describe(app)
    app.add_middleware(Guard, hosts=settings.hosts, max_bytes=settings.limits.upload_bytes)
    app.add_middleware(CountRequests, metrics=metrics)
    return app


async def _start_checker(service: Service, on_failure: Callable[[SwiftI2VError], None]) -> None:
    try:
        await service.checker.start()
    except SwiftI2VError as error:
        on_failure(error)
    except EOFError:
        on_failure(SwiftI2VError("the process that checks requests died at its start"))
    else:
        service.is_ready.set()


@asynccontextmanager
async def _running(
    service: Service, on_failure: Callable[[SwiftI2VError], None]
) -> AsyncIterator[None]:
    """The processes of a server, and the cleaning of its folder.

    It listens at once: clients that wait for a job of before a restart find it, and new requests
    wait for the checker, which loads PyTorch.
    """
    service.data_dir.clear_leftovers(service.store.ids())
    try:
        service.worker.start()
        tasks = (
            asyncio.create_task(_start_checker(service, on_failure)),
            asyncio.create_task(service.forget_expired()),
        )
        yield
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    finally:
        await service.worker.stop()
        await service.checker.stop()
        service.store.close()
