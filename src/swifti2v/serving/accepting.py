"""From a request to a queued job: everything is checked before anything is stored."""

import asyncio
import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from typing import Any

from swifti2v.config import expand_shorthands
from swifti2v.errors import InputError
from swifti2v.jobs.request import draw_seed
from swifti2v.models.loading.sources import LoraSource
from swifti2v.serving.bodies import FILES, Body
from swifti2v.serving.clip_order import ClipOrder, JobFolder
from swifti2v.serving.failures import ApiError
from swifti2v.serving.fetching import fetch
from swifti2v.serving.job import Job, NewJob, new_id
from swifti2v.serving.job_store import KeyReusedError, QueueFullError
from swifti2v.serving.schemas import Estimate, Lora, VideoRequest
from swifti2v.serving.service import Service

logger = logging.getLogger("swifti2v.serving")

CHANGES = (
    "num_frames",
    "fps",
    "negative_prompt",
    "later_prompts",
    "num_inference_steps",
    "guidance_scale",
    "segment_size",
    "context_size",
)
"""Fields of a request that are settings of the model."""
RETRY_SECONDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class _Checked:
    """A request that can be made; its files lie in the folder of incoming requests."""

    new: NewJob
    folder: JobFolder
    memory_bytes: int | None


async def accept(service: Service, body: Body, owner: str, idempotency_key: str | None) -> Job:
    """Check a request and queue it.

    Args:
        service: The server's parts.
        body: What was sent.
        owner: Whose job it is.
        idempotency_key: A request that is repeated with it gives the job of the first one.

    Raises:
        ApiError: It cannot be made, or there is no room; nothing is stored.
    """
    digest = _digest(body)
    if idempotency_key is not None:
        before = service.store.find_repeated(owner, idempotency_key)
        if before is not None and before.body_sha256 == digest:
            return before
    limits = service.settings.limits
    if service.store.count().get("queued", 0) >= limits.queue_size:
        raise _queue_full(f"{limits.queue_size} jobs are waiting, which is the limit")
    checked = await _check(service, body, owner, idempotency_key, digest, wants_memory=False)
    checked.folder.path.rename(service.data_dir.job(checked.new.id).path)
    job = None
    try:
        job = service.store.add(checked.new, limits.queue_size, limits.jobs_per_key)
    except QueueFullError as error:
        raise _queue_full(str(error)) from None
    except KeyReusedError:
        raise ApiError(
            422,
            "idempotency_key_reused",
            "this Idempotency-Key came with another request; use a new one",
        ) from None
    finally:
        if job is None or job.id != checked.new.id:
            service.data_dir.clear_job(checked.new.id)
    prompt = f": {job.prompt!r}" if service.settings.logs_prompts else ""
    logger.info("%s is queued (%dx%d, %d frames)%s", job.id, job.width, job.height, job.num_frames, prompt)  # fmt: skip
    return job


async def estimate(service: Service, body: Body, owner: str) -> Estimate:
    """Check a request and say what it would take; nothing is stored.

    Raises:
        ApiError: It cannot be made.
    """
    checked = await _check(service, body, owner, None, "", wants_memory=True)
    await asyncio.to_thread(shutil.rmtree, checked.folder.path)
    new = checked.new
    seconds = service.predict_seconds(new.model, new.work)
    return Estimate(
        model=new.model,
        size=f"{new.width}x{new.height}",
        num_frames=new.num_frames,
        fps=new.fps,
        seconds=new.seconds,
        segments_total=new.segments_total,
        memory_bytes=checked.memory_bytes or 0,
        eta_seconds=seconds and round(seconds, 1),
        queue_length=service.store.count().get("queued", 0),
        notes=json.loads(new.notes),
    )


def _queue_full(text: str) -> ApiError:
    return ApiError(429, "queue_full", text, headers={"Retry-After": str(RETRY_SECONDS)})


def _digest(body: Body) -> str:
    """SHA-256 of all that was asked for."""
    plain = body.video.model_dump(mode="json", exclude={*FILES})
    files = {name: hashlib.sha256(data).hexdigest() for name, data in body.uploads.items()}
    return hashlib.sha256(json.dumps([plain, files, body.urls]).encode()).hexdigest()


async def _check(
    service: Service,
    body: Body,
    owner: str,
    idempotency_key: str | None,
    digest: str,
    *,
    wants_memory: bool,
) -> _Checked:
    """Write the uploads and let them be checked; after an error nothing is left of them."""
    order = make_order(service, body)
    id = new_id()
    folder = JobFolder(service.data_dir.incoming / id)
    try:
        await _write_uploads(service, body, folder)
        answer = await service.checker.ask(
            folder=str(folder.path), order=order.to_json(), wants_memory=wants_memory
        )
        if "error" in answer:
            is_fault = answer["code"] == "internal_error"
            param = answer.get("param")
            if param == "num_frames" and body.video.seconds is not None:
                param = "seconds"
            raise ApiError(500 if is_fault else 400, answer["code"], answer["error"], param=param)
    except BaseException:
        shutil.rmtree(folder.path, ignore_errors=True)
        raise
    facts: dict[str, Any] = answer["facts"]
    new = NewJob(
        id=id,
        owner=owner,
        idempotency_key=idempotency_key,
        body_sha256=digest,
        model=order.model,
        prompt=order.prompt,
        order_json=order.to_json(),
        seed=order.seed,
        seconds=_say_seconds(body.video, facts),
        **facts,
    )
    return _Checked(new=new, folder=folder, memory_bytes=answer.get("memory_bytes"))


async def _write_uploads(service: Service, body: Body, folder: JobFolder) -> None:
    if "input_reference" not in body.uploads.keys() | body.urls.keys():
        raise ApiError(
            400,
            "missing_field",
            "input_reference is missing: send the photo",
            param="input_reference",
        )
    folder.path.mkdir(mode=0o700)
    limit = service.settings.limits.upload_bytes
    for name, path in (
        ("input_reference", folder.uploaded_photo),
        ("motion_reference", folder.uploaded_motion),
    ):
        content = body.uploads.get(name)
        if name in body.urls:
            try:
                content = await asyncio.to_thread(
                    fetch, body.urls[name], service.settings.url_hosts, limit
                )
            except InputError as error:
                raise ApiError(400, "invalid_url", f"{name}: {error}", param=name) from None
        if content is not None:
            await asyncio.to_thread(path.write_bytes, content)


def make_order(service: Service, body: Body) -> ClipOrder:
    """Make the order of a request, with the defaults of the server.

    Raises:
        ApiError: An unknown model or LoRA.
    """
    video = body.video
    models = service.settings.model_names
    model = video.model if video.model is not None else next(iter(models))
    if model not in models:
        known = ", ".join(models)
        raise ApiError(
            400, "model_not_found", f"model {model!r} is not served; known: {known}", param="model"
        )
    asked = {name: getattr(video, name) for name in CHANGES}
    if video.size is not None:
        asked["width"], asked["height"] = map(int, video.size.split("x"))
    if video.seconds is not None:
        facts = service.checker.models[model]
        fps, multiple = video.fps or facts["default_fps"], facts["frame_multiple"]
        asked["num_frames"] = max(1, round(video.seconds * fps / multiple)) * multiple + 1
    return ClipOrder(
        model=model,
        prompt=video.prompt,
        seed=draw_seed() if video.seed in (None, -1) else int(video.seed or 0),
        changes=expand_shorthands(asked),
        fit=video.fit,
        background=video.background,
        loras=tuple(_find_lora(service, lora) for lora in video.loras if isinstance(lora, Lora)),
        truncate_prompt=video.truncate_prompt,
        has_motion="motion_reference" in body.uploads.keys() | body.urls.keys(),
    )


def _find_lora(service: Service, lora: Lora) -> LoraSource:
    files = service.settings.loras
    if lora.name not in files:
        known = ", ".join(files) or "none"
        raise ApiError(
            400, "lora_not_found", f"LoRA {lora.name!r} is not there; known: {known}", param="loras"
        )
    return LoraSource(path=str(files[lora.name]), strength=lora.strength, stage=lora.stage)


def _say_seconds(video: VideoRequest, facts: dict[str, Any]) -> str:
    seconds = video.seconds or facts["num_frames"] / facts["fps"]
    return f"{seconds:.4g}"
