"""Files that an evaluation takes and refuses, and its numbers."""

import json
import math
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from swifti2v.errors import ConfigError, InputError, MediaError, ShapeError
from swifti2v.evaluation.clips.inputs import (
    ClipInputs,
    PhotoFile,
    check_clip,
    latent_starts,
    pixel_starts,
)
from swifti2v.evaluation.clips.offline import METRICS, Scores
from swifti2v.evaluation.clips.pairing import find_files, parse_starts
from swifti2v.evaluation.clips.summary import paired_differences, plain, summarize
from swifti2v.evaluation.report.plots import bar_plot, line_plot, nice_ticks
from swifti2v.media import open_writer
from tests.helpers.evaluation_clips import panning_clip


def save(path: Path, num_frames: int = 5, fps: float = 16, width: int = 64) -> Path:
    clip = panning_clip(num_frames, height=32, width=width)
    with open_writer(path, height=32, width=width, fps=fps) as writer:
        writer.write(clip)
    return path


def save_timed(path: Path, times_ms: list[int], transfer: int | None = None) -> Path:
    """A clip with a frame at each of the times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if transfer is not None:
            stream.codec_context.color_trc = transfer
        for time, pixels in zip(times_ms, panning_clip(len(times_ms), 1, 32, 64), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# Clips


def test_a_clip_is_read_again_and_again(tmp_path):
    clip = check_clip(save(tmp_path / "a.mp4"))
    assert (clip.num_frames, clip.size, clip.fps) == (5, "64x32", 16)
    first, second = np.concatenate(list(clip)), np.concatenate(list(clip))
    assert first.shape == (5, 32, 64, 3)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_variable_rate_is_resampled_and_it_is_said(tmp_path, suffix):
    path = save_timed(tmp_path / f"v{suffix}", [0, 33, 67, 100, 200, 233, 267, 300])
    clip = check_clip(path)
    assert (clip.fps, clip.resample_fps) == (30, 30)
    assert clip.num_frames in (10, 11)  # 0 to 300 ms, and the last frame's own time
    assert "33 to 100 ms; it is read at a constant 30 fps" in clip.notes[0]
    assert check_clip(path, fps=15).num_frames == (clip.num_frames + 1) // 2


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_rounded_times_of_a_constant_rate_are_no_variable_rate(tmp_path, suffix):
    path = save(tmp_path / f"c{suffix}", num_frames=9, fps=30000 / 1001)
    clip = check_clip(path)
    assert (clip.fps, clip.num_frames) == (30000 / 1001, 9)
    assert (clip.resample_fps, clip.notes) == (None, ())


def test_clips_that_cannot_be_measured(tmp_path):
    with pytest.raises(MediaError, match=r"1 frame\(s\), at least 2"):
        check_clip(save(tmp_path / "one.mp4", num_frames=1))
    with pytest.raises(ShapeError, match="8x32; sides of at least 16"):
        check_clip(save(tmp_path / "thin.mp4", width=8))
    with pytest.raises(MediaError, match="HDR"):
        check_clip(save_timed(tmp_path / "hdr.mkv", [0, 40, 80], transfer=16))
    whole = save(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(MediaError, match="cut off"):
        check_clip(tmp_path / "cut.mp4")


def test_clips_have_to_fit_each_other(tmp_path):
    video, longer = check_clip(save(tmp_path / "a.mp4")), check_clip(save(tmp_path / "b.mp4", 7))
    faster = check_clip(save(tmp_path / "c.mp4", fps=24))
    wider = check_clip(save(tmp_path / "d.mp4", width=96))
    with pytest.raises(ShapeError, match=r"has 5 frames, reference .* has 7"):
        ClipInputs(name="x", video=video, reference=longer).check()
    with pytest.raises(MediaError, match=r"16 fps, motion reference .* at 24"):
        ClipInputs(name="x", video=video, motion_reference=faster).check()
    with pytest.raises(ShapeError, match=r"64x32, reference .* is 96x32"):
        ClipInputs(name="x", video=video, reference=wider).check()
    with pytest.raises(ShapeError, match="larger than the clip"):
        ClipInputs(name="x", video=video, motion_reference=wider).check()
    with pytest.raises(ShapeError, match="of another aspect"):
        ClipInputs(name="x", video=wider, motion_reference=video).check()
    ClipInputs(name="x", video=video, reference=video, motion_reference=video).check()


def test_a_photo_of_another_aspect_needs_to_know_its_fit(tmp_path):
    path = tmp_path / "p.png"
    Image.new("RGB", (90, 60), (200, 10, 10)).save(path)
    with pytest.raises(MediaError, match=r"90x60, the clip 64x32.*--fit crop or --fit pad"):
        PhotoFile(path=path, fit=None).load(32, 64)
    cropped, note = PhotoFile(path=path, fit="crop").load(32, 64)
    assert cropped.min() == 10
    assert note is not None
    assert "lost" in note
    padded, _ = PhotoFile(path=path, fit="pad").load(32, 64)
    assert padded[0, 0].tolist() == [0, 0, 0]
    assert PhotoFile(path=path, fit=None).load(40, 60)[1] is None


# Segment starts


@given(st.sets(st.integers(1, 40), min_size=1))
def test_starts_as_pixel_and_as_latent_frames(latent):
    assert latent_starts(pixel_starts(sorted(latent)), 200) == tuple(sorted(latent))


def test_wrong_segment_starts():
    assert parse_starts("13, 25,37 ") == (13, 25, 37)
    for text in ("", ",", "13;25", "-3", "1.5"):
        with pytest.raises(InputError, match="13,25,37"):
            parse_starts(text)
    with pytest.raises(ShapeError, match="nearest are 9 and 13"):
        latent_starts([12], 33)
    with pytest.raises(ShapeError, match="outside the clip of 33"):
        latent_starts([13, 33], 33)
    with pytest.raises(ShapeError, match="start 0 does not fit"):
        latent_starts([0], 33)


# Pairing


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")


def test_folders_are_paired_by_name_and_mismatches_are_named(tmp_path):
    clips, photos = tmp_path / "clips", tmp_path / "photos"
    touch(clips / "b.mp4", clips / "a.mkv", clips / "notes.txt", clips / ".hidden.mp4")
    touch(photos / "a.png", photos / "b.jpg", photos / "LICENSE.md")
    found = find_files(clips, {"image": photos, "reference": None})
    assert [(one.name, one.image) for one in found] == [
        ("a", photos / "a.png"),
        ("b", photos / "b.jpg"),
    ]
    touch(photos / "c.png")
    (photos / "a.png").unlink()
    with pytest.raises(
        InputError, match=r"has 2 files.*has 2, .*a only in .*clips; c only in --image"
    ):
        find_files(clips, {"image": photos})
    touch(clips / "b.mov")
    with pytest.raises(InputError, match="same name"):
        find_files(clips, {})


def test_paths_of_the_wrong_kind(tmp_path):
    touch(tmp_path / "clips" / "a.mp4", tmp_path / "photos" / "a.png", tmp_path / "m.csv")
    clip, photos = tmp_path / "clips" / "a.mp4", tmp_path / "photos"
    with pytest.raises(InputError, match=r"gone\.mp4 does not exist"):
        find_files(tmp_path / "gone.mp4", {})
    with pytest.raises(InputError, match=r"is a file, but --image .* is a folder"):
        find_files(clip, {"image": photos})
    with pytest.raises(InputError, match="holds no videos"):
        find_files(photos, {})
    with pytest.raises(InputError, match="columns, not with --motion-reference"):
        find_files(tmp_path / "m.csv", {"motion_reference": clip})


def test_manifests_as_csv_and_jsonl_say_the_same(tmp_path):
    touch(*(tmp_path / "v" / name for name in ("a.mp4", "b.mp4", "a.png")))
    table = tmp_path / "m.csv"
    table.write_text('video,image,segment_starts\nv/a.mp4,v/a.png,"13,25"\nv/b.mp4,,\n', "utf-8")
    lines = tmp_path / "m.jsonl"
    rows = [{"video": "v/a.mp4", "image": "v/a.png", "segment_starts": [13, 25]}]
    rows.append({"video": "v/b.mp4"})
    lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", "utf-8")
    found = find_files(table, {})
    assert found == find_files(lines, {})
    assert found[0].image == tmp_path / "v" / "a.png"
    assert [one.segment_starts for one in found] == [(13, 25), None]


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("m.csv", "video,photo\na.mp4,b.png\n", ConfigError, "line 2: photo"),
        ("m.csv", "image\na.mp4\n", ConfigError, "line 2: video"),
        ("m.csv", "video\ngone.mp4\n", InputError, "line 2: video .*gone.mp4 does not exist"),
        ("m.csv", "video\na.mp4,b\n", InputError, "more cells"),
        ("m.csv", "video\n", InputError, "no lines"),
        ("m.csv", "video\na.mp4\na.mp4\n", InputError, "line 3: the name a appears twice"),
        ("m.jsonl", "[1]\n", InputError, "line 1 is not a JSON object"),
        ("m.jsonl", "{video}\n", InputError, "cannot be read"),
    ],
)
def test_manifests_with_mistakes(tmp_path, name, text, error, message):
    touch(tmp_path / "a.mp4")
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(error, match=message):
        find_files(tmp_path / name, {})


# Means and differences


def scores(value: float) -> Scores:
    made = Scores()
    for metric in METRICS:
        made.add(metric.name, value, "not there" if math.isnan(value) else "")
    return made


def test_differences_are_paired_by_name_and_leave_out_what_one_side_lacks():
    ours = {name: scores(value) for name, value in zip("abcd", (1, 5, 9, math.nan), strict=True)}
    theirs = {name: scores(value) for name, value in zip("dcba", (3, 8, 4, 0), strict=True)}
    mean = summarize(list(ours.values()))["ssim"]
    assert (mean.value, mean.num_items) == (5, 3)
    difference = paired_differences(ours, theirs)["ssim"]
    assert (difference.value, difference.num_items) == (1, 3)
    assert (difference.low, difference.high) == (1, 1)  # far narrower than the values themselves
    with pytest.raises(InputError, match="d only in clips"):
        paired_differences(ours, {name: theirs[name] for name in "abc"})


def test_plain_values_have_no_nan():
    nested = {"a": math.nan, "b": [1.5, math.nan, (math.nan,)], "c": "x"}
    assert plain(nested) == {"a": None, "b": [1.5, None, [None]], "c": "x"}


# Plots


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_enclose_the_values_and_are_few(low, spread):
    ticks = nice_ticks(low, low + spread)
    assert ticks[0] <= low + 1e-6 * spread + 1e-9 * abs(low)
    assert ticks[-1] >= low + spread - 1e-6 * spread - 1e-9 * abs(low)
    assert 2 <= len(ticks) <= 8


@given(
    st.lists(st.floats(-1e12, 1e12) | st.sampled_from((math.nan, math.inf, -math.inf)), max_size=12)
)
def test_plots_are_well_formed_whatever_the_values(values):
    curves = {"a <b> & c": list(enumerate(values)), "d": [(0, 1.0)]}
    bars = [(float(x), y, "k") for x, y in enumerate(values) if not y < 0]
    for svg in (line_plot("t < u", "x", curves, [1]), bar_plot("t", "x", bars, ("k",))):
        text = ElementTree.tostring(ElementTree.fromstring(svg), "unicode")
        assert "nan" not in text
        assert "inf" not in text


def test_gaps_break_a_curve():
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 1.0), (4.0, 2.0)]
    assert line_plot("t", "x", {"a": points}).count("<polyline") == 2
