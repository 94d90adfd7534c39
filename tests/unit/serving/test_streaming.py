"""What is seen of a video while it is made."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.helpers.serving import Live


def follow(live: Live, id: str, **headers: str) -> Iterator[tuple[str, Any, str | None]]:
    """Events of a job: name, data and id."""
    with live.client.stream("GET", f"/v1/videos/{id}/events", headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in response.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                yield fields["event"], json.loads(fields["data"]), fields.get("id")
                fields = {}


def stream(live: Live, id: str, delay: float = 0) -> bytes:
    """The stream of a job, read slowly or late."""
    content = b""
    with live.client.stream("GET", f"/v1/videos/{id}/stream") as response:
        assert response.headers["content-type"] == "video/mp4"
        for piece in response.iter_raw(4096):
            content += piece
            time.sleep(delay)
    return content


def decode(content: bytes) -> Any:
    with av.open(io.BytesIO(content), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def boxes(content: bytes) -> list[bytes]:
    """Types of the outermost boxes of an MP4."""
    found, position = [], 0
    while position < len(content):
        size = int.from_bytes(content[position : position + 4], "big")
        found.append(content[position + 4 : position + 8])
        position += size
    return found


@pytest.mark.slow
def test_early_late_and_slow_readers_get_the_same_fragments(live):
    id = live.submit(num_inference_steps=10)["id"]
    read: dict[str, bytes] = {}
    readers = [
        threading.Thread(target=lambda n=name, d=delay: read.update({n: stream(live, id, d)}))
        for name, delay in (("early", 0.0), ("slow", 0.05))
    ]
    for reader in readers:
        reader.start()
    video = live.finish(id)
    for reader in readers:
        reader.join()
    late = stream(live, id)
    assert video["status"] == "completed"
    assert read == {"early": late, "slow": late}
    kinds = boxes(late)
    assert kinds[:2] == [b"ftyp", b"moov"]
    assert kinds[2:] == [b"moof", b"mdat"] * (len(kinds[2:]) // 2)
    assert len(kinds[2:]) // 2 >= video["segments_total"]
    np.testing.assert_array_equal(decode(late), decode(live.client.get(f"{video['polling_url']}/content").content))  # fmt: skip


@pytest.mark.slow
def test_the_first_segment_comes_long_before_the_video_is_complete(live):
    id = live.submit(num_inference_steps=100)["id"]
    with live.client.stream("GET", f"/v1/videos/{id}/stream") as response:
        first = next(response.iter_raw())
        state = live.get(id)
    assert first[4:8] == b"ftyp"
    assert (state["status"], state["segments_done"]) == ("in_progress", 1)
    live.client.delete(f"/v1/videos/{id}")


def test_a_reader_that_does_not_read_holds_nobody_up(live):
    id = live.submit()["id"]
    with live.client.stream("GET", f"/v1/videos/{id}/stream"):
        assert live.finish(id)["status"] == "completed"


def test_events_show_every_preview_once_and_end_with_the_job(live):
    id = live.submit(num_inference_steps=5)["id"]
    events = list(follow(live, id))
    previews = [(data["name"], data["segment"]) for name, data, _ in events if name == "preview"]
    assert previews == [("stage1", None), *(("segment", i) for i in range(4))]
    picture = next(data for name, data, _ in events if name == "preview")["image"]
    image = Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2])))
    assert image.format == "JPEG"
    progress = [data["progress"] for name, data, _ in events if name == "progress"]
    assert progress == sorted(progress)
    name, data, _ = events[-1]
    assert (name, data["status"]) == ("done", "completed")

    late = list(follow(live, id, **{"Last-Event-ID": "3"}))
    assert [data["segment"] for name, data, _ in late if name == "preview"] == [2, 3]
    assert [number for name, _, number in late if name == "preview"] == ["4", "5"]


def test_followers_of_a_deleted_job_are_let_go(live):
    id = live.submit(num_inference_steps=100)["id"]
    events = follow(live, id)
    next(events)
    live.client.delete(f"/v1/videos/{id}")
    assert [name for name, _, _ in events][-1] == "done"
