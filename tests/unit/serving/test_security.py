"""Each attack that the server is made to withstand, tried."""

import http.server
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from swifti2v.errors import InputError
from swifti2v.media import load_image
from swifti2v.serving.checking import Answer, answer_side_by_side
from swifti2v.serving.fetching import fetch, is_public
from swifti2v.serving.keys import Keys
from swifti2v.serving.settings import Limits
from swifti2v.storage import only_user
from tests.helpers.command_line import swifti2v
from tests.helpers.serving import NoWorker, form, ok, photo, refusal, serve


@pytest.fixture(scope="module")
def live(model, tmp_path_factory):
    limits = Limits(upload_bytes=200_000)
    with serve(model, tmp_path_factory.mktemp("data"), limits=limits, worker=NoWorker) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_no_key_is_lost_where_two_programs_change_them(tmp_path):
    path = tmp_path / "keys.json"
    first, second = Keys(path), Keys(path)  # both have read it
    alice, bob = first.add("alice"), second.add("bob")
    assert [Keys(path).find(key) for key in (alice, bob)] == ["alice", "bob"]
    assert path.stat().st_mode & 0o777 == 0o600
    with only_user(path.with_suffix(".lock"), "held"), pytest.raises(InputError, match="try again"):
        first.revoke("bob")
    first.revoke("bob")
    with pytest.raises(InputError, match="known: alice"):
        second.revoke("bob")


@pytest.mark.slow
def test_keys_are_needed_and_show_only_their_own_jobs(model, tmp_path):
    keys = Keys(tmp_path / "keys.json")
    alice, bob = keys.add("alice"), keys.add("bob")
    assert alice not in (tmp_path / "keys.json").read_text()
    with serve(model, tmp_path, limits=Limits(jobs_per_key=1), worker=NoWorker) as live:
        for headers in ({}, bearer("sk-swifti2v-wrong"), {"Authorization": f"Basic {alice}"}):
            for path in ("/v1/videos", "/v1/models", "/metrics"):
                response = live.client.get(path, headers=headers)
                assert (response.status_code, refusal(response)["code"]) == (401, "invalid_api_key")
        assert ok(live.client.get("/health"))
        video = ok(live.client.post("/v1/videos", headers=bearer(alice), **form()))
        full = live.client.post("/v1/videos", headers=bearer(alice), **form())
        assert (full.status_code, full.headers["retry-after"]) == (429, "5")
        assert ok(live.client.get(video["polling_url"], headers=bearer(alice))) == video
        for method, end in (("GET", ""), ("GET", "/content"), ("GET", "/stream"), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", "")):  # fmt: skip
            path = video["polling_url"] + end
            assert live.client.request(method, path, headers=bearer(bob)).status_code == 404
        assert ok(live.client.get("/v1/videos", headers=bearer(bob)))["data"] == []
        other = ok(live.client.post("/v1/videos", headers=bearer(bob), **form()))
        assert other["id"] != video["id"]


def test_a_host_other_than_this_machine_needs_a_key(tmp_path):
    result = swifti2v("serve", "--host", "0.0.0.0", "--data-dir", tmp_path / "data")
    assert result.exit_code == 1
    assert "there is no API key: make one with swifti2v serve --new-key NAME" in result.stderr
    key = swifti2v("serve", "--new-key", "alice", "--data-dir", tmp_path / "data").stdout.strip()
    assert Keys(tmp_path / "data/keys.json").find(key) == "alice"
    assert (
        swifti2v("serve", "--revoke-key", "alice", "--data-dir", tmp_path / "data").exit_code == 0
    )
    assert not Keys(tmp_path / "data/keys.json")


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": "evil.example"}, "invalid_host"),  # DNS rebinding
        ({"Host": ""}, "invalid_host"),
        ({"Origin": "https://evil.example"}, "foreign_origin"),
        ({"Origin": "null"}, "foreign_origin"),
        ({"Origin": "http://[no-address"}, "foreign_origin"),
        ({"Sec-Fetch-Site": "cross-site"}, "foreign_origin"),
    ],
)
def test_pages_of_other_sites_reach_nothing(live, headers, code):
    before = live.files()
    response = live.client.post("/v1/videos", headers=headers, **form())
    assert refusal(response)["code"] == code
    assert live.files() == before
    assert "access-control-allow-origin" not in response.headers


def test_a_cluster_may_ask_for_health_by_address(live):
    assert ok(live.client.get("/health", headers={"Host": "10.1.2.3:8000"}))["worker"]


def test_its_own_page_may_ask(live):
    headers = {"Origin": live.url, "Sec-Fetch-Site": "same-origin"}
    video = ok(live.client.post("/v1/videos", headers=headers, **form()))
    ok(live.client.delete(video["polling_url"], headers=headers))


def test_every_answer_carries_security_headers(live):
    for path in ("/v1/videos", "/health", "/nothing", "/openapi.json"):
        headers = live.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-frame-options"] == "DENY"


def test_a_body_over_the_limit_is_refused_whatever_it_says_of_its_length(live):
    before = live.files()
    noise = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
    said = live.client.post("/v1/videos", **form(input_reference=noise))
    assert (said.status_code, refusal(said)["code"]) == (413, "too_large")
    request = live.client.build_request("POST", "/v1/videos", **form(input_reference=noise))
    content = request.read()
    pieces = (content[i : i + 9999] for i in range(0, len(content), 9999))
    headers = {"content-type": request.headers["content-type"]}
    try:
        untold = live.client.post("/v1/videos", content=pieces, headers=headers)
    except httpx.WriteError:  # it hung up on us, which is as good
        pass
    else:
        assert untold.status_code == 413
    assert live.files() == before


def test_a_client_that_hangs_up_midway_leaves_no_traceback(live, caplog):
    before = live.files()
    address = live.url.removeprefix("http://").split(":")
    for kind in ("application/json", "multipart/form-data; boundary=x"):
        with socket.create_connection((address[0], int(address[1]))) as client:
            head = f"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
            client.sendall(f"{head}Content-Length: 1000\r\n\r\n--x".encode())
    ok(live.client.post("/v1/videos/estimate", **form()))
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert live.files() == before


def test_no_path_of_a_client_reaches_the_disk(live):
    for name in ("../../escape.png", "/tmp/escape.png", "a\0b.png"):
        files = {"input_reference": (name, photo())}
        video = ok(live.client.post("/v1/videos", data={"prompt": "zoom"}, files=files))
        folder = live.service.data_dir.job(video["id"]).path
        assert {path.name for path in folder.iterdir()} == {"photo.png"}
        ok(live.client.delete(video["polling_url"]))
    for id in ("..%2f..%2fjobs.sqlite", "../jobs.sqlite", "%2e%2e"):
        assert live.client.get(f"/v1/videos/{id}/content").status_code in (404, 405)


def test_what_a_photo_says_of_its_owner_is_not_kept(live):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x010F] = "Secret Camera"
    Image.open(io.BytesIO(photo())).save(buffer, "JPEG", exif=exif, comment=b"Secret Place")
    video = ok(live.client.post("/v1/videos", **form(input_reference=buffer.getvalue())))
    kept = live.service.data_dir.job(video["id"]).photo
    assert b"Secret" not in kept.read_bytes()
    (live.service.data_dir.path / "sent.jpg").write_bytes(buffer.getvalue())
    sent = load_image(live.service.data_dir.path / "sent.jpg")
    np.testing.assert_array_equal(np.asarray(load_image(kept)), np.asarray(sent))


def test_prompts_are_not_logged(live, caplog):
    with caplog.at_level("DEBUG", logger="swifti2v"):
        ok(live.client.post("/v1/videos", **form(prompt="pan SECRET")))
    assert "is queued" in caplog.text
    assert "SECRET" not in caplog.text


def ask(
    function: Callable[[Mapping[str, Any]], Answer], questions: list[dict[str, Any]], limits: Limits
) -> dict[int, Answer]:
    """Answers by number, in the order in which they came."""
    reader, writer = os.pipe()
    lines = [json.dumps({**question, "number": n}) for n, question in enumerate(questions)]
    os.write(writer, "".join(f"{line}\n" for line in lines).encode())
    answers = dict(islice(answer_side_by_side(reader, function, limits), len(lines)))
    os.close(reader)
    os.close(writer)
    return answers


def lasting(question: Mapping[str, Any]) -> Answer:
    time.sleep(question["seconds"])
    return Answer(error="")


def test_a_request_that_takes_long_to_check_holds_up_no_other():
    questions = [{"seconds": seconds} for seconds in (0.4, 0.2, 0)]
    assert list(ask(lasting, questions, Limits())) == [2, 1, 0]


def hungry(_: Mapping[str, Any]) -> Answer:
    return Answer(error=str(len(bytearray(2**30))))


def slow(_: Mapping[str, Any]) -> Answer:
    while True:
        pass


def crashing(_: Mapping[str, Any]) -> Answer:
    os.kill(os.getpid(), signal.SIGKILL)
    return Answer()


@pytest.mark.slow
@pytest.mark.parametrize("function", [hungry, slow, crashing])
def test_a_file_that_takes_too_much_or_crashes_its_decoder_hurts_nobody(function):
    started = time.monotonic()
    [found] = ask(function, [{}], Limits(check_seconds=1, check_bytes=100 * 2**20)).values()
    assert found["code"] == "invalid_media"
    assert time.monotonic() - started < 30


def failing(_: Mapping[str, Any]) -> Answer:
    raise RuntimeError("a fault of ours")


def test_a_fault_of_the_checker_is_no_fault_of_the_file(capfd):
    assert ask(failing, [{}], Limits())[0]["code"] == "internal_error"
    assert "a fault of ours" in capfd.readouterr().err


def test_the_server_process_loads_no_decoder_and_no_torch():
    code = (
        "import sys, swifti2v.serving.app; "
        "sys.exit(bool({'torch', 'PIL', 'av', 'cv2', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "::1",
     "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "224.0.0.1"],
)  # fmt: skip
def test_private_addresses_are_known(address):
    assert not is_public(address)


def test_public_addresses_are_known():
    assert all(is_public(address) for address in ("1.1.1.1", "2606:4700::1111", "64:ff9b::101:101"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://localhost:1/a.png", "localhost is in a private network"),
        ("http://user@localhost/a.png", "without a user name"),
        ("file:///etc/passwd", "must be http or https"),
        ("http://evil.example/a.png", "URLs of evil.example are not allowed"),
        ("http://localhost:x/", "the URL cannot be read"),
    ],
)
def test_urls_lead_nowhere_private(url, words):
    with pytest.raises(InputError, match=words):
        fetch(url, ["localhost"], 1000)


class Redirecting(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/photo.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 100)
        else:
            self.send_response(302)
            self.send_header(
                "Location", {"/evil": "http://evil.example/"}.get(self.path, self.path)
            )
            self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_redirects_are_judged_like_the_first_url(monkeypatch):
    monkeypatch.setattr("swifti2v.serving.fetching.is_public", lambda address: True)
    with http.server.HTTPServer(("127.0.0.1", 0), Redirecting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://localhost:{server.server_port}"
        try:
            assert fetch(f"{url}/photo.png", ["localhost"], 100) == b"x" * 100
            for path, words in (
                ("/photo.png", "over 0 MB"),
                ("/evil", "URLs of evil.example are not allowed"),
                ("/loop", "redirected more than 3 times"),
            ):
                with pytest.raises(InputError, match=words):
                    fetch(url + path, ["localhost"], 99)
        finally:
            server.shutdown()
