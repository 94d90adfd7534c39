"""A video and the events of its making, followed while the worker writes them.

Readers read files and the database: however slow they are, the worker does not notice.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from swifti2v.serving.clip_order import JobFolder
from swifti2v.serving.service import TICK_SECONDS, Service

PIECE_BYTES = 256 * 1024
PING_SECONDS = 15.0


async def stream_fragments(service: Service, id: str) -> AsyncIterator[bytes]:
    """Fragmented MP4 from its first byte, until the job has ended.

    A worker that continues a job writes the same bytes again, so the place in the file stays good.
    """
    path = service.data_dir.job(id).stream
    file: BinaryIO | None = None
    with ExitStack() as stack:
        while True:
            job = service.store.find(id)  # before reading: what is written until its end is read
            if file is None and path.exists():
                file = stack.enter_context(path.open("rb"))
            while file and (piece := await asyncio.to_thread(file.read, PIECE_BYTES)):
                yield piece
            if job is None or job.has_ended or service.is_stopping():
                return
            await asyncio.sleep(TICK_SECONDS)


async def stream_events(service: Service, id: str, num_seen: int) -> AsyncIterator[bytes]:
    """Server-Sent Events until the job has ended.

    Args:
        service: The server's parts.
        id: Of the job.
        num_seen: Previews that the client has.
    """
    folder, last, said_at = service.data_dir.job(id), None, time.monotonic()
    while not service.is_stopping():
        job = service.store.find(id)  # before the previews: those made until its end are read
        video = service.show(job) if job is not None else None
        if video is not None and video != last:
            last, said_at = video, time.monotonic()
            yield _event("progress", video.model_dump_json())
        for preview in await asyncio.to_thread(_read_previews, folder, num_seen):
            num_seen += 1
            yield _event("preview", json.dumps(preview), num_seen)
        if job is None or job.has_ended:
            yield _event("done", video.model_dump_json() if video is not None else "null")
            return
        await asyncio.sleep(TICK_SECONDS)
        if time.monotonic() - said_at > PING_SECONDS:
            said_at = time.monotonic()
            yield KEEPALIVE_COMMENT


def _read_previews(folder: JobFolder, num_seen: int) -> list[dict[str, Any]]:
    """Previews beyond those seen: Stage I's clip if there is one, then each segment."""
    found: list[tuple[str, int | None, Path]] = []
    if folder.stage1_preview.exists():
        found.append(("stage1", None, folder.stage1_preview))
    for index in count():
        path = folder.segment_preview(index)
        if not path.exists():
            break
        found.append(("segment", index, path))
    return [
        {"name": name, "segment": index, "image": _data_url(path)}
        for name, index, path in found[num_seen:]
    ]


def _data_url(path: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _event(name: str, data: str, id: int | None = None) -> bytes:
    return format_sse_event(event=name, data_str=data, id=None if id is None else str(id))
