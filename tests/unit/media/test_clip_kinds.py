"""Clips as cameras, browsers and editors write them, read as players show them."""

from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.errors import MediaError
from swifti2v.media import ClipInfo, VideoWriter, probe_clip, read_clip, read_metadata
from swifti2v.media.timing import change_rate, count_resampled, make_even, plan_timing
from tests.helpers.foreign_clips import (
    HEIGHT,
    WIDTH,
    corners,
    counting,
    cut,
    numbers,
    save,
    save_behind_still,
    save_recording,
    save_sound,
    set_matrix,
)

B_FRAMES = {"g": "8", "bf": "3"}
OPEN_GOP = {"x265-params": "log-level=error:keyint=8:bframes=3:open-gop=1"}
ALT_REF = {"auto-alt-ref": "1", "lag-in-frames": "16", "arnr-maxframes": "5"}
MS = Fraction(1, 1000)


def check(path: Path, num_frames: int, fps: float = 16) -> ClipInfo:
    """That what is promised is what decoding gives, each frame once."""
    info = probe_clip(path)
    frames = read_clip(path).frames
    assert (info.num_frames, len(frames), info.is_resampled) == (num_frames, num_frames, False)
    assert info.fps == fps
    with av.open(path) as container:
        assert sum(1 for _ in container.decode(video=0)) == num_frames
    return info


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mp4", {"sound_seconds": 2}),
        ("mkv", {"sound_seconds": 2}),
        ("webm", {"sound_seconds": 2, "codec": "libvpx-vp9"}),
        ("mkv", {"times": [5000 + int(62.5 * i) for i in range(17)], "tick": MS}),
        ("mp4", {"options": B_FRAMES}),
        ("mp4", {"options": B_FRAMES, "mux": {"movflags": "frag_keyframe+empty_moov"}}),
        ("avi", {"options": B_FRAMES}),
        ("avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
        ("mp4", {"codec": "mpeg4"}),
        ("mpg", {"codec": "mpeg2video", "rate": 25}),
        ("ts", {"codec": "mpeg2video", "rate": 25}),
        ("ts", {"options": {"x264-params": "interlaced=1"}}),
        ("flv", {}),
        ("gif", {"codec": "gif", "pixel_format": "rgb8"}),
        ("gif", {"codec": "gif", "pixel_format": "rgb8", "rate": Fraction(25, 2)}),
        ("apng", {"codec": "apng", "pixel_format": "rgb24"}),
        ("mp4", {"rate": Fraction(30000, 1001)}),
        ("mkv", {"rate": Fraction(30000, 1001)}),
        ("mkv", {"rate": 240}),
        ("mov", {"times": [(1001 * i) // 50 for i in range(17)], "tick": Fraction(1, 600),
                 "rate": 30}),
    ],
)  # fmt: skip
def test_length_and_rate_are_those_of_the_frames(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    check(save(tmp_path / f"a.{name}", **options), 17, float(options.get("rate", 16)))


def test_frames_that_are_never_shown_do_not_count(tmp_path: Path) -> None:
    check(save(tmp_path / "a.webm", 40, codec="libvpx", options=ALT_REF), 40)


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_a_cut_by_an_edit_list_starts_where_it_says(tmp_path: Path, suffix: str) -> None:
    source = save(tmp_path / "a.mp4", 20, options=B_FRAMES)
    path = cut(source, tmp_path / f"b.{suffix}", shift=Fraction(5, 16))
    check(path, 15)
    assert numbers(read_clip(path).frames) == list(range(5, 20))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("first", [8, 11])
def test_frames_that_miss_what_was_cut_off_do_not_count(
    tmp_path: Path, suffix: str, first: int
) -> None:
    source = save(tmp_path / "a.mp4", 24, codec="libx265", options=OPEN_GOP)
    info = probe_clip(cut(source, tmp_path / f"b.{suffix}", first=first))
    assert 0 < info.num_frames < 24 - first
    check(tmp_path / f"b.{suffix}", info.num_frames)


def test_a_recording_of_a_browser(tmp_path: Path) -> None:
    jitter = np.random.default_rng(0).integers(-6, 7, 64)
    times = [int(time) for time in accumulate(1000 / 30 + jitter, initial=0)]
    info = check(save_recording(tmp_path / "a.webm", times), 65, 30)
    assert "its frames come unevenly" in info.notes[0]


def test_a_varying_rate_keeps_its_time(tmp_path: Path) -> None:
    times = [50 * i for i in range(9)] + [450 + 200 * i for i in range(8)]
    path = save(tmp_path / "a.mp4", 17, times=times, tick=MS)
    info, clip = probe_clip(path), read_clip(path)
    assert (info.is_resampled, info.fps, clip.fps) == (True, 20, 20)
    assert info.num_frames == len(clip.frames) >= 38
    shown = [sum(time <= 50 * step for time in times) - 1 for step in range(37)]
    assert numbers(clip.frames)[:37] == shown
    assert numbers(read_clip(path, fps=5).frames) == numbers(clip.frames)[::4]
    assert info.notes == (
        "its frame rate varies: a frame is shown for 50 to 200 ms; it is read at a constant 20 fps",
    )


@given(
    rate=st.sampled_from([Fraction(n) for n in (1, 8, 16, 24, 25, 30, 50, 60, 120)])
    | st.sampled_from([Fraction(n * 1000, 1001) for n in (24, 30, 60)]),
    tick=st.sampled_from([MS, Fraction(1, 600), Fraction(1, 90000), Fraction(1, 12800)]),
    num_frames=st.integers(2, 200),
    start=st.integers(-(10**6), 10**6),
    has_claim=st.booleans(),
)
@settings(deadline=None)
def test_rounded_times_give_the_rate_they_come_from(
    rate: Fraction, tick: Fraction, num_frames: int, start: int, has_claim: bool
) -> None:
    ticks = [start + round(k / rate / tick) for k in range(num_frames)]
    timing = plan_timing(ticks, tick, [None, Fraction(1000), rate] if has_claim else [])
    assert timing.is_even
    assert (timing.num_frames, timing.jitter) == (num_frames, 0)
    if has_claim or 90000 % rate == 0 == 1 / tick % rate:
        assert timing.rate == rate
    else:  # a few rounded times are those of several rates
        assert abs((num_frames - 1) / timing.rate - (num_frames - 1) / rate) < Fraction(1, 300)


@given(
    steps=st.lists(st.integers(1, 400), min_size=1, max_size=60),
    fps=st.sampled_from([1.0, 12.5, 16.0, 30000 / 1001, 60.0]),
)
@settings(deadline=None)
def test_time_is_kept_whatever_the_steps(steps: list[int], fps: float) -> None:
    ticks = list(accumulate(steps, initial=0))
    timing = plan_timing(ticks, MS, [], steps[-1])
    timed = [(tick * MS, tick) for tick in ticks]
    shown = list(ticks) if timing.is_even else list(make_even(timed, timing))
    assert len(shown) == timing.num_frames
    assert abs(len(shown) / timing.rate - (ticks[-1] + steps[-1]) * MS) < 2 * max(
        1 / timing.rate, max(steps) * MS
    )
    if not timing.is_even:
        for step, tick in enumerate(shown[:-1]):
            now = step / timing.rate + timing.slack
            assert tick == max(t for t in ticks if t * MS <= now)
    again = list(change_rate(shown, timing.rate, Fraction(fps).limit_denominator(1001)))
    assert len(again) == count_resampled(len(shown), float(timing.rate), fps)


def test_no_rate_is_believed_that_the_times_contradict() -> None:
    ticks = [0, 33, 67, 100, 133, 167]
    for claim in (Fraction(1000), Fraction(25), Fraction(0), Fraction(90000)):
        assert plan_timing(ticks, MS, [claim]).rate == 30
    assert plan_timing([5], MS, [Fraction(24)]).num_frames == 1
    assert plan_timing([5], MS, []).rate == 25


def test_two_clips_in_a_row_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mpg", 60, codec="mpeg2video", rate=25)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(MediaError, match=r"a\.mpg has times that start again midway"):
        probe_clip(path)


def test_a_frame_that_stands_for_hours_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mkv", 6, times=[0, 40, 80, 120, 160, 8 * 3600_000], tick=MS)
    with pytest.raises(MediaError, match=r"a\.mkv shows a frame for 28800 s, not possible"):
        probe_clip(path)


@pytest.mark.parametrize(
    ("aspect", "size"),
    [((2, 1), (192, 64)), ((64, 45), (137, 64)), ((1, 2), (96, 128)), ((1, 1), (96, 64))],
)
def test_pixels_become_square(tmp_path: Path, aspect: Any, size: Any) -> None:
    path = save(tmp_path / "a.mp4", 5, pixel_aspect=Fraction(*aspect))
    info, frame = probe_clip(path), read_clip(path).frames[0]
    assert (info.width, info.height) == size == frame.shape[1::-1]
    assert corners(frame) == {"red": "TL", "blue": "BR"}
    note = f"its pixels are not square: 96x64 is enlarged to {size[0]}x{size[1]}"
    assert info.notes == (() if aspect == (1, 1) else (note,))


def test_a_pixel_that_cannot_be_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mkv", 5, pixel_aspect=Fraction(20, 1))
    with pytest.raises(MediaError, match=r"a\.mkv has pixels of 20:1, not possible"):
        probe_clip(path)


@pytest.mark.parametrize(
    ("matrix", "red", "blue"),
    [
        ((1, 0, 0, 1), "TL", "BR"),
        ((0, 1, -1, 0), "TR", "BL"),
        ((-1, 0, 0, -1), "BR", "TL"),
        ((0, -1, 1, 0), "BL", "TR"),
        ((-1, 0, 0, 1), "TR", "BL"),
        ((1, 0, 0, -1), "BL", "TR"),
        ((0, 1, 1, 0), "TL", "BR"),
        ((0, -1, -1, 0), "BR", "TL"),
    ],
)
def test_the_whole_display_matrix_counts(tmp_path: Path, matrix: Any, red: str, blue: str) -> None:
    path = set_matrix(save(tmp_path / "a.mp4", 5, pixel_aspect=Fraction(2)), *matrix)
    frame = read_clip(path).frames[0]
    assert corners(frame) == {"red": red, "blue": blue}
    assert frame.shape[:2] == ((192, 64) if matrix[0] == 0 else (64, 192))


def test_a_slanted_matrix_is_refused(tmp_path: Path) -> None:
    path = set_matrix(save(tmp_path / "a.mp4", 5), 1, 1, -1, 1)
    with pytest.raises(MediaError, match=r"is turned by an angle other than a quarter turn"):
        read_clip(path)


def test_interlacing_is_said(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mp4", 5, options={"x264-params": "interlaced=1"})
    assert "it is interlaced" in probe_clip(path).notes[0]


SEE_THROUGH = [
    ("qtrle", "argb", "a.mov"),
    ("prores_ks", "yuva444p10le", "a.mov"),
    ("libvpx-vp9", "yuva420p", "a.webm"),
]


@pytest.mark.parametrize(("codec", "pixel_format", "name"), SEE_THROUGH)
def test_what_is_hidden_is_never_seen(
    tmp_path: Path, codec: str, pixel_format: str, name: str
) -> None:
    opaque = np.full((5, HEIGHT, WIDTH, 4), 255, np.uint8)
    opaque[..., :3] = counting(5)
    hidden = opaque.copy()
    hidden[3:, :, 48:] = (0, 255, 0, 0)  # only from frame 3 on
    options: Any = {"codec": codec, "pixel_format": pixel_format}
    path = save(tmp_path / name, frames=hidden, **options)
    for read in (probe_clip, read_clip):
        with pytest.raises(MediaError, match=r"is partly see-through.*--background"):
            read(path)
    frames = read_clip(path, background=(0, 0, 255)).frames.astype(int)
    assert np.abs(frames[4, 10, 80] - (0, 0, 255)).max() < 12
    assert np.abs(frames[2, 32, 80] - 8).max() < 12
    whole = save(tmp_path / f"whole_{name}", frames=opaque, **options)
    assert probe_clip(whole).num_frames == len(read_clip(whole).frames) == 5


def test_a_cover_or_a_sound_is_no_clip(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="has no video stream; give a video, not a sound file"):
        probe_clip(save_sound(tmp_path / "a.m4a"))
    with pytest.raises(MediaError, match="has only a cover picture; give a video"):
        probe_clip(save_sound(tmp_path / "b.mp4", cover=True))


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_a_still_before_the_clip_is_passed_over(tmp_path: Path, suffix: str) -> None:
    path = save_behind_still(tmp_path / f"a.{suffix}", 9)
    assert numbers(read_clip(path).frames) == list(range(9))
    info = probe_clip(path)
    assert (info.num_frames, info.codec) == (9, "h264")
    assert info.notes == ("it has several video tracks: 2, of which stream 1 is read",)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_a_title_in_another_encoding_costs_nothing(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    with av.open(path, "w") as container:
        container.metadata["title"] = "Zuricher See"
        stream: Any = container.add_stream("mpeg4", rate=16)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for frame in counting(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"Zuricher", b"Z\xfcricher"))
    assert len(read_clip(path).frames) == 5
    assert read_metadata(path)["title"].endswith("richer See")


def test_a_clip_that_changes_is_looked_at_again(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    for num_frames in (5, 9):
        with VideoWriter(path, height=HEIGHT, width=WIDTH) as writer:
            writer.write(counting(num_frames))
        assert probe_clip(path).num_frames == num_frames


def test_the_codec_is_named_by_its_format(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", height=HEIGHT, width=WIDTH, codec="av1") as writer:
        writer.write(counting(5))
    assert probe_clip(tmp_path / "a.mp4").codec == "av1"


def test_a_file_without_frames_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(path, "w", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        stream: Any = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        container.start_encoding()
    with pytest.raises(MediaError, match=r"a\.mp4 holds no frame that decodes"):
        probe_clip(path)
