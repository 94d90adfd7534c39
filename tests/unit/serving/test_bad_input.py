"""What a client does wrong is answered in the command line's words, and leaves nothing behind."""

import errno
import io
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from swifti2v.serving.data_dir import find_storage_fault
from swifti2v.serving.settings import Limits
from tests.helpers.command_line import save_clip
from tests.helpers.serving import NoWorker, form, photo, refusal, serve

LIMITS = Limits(photo_pixels=1_000_000, video_pixels=512 * 512, video_frames=65, clip_frames=40)


@pytest.fixture(scope="module")
def live(model, tmp_path_factory):
    loras = tmp_path_factory.mktemp("loras")
    (loras / "mine.safetensors").write_bytes(b"")
    data = tmp_path_factory.mktemp("data")
    with serve(model, data, limits=LIMITS, worker=NoWorker, lora_dir=loras) as server:
        yield server


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.fromarray(np.full((64, 64), shade, np.uint8)) for shade in (0, 99, 200)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


JSON = {"content-type": "application/json"}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no photo": ({"input_reference": None}, "input_reference is missing"),
    "an empty photo": ({"input_reference": b""}, "image input_reference is empty (0 bytes)"),
    "a text": ({"input_reference": b"hello"}, "input_reference is not an image that can be read"),
    "half a photo": (
        {"input_reference": photo(format="JPEG", width=256)[:700]},
        "image input_reference is damaged or cut off",
    ),
    "an animation": ({"input_reference": animated()}, "holds 3 images (animated or many pages)"),
    "a see-through photo": (
        {"input_reference": photo(mode="RGBA")},
        "partly see-through; name a colour behind it (background white)",
    ),
    "a huge photo": (
        {"input_reference": photo(1001, 1000)},
        "input_reference is 1001x1000, over 1 megapixels",
    ),
    "a clip that is none": ({"motion_reference": b"hello"}, "motion_reference"),
    "a size that does not fit": ({"size": "100x64"}, "width 100"),
    "a size that is none": ({"size": "big"}, "size: 'big' is no size; write WIDTHxHEIGHT"),
    "a size that is too large": (
        {"size": "1024x512"},
        "size is 524288 pixels; this server makes at most 262144 pixels",
    ),
    "frames that do not fit": ({"num_frames": 12}, "num_frames 12"),
    "too few frames": ({"num_frames": 1}, "num_frames is 1; it must be at least 5"),
    "too many frames": ({"num_frames": 401}, "num_frames is 401; this server makes at most 65"),
    "a prompt between two latent frames": (
        {"later_prompts": '[[10, "b"]]'},
        "later_prompts has 10, which is not 4k + 1; the nearest are 9 and 13",
    ),
    "two lengths": ({"num_frames": 9, "seconds": 1}, "seconds and num_frames are both given"),
    "too many seconds": ({"seconds": 60}, "num_frames is 961; this server makes at most 65"),
    "seconds that are no number": ({"seconds": "nan"}, "seconds: Input should be a finite number"),
    "a size of nothing": ({"size": "0x64"}, "size: '0x64' is no size; write WIDTHxHEIGHT"),
    "an empty segment": ({"segment_size": 0}, "segment_size is 0; it must be at least 1"),
    "a negative prompt that is too long": (
        {"negative_prompt": "zoom " * 20},
        "tokens, the limit is 24: shorten it",
    ),
    "a later prompt that is too long": (
        {"later_prompts": f'[[9, "{"zoom " * 20}"]]'},
        "tokens, the limit is 24: shorten it",
    ),
    "a later prompt beyond the end": (
        {"later_prompts": '[[1001, "b"]]'},
        "frame 1001, but the last of 17 frames",
    ),
    "a length below 0": ({"seconds": -1}, "seconds: Input should be greater than 0"),
    "a rate that is none": ({"fps": 0}, "fps is 0; it must be between 1 and 240"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps: Input should be greater than"),
    "too many steps": ({"num_inference_steps": 500}, "num_inference_steps is 500; this server"),
    "a prompt that is too long": (
        {"prompt": "zoom " * 20},
        "tokens, the limit is 24: shorten it, or cut it with truncate_prompt",
    ),
    "a strip of a photo": (
        {"input_reference": photo(500, 1)},
        "500x1 is over 10 times as long as it is wide or high: crop it, or give size",
    ),
    "a seed below -1": ({"seed": -2}, "seed: Input should be greater than or equal to -1"),
    "an unknown field": ({"num_frame": 9}, "num_frame: there is no such field"),
    "an unknown model": ({"model": "sora-2"}, "model 'sora-2' is not served; known: tiny"),
    "an unknown LoRA": ({"loras": "../mine"}, "LoRA '../mine' is not there; known: mine"),
    "a colour that is none": (
        {"background": "mauvish"},
        "background 'mauvish' is not an opaque colour",
    ),
    "another fit": ({"fit": "stretch"}, "fit: Input should be 'crop' or 'pad'"),
}


PARAMS = {
    "a strip of a photo": "size",
    "two lengths": None,
}
"""Named in the error; by default the field of the case."""


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_and_nothing_stays(live, case):
    fields, words = CASES[case]
    response = live.client.post("/v1/videos", **form(**fields))
    error = refusal(response)
    assert response.status_code == 400
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert str(live.service.data_dir.path) not in response.text
    assert "--" not in error["message"]
    assert "stage" not in error["message"]
    assert error["param"] == PARAMS.get(case, next(iter(fields)))
    assert live.files() == set()
    assert live.client.get("/v1/videos").json()["data"] == []


@pytest.mark.parametrize(
    "twice",
    [
        [("input_reference", ("a.png", photo())), ("input_reference", ("b.png", photo()))],
        [("input_reference", ("a.png", photo())), ("input_reference", (None, "data:,"))],
        [("input_reference", (None, "data:,")), ("input_reference[image_url]", (None, "data:,"))],
        [("loras", (None, '["mine"]')), ("loras", (None, "mine"))],
        [("prompt", (None, "zoom")), ("prompt", (None, "pan"))],
    ],
)
def test_a_field_that_is_given_twice_is_refused(live, twice):
    error = refusal(live.client.post("/v1/videos", files=[("prompt", (None, "zoom")), *twice]))
    assert error["message"] == f"{error['param']}: it is given twice"
    assert error["param"] == twice[0][0]
    assert live.files() == set()


def test_a_photo_and_a_clip_in_one_reference_are_refused(live):
    both = {"image_url": "data:,", "video_url": "data:,"}
    sent = {"prompt": "zoom", "input_reference": both}
    error = refusal(live.client.post("/v1/videos", json=sent))
    assert (error["param"], error["message"][-17:]) == ("input_reference", "it is given twice")


def test_a_list_after_an_unknown_job_names_its_field(live):
    response = live.client.get("/v1/videos", params={"after": "nobody"})
    assert (response.status_code, refusal(response)["param"]) == (404, "after")


def test_a_clip_that_is_too_long_or_too_short(live, tmp_path):
    for num_frames, words in ((41, "has 41 frames, over 40"), (4, "at least 5 are needed")):
        clip = save_clip(tmp_path / f"{num_frames}.mkv", num_frames).read_bytes()
        error = refusal(live.client.post("/v1/videos", **form(motion_reference=clip)))
        assert words in error["message"]
        assert live.files() == set()


def test_a_full_disk_is_told_in_a_line(live, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    response = live.client.post("/v1/videos", **form())
    assert (response.status_code, response.json()["error"]["code"]) == (507, "storage_failed")
    assert "No space left on device" in response.json()["error"]["message"]
    assert "Traceback" not in caplog.text
    assert live.files() == set()


def test_a_database_that_cannot_grow_is_a_full_disk(tmp_path):
    with closing(sqlite3.connect(tmp_path / "a.sqlite")) as database:
        database.execute("CREATE TABLE t (x)")
        database.execute("PRAGMA max_page_count = 3")
        with pytest.raises(sqlite3.OperationalError) as caught:
            database.execute("INSERT INTO t VALUES (?)", (b"x" * 100_000,))
    assert find_storage_fault(caught.value) == "database or disk is full"
    assert find_storage_fault(sqlite3.OperationalError("no such table")) is None
    assert find_storage_fault(FileNotFoundError()) is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"content": b"{", "headers": JSON}, "the body is not JSON"),
        ({"content": b'{"prompt":' + b"[" * 5000, "headers": JSON}, "the body is not JSON"),
        ({"content": b'{"prompt": "\\ud800"}', "headers": JSON}, "the body is not JSON"),
        ({"json": {"prompt": "a", "loras": "[" * 5000}}, "is not there; known: mine"),
        ({"json": [1]}, "the body is not a JSON object"),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, "send application/json"),
        ({"json": {"input_reference": "data:,"}}, "prompt: Field required"),
        ({"json": {"prompt": "a", "input_reference": "/etc/passwd"}}, "send a file, or a URL"),
        ({"json": {"prompt": "a", "input_reference": "data:image/png;base64,???"}}, "not base64"),
        ({"json": {"prompt": "a", "input_reference": {"file_id": "x"}}}, "there is no file store"),
        ({"json": {"prompt": "a", "input_reference": "http://a.org/b.png"}}, "URLs of a.org are not"),
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_read(live, body, words):
    assert words in refusal(live.client.post("/v1/videos", **body))["message"]
    assert live.files() == set()


@pytest.mark.slow
def test_a_job_that_fails_is_told_with_its_reason(model, tmp_path):
    loras = tmp_path / "loras"
    loras.mkdir()
    (loras / "broken.safetensors").write_bytes(b"no weights")
    with serve(model, tmp_path / "data", lora_dir=loras) as live:
        video = live.finish(live.submit(loras="broken")["id"])
        assert video["status"] == "failed"
        assert video["error"]["code"] == "loading_failed"
        assert "broken.safetensors" in video["error"]["message"]
        assert str(loras) not in video["error"]["message"]
        sync = live.client.post("/v1/videos/sync", **form(loras="broken"))
        assert (sync.status_code, refusal(sync)["code"]) == (422, "loading_failed")
        assert live.finish(live.submit(num_frames=9)["id"])["status"] == "completed"


def test_an_empty_idempotency_key_is_none(live):
    answer = live.client.post("/v1/videos", headers={"Idempotency-Key": ""}, **form())
    assert "at least 1 character" in refusal(answer)["message"]


def test_a_guidance_that_no_number_type_holds_is_refused(live):
    answer = live.client.post("/v1/videos", **form(guidance_scale=1e308))
    assert "guidance_scale" in refusal(answer)["message"]


@pytest.mark.parametrize(
    "path", ["/", "/page.css", "/health", "/ready", "/v1/videos", "/v1/models"]
)
def test_the_head_of_an_answer_may_be_asked_for(live, path):
    whole, head = live.client.get(path), live.client.head(path)
    assert (head.status_code, head.content) == (whole.status_code, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
