"""``swifti2v evaluate`` on procedural clips."""

import contextlib
import csv
import json
import re
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swifti2v.evaluation.clips.offline import METRICS
from swifti2v.media import VideoWriter, open_writer, read_clip, read_metadata
from tests.helpers import foreign_clips
from tests.helpers.command_line import error_line, generate, save_photo, succeed, swifti2v
from tests.helpers.evaluation_clips import Frames, blurred, flickering, panning_clip, with_seam
from tests.helpers.tiny import NUM_FRAMES, SIZE


def save(path: Path, clip: Frames, fps: float = 16) -> Path:
    path.parent.mkdir(exist_ok=True)
    with open_writer(path, height=clip.shape[1], width=clip.shape[2], fps=fps, codec="ffv1") as to:
        to.write(clip)
    return path


@pytest.fixture(scope="module")
def clip() -> Frames:
    return panning_clip(17)


@pytest.mark.slow
def test_a_clip_against_itself_is_perfect(tmp_path, clip):
    video = save(tmp_path / "a.mkv", clip)
    photo = tmp_path / "a.png"
    Image.fromarray(clip[0]).save(photo)
    result = succeed(
        swifti2v(
            "evaluate", video, "--image", photo, "--reference", video, "--motion-reference",
            video, "--segment-starts", "1,9", "--json",
        )
    )  # fmt: skip
    values = json.loads(result.stdout)
    assert {metric.name for metric in METRICS} <= values.keys()
    assert [values[name] for name in ("psnr", "first_frame_psnr", "stage_agreement")] == [60] * 3
    for name in ("ssim", "first_frame_ssim", "detail_coherence"):
        assert values[name] == pytest.approx(1, abs=1e-5)
    assert values["seam_score"] == pytest.approx(1, abs=0.15)
    assert values["segment_starts"] == [1, 9]
    assert values["hf_energy_ratio"] == pytest.approx(1, abs=0.15)
    assert values["cadence"] == pytest.approx(1, abs=0.05)
    assert values["carried_coherence"] > 0.9
    assert values["blockiness"] == pytest.approx(1, abs=0.05)
    assert values["ms_ssim"] is None
    assert "161" in values["not_measured"]["ms_ssim"]
    assert (values["num_frames"], values["width"], values["height"]) == (17, 160, 96)


@pytest.mark.slow
def test_planted_defects_move_their_metrics(tmp_path, clip):
    def measure(name: str, frames: Frames) -> dict[str, float]:
        video = save(tmp_path / f"{name}.mkv", frames)
        options = ("--reference", tmp_path / "clean.mkv", "--segment-starts", "9", "--json")
        values: dict[str, float] = json.loads(succeed(swifti2v("evaluate", video, *options)).stdout)
        return values

    clean = measure("clean", clip)
    blur, seam = measure("blur", blurred(clip, 1.5)), measure("seam", with_seam(clip, 9, 8))
    flicker = measure("flicker", flickering(clip, 8))
    assert blur["hf_energy_ratio"] < 0.2 < 0.8 < clean["hf_energy_ratio"]
    assert blur["ssim"] < 0.95
    assert seam["seam_score"] > 2 > 1.2 > max(clean["seam_score"], blur["seam_score"])
    assert flicker["flicker_compensated"] < clean["flicker_compensated"] - 0.02
    assert flicker["warping_error"] > 5 * clean["warping_error"]


@pytest.mark.slow
def test_segments_come_from_the_video_or_are_unknown(tmp_path, model, photo):
    two = ("--set", "stage2.segment_size=2")
    for name, more in (("with.mp4", ()), ("without.mp4", ("--no-metadata",))):
        succeed(generate(model, photo, tmp_path / name, *two, *more))
    known = json.loads(succeed(swifti2v("evaluate", tmp_path / "with.mp4", "--json")).stdout)
    assert known["segment_starts"] == [1, 9]
    assert known["segments_source"] == "from the video's own settings"
    assert known["seam_score"] > 0
    unknown = json.loads(succeed(swifti2v("evaluate", tmp_path / "without.mp4", "--json")).stdout)
    assert unknown["segment_starts"] is None
    assert unknown["seam_score"] is None
    assert "--segment-starts" in unknown["not_measured"]["seam_score"]
    other = save_photo(tmp_path / "other.png", SIZE + 1, SIZE)
    result = succeed(swifti2v("evaluate", tmp_path / "with.mp4", "--image", other))
    assert "is not the photo the video was made from" in result.stderr


class Page(HTMLParser):
    """Collects what a page refers to, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.mark.slow
def test_a_folder_gives_a_table_differences_and_a_page_that_stands_alone(tmp_path, clip):
    for index in range(3):
        part = np.roll(clip[:9], 20 * index, axis=2)
        save(tmp_path / "ours" / f"{index}.mkv", part)
        save(tmp_path / "theirs" / f"{index}.mkv", blurred(part, 1.5))
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(part[0]).save(tmp_path / "photos" / f"{index}.png")
    output = tmp_path / "out"
    result = succeed(
        swifti2v(
            "evaluate", tmp_path / "ours", "--image", tmp_path / "photos", "--baseline",
            tmp_path / "theirs", "--segment-starts", "5", "-o", output, "--json",
        )
    )  # fmt: skip
    values = json.loads(result.stdout)
    written = json.loads((output / "metrics.json").read_text("utf-8"))
    assert written["mean"] == values["mean"]
    assert len(written["clips"][0]["per_frame"]["hf_energy_ratio"]) == 9
    ratio = values["difference"]["hf_energy_ratio"]
    assert 0.7 < ratio["low"] <= ratio["value"] <= ratio["high"]
    assert ratio["num_items"] == 3
    with (output / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["0", "1", "2"]
    assert rows[0]["psnr"] == ""
    assert float(rows[1]["flicker"]) == values["clips"][1]["flicker"]
    page = Page()
    html = (output / "report.html").read_text("utf-8")
    page.feed(html)
    assert page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)
    assert page.tags.count("svg") == 3 * 9
    table = succeed(swifti2v("evaluate", tmp_path / "ours")).stdout
    assert f"measured: {tmp_path / 'ours' / '0.mkv'}, " in table.splitlines()[0]
    assert re.search(r"9 frames of \d+x\d+ at 16 fps\)$", table.splitlines()[0])
    assert table.splitlines()[1] == "compared with: nothing"
    assert table.splitlines()[2].startswith("segments: unknown (")
    assert re.match(r"metrics: \d+ of \d+: first_frame_psnr|metrics: \d+ of", table.splitlines()[3])
    assert re.search(r"flicker +0\.\d{4} +0\.\d{4} to 0\.\d{4} +3\n", table)


def test_bad_input_is_one_line_before_any_measuring(tmp_path, clip):
    video = save(tmp_path / "a.mkv", clip)
    photo = save_photo(tmp_path / "square.png", 64, 64)
    assert "--fit crop or --fit pad" in error_line(swifti2v("evaluate", video, "--image", photo))
    shorter = save(tmp_path / "short.mkv", clip[:9])
    line = error_line(swifti2v("evaluate", video, "--reference", shorter))
    assert "17 frames" in line
    assert "9" in line
    one = save(tmp_path / "one.mkv", clip[:1])
    assert "at least 2 are needed" in error_line(swifti2v("evaluate", one))
    line = error_line(swifti2v("evaluate", video, "--segment-starts", "12"))
    assert "nearest are 9 and 13" in line
    assert "give a folder" in error_line(swifti2v("evaluate", video, "-o", photo))
    lines = tmp_path / "m.csv"
    lines.write_text("video,baseline,name\na.mkv,short.mkv,x\nshort.mkv,,y\n", "utf-8")
    assert "a baseline for 1 of 2 clips" in error_line(swifti2v("evaluate", lines))


def test_a_video_that_ends_early_is_refused_or_noted(tmp_path, model, photo):
    video = tmp_path / "a.mp4"
    succeed(generate(model, photo, video))
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:-500])
    assert "cut off" in error_line(swifti2v("evaluate", tmp_path / "cut.mp4"))
    text, frames = read_metadata(video)["comment"], read_clip(video).frames
    height, width = frames.shape[1:3]
    live = VideoWriter(
        tmp_path / "live.mkv", height=height, width=width, metadata={"comment": text}
    )
    with contextlib.suppress(KeyboardInterrupt), live:
        live.write(frames[:5])
        raise KeyboardInterrupt
    values = json.loads(succeed(swifti2v("evaluate", live.path, "--json")).stdout)
    assert values["num_frames"] == 5
    assert f"it has 5 of the {NUM_FRAMES} frames" in " ".join(values["notes"])


@pytest.mark.slow
def test_resampling_forgets_the_segments(tmp_path, model, photo):
    succeed(generate(model, photo, tmp_path / "a.mp4"))
    fps = 2 * float(read_clip(tmp_path / "a.mp4").fps)
    result = swifti2v("evaluate", tmp_path / "a.mp4", "--fps", fps, "--json")
    values = json.loads(succeed(result).stdout)
    assert values["num_frames"] == 2 * NUM_FRAMES
    assert "resampling" in values["not_measured"]["seam_score"]


@pytest.mark.slow
def test_a_clip_of_a_varying_rate_is_measured_with_a_note(tmp_path):
    times = [0, 33, 67, 100, 200, 233, 267, 300]
    path = foreign_clips.save(tmp_path / "a.mkv", 8, times=times, tick=Fraction(1, 1000))
    values = json.loads(succeed(swifti2v("evaluate", path, "--json")).stdout)
    assert values["fps"] == 30
    assert "a constant 30 fps" in values["notes"][0]
    longer = foreign_clips.save(tmp_path / "b.mkv", 8, sound_seconds=2)
    values = json.loads(succeed(swifti2v("evaluate", longer, "--json")).stdout)
    assert values["num_frames"] == 8
