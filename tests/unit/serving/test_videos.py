"""The API as clients use it: the openai package, plain forms and JSON."""

import base64
from fractions import Fraction

import av
import pytest
from openai import OpenAI

from swifti2v.jobs.settings import read_settings
from swifti2v.serving.settings import Limits
from tests.helpers import foreign_clips
from tests.helpers.command_line import (
    assert_same_frames,
    generate,
    save_clip,
    save_lora,
    succeed,
)
from tests.helpers.evaluation_clips import panning_clip
from tests.helpers.serving import NoWorker, form, full_disk, ok, photo, refusal, serve, wait
from tests.helpers.tiny import NUM_FRAMES, SIZE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of client.videos


@pytest.fixture
def client(live):
    with OpenAI(base_url=f"{live.url}/v1", api_key="any") as client:
        yield client


@pytest.mark.slow
def test_the_openai_package_makes_the_video_that_the_command_line_makes(client, model, tmp_path):
    (tmp_path / "photo.png").write_bytes(photo())
    video = client.videos.create_and_poll(
        prompt="zoom",
        model="tiny",
        seconds="1",
        size=f"{SIZE}x{SIZE}",
        input_reference=tmp_path / "photo.png",
        extra_body={"seed": 7},
    )
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.object, video.model, video.seconds, video.size) == ("video", "tiny", "1", "64x64")
    client.videos.download_content(video.id).write_to_file(tmp_path / "served.mp4")
    succeed(generate(model, tmp_path / "photo.png", tmp_path / "alone.mp4"))
    assert_same_frames(tmp_path / "served.mp4", tmp_path / "alone.mp4")
    served = read_settings(tmp_path / "served.mp4")
    assert (served.image.path, served.model) == ("input_reference", "tiny")  # no path of the server
    alone = read_settings(tmp_path / "alone.mp4").image.sha256
    assert served.image.sha256 == alone
    assert video.id in [each.id for each in client.videos.list(limit=3).data]
    assert client.videos.delete(video.id).deleted
    with pytest.raises(Exception, match="there is no such video"):
        client.videos.retrieve(video.id)


@pytest.mark.slow
def test_json_with_a_data_url_and_a_form_with_brackets_ask_for_the_same(live):
    url = "data:image/png;base64," + base64.b64encode(photo()).decode()
    sent = {"prompt": "zoom", "seed": 7, "num_frames": 9}
    bodies = (
        {"json": {**sent, "input_reference": {"image_url": url}}},
        {"json": {**sent, "input_reference": url, "num_frames": "9"}},
        {"files": {"input_reference[image_url]": (None, url), **{k: (None, str(v)) for k, v in sent.items()}}},
        form(num_frames=9),
    )  # fmt: skip
    made = [live.finish(ok(live.client.post("/v1/videos", **body))["id"]) for body in bodies]
    contents = {live.client.get(f"{video['polling_url']}/content").content for video in made}
    assert [video["status"] for video in made] == ["completed"] * 4
    assert len(contents) == 1


def test_a_finished_video_tells_what_it_took(live):
    video = live.finish(live.submit()["id"])
    assert (video["segments_done"], video["segments_total"]) == (4, 4)
    assert (video["num_frames"], video["seed"], video["size"]) == (NUM_FRAMES, 7, f"{SIZE}x{SIZE}")
    assert {"stage1", "stage2", "decode", "total"} <= video["stage_seconds"].keys()
    assert video["peak_memory_bytes"] > 0
    assert video["expires_at"] == video["completed_at"] + live.settings.limits.keep_seconds
    assert video["stage"] is video["queue_position"] is video["eta_seconds"] is None
    kinds = {
        variant: live.client.get(f"{video['polling_url']}/content", params={"variant": variant})
        for variant in ("video", "thumbnail", "spritesheet")
    }
    assert [each.headers["content-type"] for each in kinds.values()] == [
        "video/mp4", "image/jpeg", "image/png",
    ]  # fmt: skip
    part = live.client.get(f"{video['polling_url']}/content", headers={"Range": "bytes=0-1"})
    assert (part.status_code, len(part.content)) == (206, 2)
    live.rest()
    assert not live.service.data_dir.job(video["id"]).work.exists()


def test_progress_is_real_and_only_grows(live):
    id = live.submit(num_inference_steps=20)["id"]
    seen = [live.get(id)]
    while seen[-1]["status"] in ("queued", "in_progress"):
        seen.append(live.get(id))
    progress = [video["progress"] for video in seen]
    assert progress == sorted(progress)
    assert len({each for each in progress if 0 < each < 99}) > 3
    stages = list(dict.fromkeys(video["stage"] for video in seen if video["stage"]))
    assert [stage for stage in stages if stage != "loading"] == ["stage1", "stage2"]


@pytest.mark.slow
def test_progress_only_grows_where_the_stages_take_turns(live):
    prompts = '[[5, "b"], [13, "c"]]'
    id = live.submit(num_inference_steps=20, later_prompts=prompts)["id"]
    seen = [live.get(id)]
    while seen[-1]["status"] in ("queued", "in_progress"):
        seen.append(live.get(id))
    progress = [video["progress"] for video in seen]
    assert progress == sorted(progress)
    assert seen[-1]["status"] == "completed"
    assert len({each for each in progress if 0 < each < 99}) > 3


def test_an_own_clip_takes_the_place_of_stage_1(live, tmp_path):
    clip = save_clip(tmp_path / "clip.mkv", 9).read_bytes()
    video = live.finish(live.submit(motion_reference=clip)["id"])
    assert (video["status"], video["num_frames"], video["fps"]) == ("completed", 9, 8)
    assert video["stage_seconds"]["stage1"] == 0


def test_an_own_clip_keeps_its_sound_and_its_rate(live, tmp_path):
    clip = foreign_clips.save(
        tmp_path / "clip.mp4",
        9,
        rate=Fraction(30000, 1001),
        sound_seconds=0.3,
        frames=panning_clip(9, 1, 16, 16),
    )
    video = live.finish(live.submit(motion_reference=clip.read_bytes())["id"])
    content = live.client.get(f"{video['polling_url']}/content").content
    (tmp_path / "out.mp4").write_bytes(content)
    assert video["fps"] == pytest.approx(29.97, abs=1e-3)
    sounds = []
    for path in (clip, tmp_path / "out.mp4"):
        with av.open(path) as container:
            assert container.streams.video[0].average_rate == Fraction(30000, 1001)
            sounds.append([bytes(packet) for packet in container.demux(audio=0) if packet.size])
    assert 10 < len(sounds[1]) <= len(sounds[0])
    assert sounds[1] == sounds[0][: len(sounds[1])]


@pytest.mark.slow
def test_a_lora_changes_the_frames_and_its_folder_is_not_told(model, tmp_path):
    loras = tmp_path / "loras"
    loras.mkdir()
    save_lora(loras / "mine.safetensors")
    with serve(model, tmp_path / "data", lora_dir=loras) as live:
        videos = [live.finish(live.submit(**more)["id"]) for more in ({}, {"loras": "mine"})]
        plain, adapted = (live.client.get(f"{v['polling_url']}/content").content for v in videos)
        assert str(tmp_path) not in str(videos)
    assert plain != adapted
    (tmp_path / "adapted.mp4").write_bytes(adapted)
    assert [lora.path for lora in read_settings(tmp_path / "adapted.mp4").loras] == ["mine"]


def test_waiting_for_a_video_gives_the_file(live):
    response = live.client.post("/v1/videos/sync", **form(num_frames=9))
    assert response.headers["content-type"] == "video/mp4"
    assert response.headers["x-seed"] == "7"
    video = live.get(response.headers["x-video-id"])
    assert live.client.get(f"{video['polling_url']}/content").content == response.content


def test_an_estimate_stores_nothing(live):
    live.rest()
    before = live.files()
    found = ok(live.client.post("/v1/videos/estimate", **form(seconds=2)))
    assert (found["size"], found["num_frames"], found["seconds"]) == (f"{SIZE}x{SIZE}", 33, "2")
    assert found["memory_bytes"] > 0
    assert live.files() == before


def test_a_repeated_request_gives_the_same_job(live):
    header = {"headers": {"Idempotency-Key": "abc"}}
    first, second = (ok(live.client.post("/v1/videos", **form(seed=-1), **header)) for _ in "ab")
    assert first["id"] == second["id"]
    other = live.client.post("/v1/videos", **form(seed=3), **header)
    assert (other.status_code, refusal(other)["code"]) == (422, "idempotency_key_reused")


@pytest.mark.slow
def test_a_cancelled_job_frees_the_worker_within_two_steps_and_keeps_what_it_made(live):
    slow = live.submit(num_inference_steps=100, num_frames=33)["id"]
    wait(lambda: live.get(slow), lambda v: v["segments_done"] > 0)
    cancelled = ok(live.client.post(f"/v1/videos/{slow}/cancel"))
    assert cancelled["status"] == "cancelled"
    steps = live.service.store.find(slow).steps_done
    next_one = live.submit(num_frames=9)["id"]
    assert live.finish(next_one)["status"] == "completed"
    assert live.service.store.find(slow).steps_done - steps <= 2
    assert live.get(slow)["status"] == "cancelled"
    assert live.client.get(f"/v1/videos/{slow}/content").content[4:8] == b"ftyp"
    assert ok(live.client.post(f"/v1/videos/{slow}/cancel"))["status"] == "cancelled"


@pytest.mark.slow
def test_a_deleted_job_is_gone_with_its_files_while_it_runs(live):
    slow = live.submit(num_inference_steps=100, num_frames=33)["id"]
    wait(lambda: live.get(slow), lambda v: v["segments_done"] > 0)
    gone = ok(live.client.delete(f"/v1/videos/{slow}"))
    assert gone == {"id": slow, "object": "video.deleted", "deleted": True}
    assert live.finish(live.submit(num_frames=9)["id"])["status"] == "completed"
    wait(live.files, lambda files: not any(slow in file for file in files))
    assert live.client.get(f"/v1/videos/{slow}").status_code == 404


@pytest.mark.slow
def test_a_full_queue_says_when_to_come_back(model, tmp_path):
    limits = Limits(queue_size=2, jobs_per_key=9)
    with serve(model, tmp_path, limits=limits, worker=NoWorker) as live:
        first, second = live.submit(), live.submit()
        assert [live.get(v["id"])["queue_position"] for v in (first, second)] == [0, 1]
        refused = live.client.post("/v1/videos", **form())
        assert (refused.status_code, refusal(refused)["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) > 0
        assert live.client.get("/ready").status_code == 503
        ok(live.client.delete(f"/v1/videos/{first['id']}"))
        assert live.get(second["id"])["queue_position"] == 0
        live.submit()
        assert len([f for f in live.files() if f.startswith("video_") and "/" not in f]) == 2


@pytest.mark.slow
def test_jobs_expire_with_their_files(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("swifti2v.serving.service.CLEANING_SECONDS", 0.05)
    with serve(model, tmp_path, limits=Limits(keep_seconds=1)) as live:
        id = live.submit(num_frames=9)["id"]
        assert live.finish(id)["status"] == "completed"
        with full_disk(live.service.store):
            wait(lambda: caplog.text, lambda text: "expired jobs cannot be forgotten" in text)
        wait(lambda: live.client.get(f"/v1/videos/{id}").status_code, lambda code: code == 404)
        wait(live.files, lambda files: not files)


def test_a_prompt_over_the_limit_is_cut_where_that_is_asked(model, tmp_path):
    with serve(model, tmp_path) as live:
        video = live.finish(live.submit(prompt="zoom " * 20, truncate_prompt=True)["id"])
    assert video["status"] == "completed"


def test_nothing_is_there_of_a_job_that_never_ran(model, tmp_path):
    with serve(model, tmp_path, worker=NoWorker) as live:
        path = f"/v1/videos/{live.submit()['id']}"
        assert refusal(live.client.get(f"{path}/content"))["code"] == "video_not_ready"
        live.client.post(f"{path}/cancel")
        for end in ("content", "stream", "content?variant=thumbnail"):
            response = live.client.get(f"{path}/{end}")
            assert (response.status_code, refusal(response)["code"]) == (404, "video_not_ready")


def test_lists_go_page_by_page(model, tmp_path):
    with serve(model, tmp_path, worker=NoWorker) as live:
        ids = [live.submit()["id"] for _ in range(3)]
        page = ok(live.client.get("/v1/videos", params={"limit": 2}))
        assert ([v["id"] for v in page["data"]], page["has_more"]) == ([ids[2], ids[1]], True)
        rest = ok(live.client.get("/v1/videos", params={"after": page["last_id"]}))
        assert ([v["id"] for v in rest["data"]], rest["has_more"]) == ([ids[0]], False)
        up = ok(live.client.get("/v1/videos", params={"order": "asc"}))
        assert [v["id"] for v in up["data"]] == ids


def test_the_server_tells_of_itself(live):
    assert ok(live.client.get("/health"))["status"] == "ok"
    assert ok(live.client.get("/ready"))["status"] == "ok"
    (found,) = ok(live.client.get("/v1/models"))["data"]
    assert (found["id"], found["default_size"], found["loras"]) == ("tiny", "64x64", [])
    assert (found["size_multiple"], found["frame_multiple"]) == (64, 4)
    assert (found["max_pixels"], found["max_num_frames"]) == (2560 * 1600, 1025)
    assert ok(live.client.get("/v1/models/tiny")) == found
    live.finish(live.submit(num_frames=9)["id"])
    text = live.client.get("/metrics").text
    assert 'swifti2v_jobs_ended_total{status="completed"}' in text
    assert 'swifti2v_http_requests_total{method="POST",route="/v1/videos",status="200"}' in text
    assert "swifti2v_worker_up 1.0" in text
