"""The routes of the API; what they do lies in the modules that they call."""

import asyncio
import shutil
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from swifti2v.serving.accepting import accept, estimate
from swifti2v.serving.bodies import read_body
from swifti2v.serving.failures import ApiError
from swifti2v.serving.job import Job
from swifti2v.serving.keys import LOCAL
from swifti2v.serving.schemas import (
    DeletedVideo,
    Estimate,
    Health,
    Model,
    ModelList,
    Video,
    VideoList,
)
from swifti2v.serving.service import TICK_SECONDS, Service
from swifti2v.serving.streaming import stream_events, stream_fragments

POLL_HEADER = "openai-poll-after-ms"
POLL_MILLISECONDS = {"queued": 1000, "in_progress": 500}
NO_STORE = {"Cache-Control": "no-store"}


def get_service(request: Request) -> Service:
    """The parts of the server that answers."""
    service: Service = request.app.state.service
    return service


async def get_ready_service(request: Request) -> Service:
    """The parts of the server, once requests can be checked."""
    service = get_service(request)
    await service.is_ready.wait()
    return service


AnyService = Annotated[Service, Depends(get_service)]
ReadyService = Annotated[Service, Depends(get_ready_service)]
_bearer = HTTPBearer(auto_error=False, description="An API key; needed where the server has keys.")


def get_owner(
    service: AnyService,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> str:
    """Find the holder of the API key.

    Raises:
        ApiError: The key is missing or unknown.
    """
    if not service.keys:
        return LOCAL
    owner = service.keys.find(credentials.credentials) if credentials is not None else None
    if owner is None:
        raise ApiError(
            401,
            "invalid_api_key",
            "send a valid API key: Authorization: Bearer KEY",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return owner


videos = APIRouter(prefix="/v1", tags=["videos"], dependencies=[Depends(get_owner)])
operations = APIRouter(tags=["operations"])
Owner = Annotated[str, Depends(get_owner)]
Id = Annotated[str, Path(description="Of the job.", max_length=100)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="A request repeated with it gives the job of the first.",
    ),
]


@videos.post("/videos")
async def create_video(
    request: Request,
    response: Response,
    service: ReadyService,
    owner: Owner,
    idempotency_key: IdempotencyKey = None,
) -> Video:
    """Queue a video."""
    body = await read_body(request, service.settings.limits.upload_bytes)
    job = await accept(service, body, owner, idempotency_key)
    _advise(response, job)
    return service.show(job)


@videos.post("/videos/estimate")
async def estimate_video(request: Request, service: ReadyService, owner: Owner) -> Estimate:
    """Check a request and say what it would take; nothing is stored."""
    body = await read_body(request, service.settings.limits.upload_bytes)
    return await estimate(service, body, owner)


@videos.post("/videos/sync", response_class=FileResponse)
async def create_video_and_wait(
    request: Request,
    service: ReadyService,
    owner: Owner,
    idempotency_key: IdempotencyKey = None,
) -> FileResponse:
    """Make a video and answer with it; a client that hangs up cancels it."""
    body = await read_body(request, service.settings.limits.upload_bytes)
    job = await accept(service, body, owner, idempotency_key)
    job = await _wait_for_end(request, service, job)
    if job.status == "failed":
        raise ApiError(422, job.error_code or "failed", job.error_message or "it failed")
    if job.status == "cancelled":
        raise ApiError(422, "cancelled", "the video was cancelled")
    headers = {"x-video-id": job.id, "x-seed": str(job.seed), **NO_STORE}
    path = service.data_dir.job(job.id).video
    return FileResponse(path, media_type="video/mp4", headers=headers)


async def _wait_for_end(request: Request, service: Service, job: Job) -> Job:
    until = time.monotonic() + service.settings.limits.sync_seconds
    while not job.has_ended:
        if await request.is_disconnected():
            service.store.cancel(job.id)
        elif service.is_stopping() or time.monotonic() > until:
            raise ApiError(504, "timeout", f"{job.id} is not finished yet; ask for it by its id")
        await asyncio.sleep(TICK_SECONDS)
        job = service.find(job.id, job.owner)
    return job


@videos.head("/videos", include_in_schema=False)
@videos.get("/videos")
def list_videos(
    service: AnyService,
    owner: Owner,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="The job before the first one.")] = None,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """List jobs, the newest first."""
    number = None if after is None else service.find(after, owner, param="after").number
    jobs = service.store.page(owner, limit + 1, number, is_ascending=order == "asc")
    shown = [service.show(job) for job in jobs[:limit]]
    return VideoList(
        data=shown,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(jobs) > limit,
    )


@videos.head("/videos/{id}", include_in_schema=False)
@videos.get("/videos/{id}")
def retrieve_video(id: Id, response: Response, service: AnyService, owner: Owner) -> Video:
    """Tell the state of a job."""
    job = service.find(id, owner)
    _advise(response, job)
    return service.show(job)


@videos.delete("/videos/{id}")
def delete_video(id: Id, service: AnyService, owner: Owner) -> DeletedVideo:
    """Stop a job and forget it with its files."""
    service.forget(service.find(id, owner).id)
    return DeletedVideo(id=id)


@videos.post("/videos/{id}/cancel")
def cancel_video(id: Id, service: AnyService, owner: Owner) -> Video:
    """Stop a job; what is finished of it is kept."""
    service.store.cancel(service.find(id, owner).id)
    return service.show(service.find(id, owner))


@videos.head("/videos/{id}/content", include_in_schema=False)
@videos.get("/videos/{id}/content", response_class=FileResponse)
def download_video(
    id: Id,
    service: AnyService,
    owner: Owner,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
) -> FileResponse:
    """Download what a job made; of one that was stopped, the segments that it finished."""
    job = service.find(id, owner)
    folder = service.data_dir.job(id)
    path, kind = {
        "video": (folder.video, "video/mp4"),
        "thumbnail": (folder.thumbnail, "image/jpeg"),
        "spritesheet": (folder.spritesheet, "image/png"),
    }[variant]
    if not (job.has_ended and path.exists() and path.stat().st_size):
        message = f"the {variant} is not there: the job is {job.status}"
        raise ApiError(404, "video_not_ready", message)
    name = f"{id}{path.suffix}"
    return FileResponse(path, media_type=kind, filename=name, content_disposition_type="inline", headers=NO_STORE)  # fmt: skip


@videos.get("/videos/{id}/stream", response_class=StreamingResponse)
def stream_video(id: Id, service: AnyService, owner: Owner) -> Response:
    """Fragmented MP4 from its first byte, while it is made and after."""
    job = service.find(id, owner)
    path = service.data_dir.job(id).stream
    if not job.has_ended:
        return StreamingResponse(
            stream_fragments(service, id), media_type="video/mp4", headers=NO_STORE
        )
    if not (path.exists() and path.stat().st_size):
        raise ApiError(404, "video_not_ready", f"no segment was finished: the job is {job.status}")
    return FileResponse(path, media_type="video/mp4", headers=NO_STORE)


@videos.get("/videos/{id}/events", response_class=StreamingResponse)
def follow_video(
    id: Id,
    service: AnyService,
    owner: Owner,
    last_event_id: Annotated[str | None, Header(description="Previews that were seen.")] = None,
) -> StreamingResponse:
    """Server-Sent Events: progress, previews, and the end."""
    service.find(id, owner)
    num_seen = int(last_event_id) if last_event_id and last_event_id.isdecimal() else 0
    return StreamingResponse(
        stream_events(service, id, num_seen), media_type="text/event-stream", headers=NO_STORE
    )


@videos.head("/models", include_in_schema=False)
@videos.get("/models")
def list_models(service: ReadyService) -> ModelList:
    """List the models that may be asked for."""
    return ModelList(data=[_show_model(service, name) for name in service.checker.models])


@videos.get("/models/{id:path}")
def retrieve_model(id: str, service: ReadyService) -> Model:
    """Tell of a model."""
    if id not in service.checker.models:
        raise ApiError(404, "not_found", f"there is no model {id!r}")
    return _show_model(service, id)


def _show_model(service: Service, name: str) -> Model:
    facts: dict[str, Any] = service.checker.models[name]
    limits = service.settings.limits
    return Model(
        id=name,
        created=0,
        loras=[*service.settings.loras],
        max_pixels=limits.video_pixels,
        max_num_frames=limits.video_frames,
        **facts,
    )


def _advise(response: Response, job: Job) -> None:
    """Say when it is worth asking again."""
    if not job.has_ended:
        response.headers[POLL_HEADER] = str(POLL_MILLISECONDS[job.status])


@operations.head("/health", include_in_schema=False)
@operations.get("/health")
def tell_health(service: AnyService) -> JSONResponse:
    """Whether server and worker run."""
    pid = service.worker.pid
    return _tell_state(service, None if pid is not None else "the worker is not running")


@operations.head("/ready", include_in_schema=False)
@operations.get("/ready")
def tell_readiness(service: AnyService) -> JSONResponse:
    """Whether another job would be taken and begun."""
    reason = None
    if not service.is_ready.is_set():
        reason = "the server is starting"
    elif (
        service.worker.pid is None or service.store.worker_state().get("pid") != service.worker.pid
    ):
        reason = "the worker is starting"
    elif shutil.disk_usage(service.data_dir.path).free < service.settings.limits.upload_bytes:
        reason = "the disk is full"
    elif service.store.count().get("queued", 0) >= service.settings.limits.queue_size:
        reason = "the queue is full"
    return _tell_state(service, reason)


def _tell_state(service: Service, reason: str | None) -> JSONResponse:
    state = service.store.worker_state()
    worker = {name: state.get(name) for name in ("state", "models")}
    waiting = service.store.count().get("queued", 0)
    health = Health(
        status="ok" if reason is None else "unavailable",
        reason=reason,
        worker=worker,
        queue_length=waiting,
    )
    return JSONResponse(health.model_dump(), 200 if reason is None else 503)


@operations.get("/metrics", response_class=Response, dependencies=[Depends(get_owner)])
def tell_metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    text = request.app.state.metrics.to_text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
