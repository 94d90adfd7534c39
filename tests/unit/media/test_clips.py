import contextlib
import gc
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swifti2v.errors import MediaError
from swifti2v.media import (
    VideoWriter,
    iter_frames,
    open_writer,
    probe_clip,
    read_clip,
    read_metadata,
)

HEIGHT, WIDTH = 48, 64
SHARED_FOLDER = [HealthCheck.function_scoped_fixture]


def numbered(num_frames: int) -> np.ndarray:
    """Frames whose grey level is ten times their number."""
    levels = np.arange(num_frames, dtype=np.uint8) * 10
    return np.broadcast_to(levels[:, None, None, None], (num_frames, HEIGHT, WIDTH, 3)).copy()


def save(path: Path, frames: np.ndarray, **options: Any) -> Path:
    with VideoWriter(path, height=HEIGHT, width=WIDTH, **options) as writer:
        writer.write(frames)
    return path


def save_foreign(
    path: Path,
    frames: np.ndarray,
    times: list[int] | None = None,
    trc: int = 1,
    rotation: int = 0,
    **options: Any,
) -> Path:
    """A clip as other programs write it: index at the end, no fragments."""
    with av.open(path, "w", **options) as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.color_trc = trc
        stream.codec_context.time_base = Fraction(1, 1600)
        if rotation:
            stream.set_display_rotation(rotation)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = (
                times[index] if times else 100 * index,
                Fraction(1, 1600),
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def numbers(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 10) for frame in frames]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_clip_comes_back_with_its_rate(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", numbered(9), fps=24)
    clip = read_clip(path)
    assert clip.frames.shape == (9, HEIGHT, WIDTH, 3)
    assert (clip.fps, numbers(clip.frames)) == (24, list(range(9)))
    info = probe_clip(path)
    assert (info.height, info.width, info.fps, info.codec) == (HEIGHT, WIDTH, 24, "h264")
    assert info.num_frames == 9


def test_a_foreign_clip_with_b_frames_and_a_colon_in_its_name(tmp_path: Path) -> None:
    clip = read_clip(save_foreign(tmp_path / "pipe:a #1%d.mp4", numbered(12)))
    assert numbers(clip.frames) == list(range(12))


@pytest.mark.slow
@given(
    suffix_and_source=st.sampled_from(
        [(".mp4", rate) for rate in (8, 16, 24, 30, 23.976)]
        + [(".mkv", rate) for rate in (8, 16, 24, 30)]  # its 1 ms ticks tell NTSC rates apart late
    ),
    target=st.sampled_from([4, 8, 12, 16, 24, 30, 60, 29.97]),
)
@settings(max_examples=30, deadline=None, suppress_health_check=SHARED_FOLDER)
def test_resampling_shows_the_last_frame_that_has_started(
    tmp_path: Path, suffix_and_source: tuple[str, float], target: float
) -> None:
    suffix, source = suffix_and_source
    path = save(tmp_path / f"a{suffix}", numbered(13), fps=source)
    ratio = Fraction(source).limit_denominator(1001) / Fraction(target).limit_denominator(1001)
    expected = [step * ratio // 1 for step in range(200) if step * ratio < 13]
    clip = read_clip(path, fps=target)
    assert clip.fps == target
    assert numbers(clip.frames) == expected


def test_uneven_times_are_honoured(tmp_path: Path) -> None:
    path = save_foreign(tmp_path / "a.mp4", numbered(4), times=[0, 100, 400, 500])
    for fps in (16, None):
        clip = read_clip(path, fps=fps)
        assert clip.fps == 16
        assert numbers(clip.frames)[:6] == [0, 1, 1, 1, 2, 3]
        assert set(numbers(clip.frames)[6:]) <= {3}  # what the file says of the last frame
    info = probe_clip(path)
    assert (info.num_frames, info.is_resampled) == (len(clip.frames), True)
    assert "62 to 188 ms; it is read at a constant 16 fps" in info.notes[0]


def test_max_frames_stops_early(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mp4", numbered(9))
    assert numbers(read_clip(path, max_frames=4).frames) == [0, 1, 2, 3]
    assert len(read_clip(path, max_frames=1).frames) == 1
    with pytest.raises(MediaError, match="max_frames is 0"):
        read_clip(path, max_frames=0)


def test_iteration_can_be_left_and_checks_at_once(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mp4", numbered(9))
    frames = iter_frames(path)
    assert next(frames).shape == (HEIGHT, WIDTH, 3)
    frames.close()  # type: ignore[attr-defined]
    with pytest.raises(MediaError, match="does not exist"):
        iter_frames(tmp_path / "none.mp4")
    with pytest.raises(MediaError, match="fps is 0"):
        iter_frames(path, fps=0)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_is_honoured(tmp_path: Path, degrees: int) -> None:
    frames = np.zeros((3, HEIGHT, WIDTH, 3), np.uint8)
    frames[:, : HEIGHT // 2, : WIDTH // 2] = 255
    path = save_foreign(tmp_path / "a.mp4", frames, rotation=degrees)
    upright = read_clip(path).frames[0]
    with av.open(path) as container:
        assert next(container.decode(video=0)).rotation in (degrees, degrees - 360)
    expected = np.rot90(frames[0], degrees // 90)
    assert upright.shape == expected.shape
    assert np.abs(upright.astype(int) - expected).mean() < 8  # ringing at the edges
    info = probe_clip(path)
    assert (info.height, info.width) == expected.shape[:2]


@pytest.mark.parametrize(("trc", "name"), [(16, "smpte2084"), (18, "arib-std-b67")])
def test_hdr_is_refused(tmp_path: Path, trc: int, name: str) -> None:
    path = save_foreign(tmp_path / "a.mp4", numbered(3), trc=trc)
    with pytest.raises(MediaError, match=rf"HDR, transfer {name}.*export it as SDR"):
        read_clip(path)


def test_one_frame_is_too_few_unless_asked(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mp4", numbered(1))
    with pytest.raises(MediaError, match=r"gives 1 frame\(s\), at least 2 are needed"):
        read_clip(path)
    assert len(read_clip(path, min_frames=1).frames) == 1


def test_a_file_that_is_not_a_clip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello " * 100)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost/a.mp4\n")
    with av.open(tmp_path / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    for name, reason in (
        ("empty.mp4", "0 bytes"),
        ("text.mp4", "cannot be read"),
        ("list.m3u8", "cannot be read"),
        ("sound.mp4", "no video stream"),
    ):
        with pytest.raises(MediaError, match=reason) as caught:
            read_clip(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["index first", "index last", "fragments", "matroska", "avi"])
def test_truncated_clips_are_refused(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = tmp_path / {"matroska": "a.mkv", "avi": "a.avi"}.get(kind, "a.mp4")
    if kind == "fragments":
        save(path, noise)
    else:
        save_foreign(
            path, noise, options={"movflags": "faststart"} if kind == "index first" else {}
        )
    whole = path.read_bytes()
    assert len(read_clip(path).frames) == 12
    for share in (0.02, 0.3, 0.6, 0.9, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(MediaError, match=path.name):
            read_clip(path)


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=SHARED_FOLDER)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_damage_never_escapes_as_another_error(
    tmp_path: Path, suffix: str, data: st.DataObject
) -> None:
    path = tmp_path / f"whole{suffix}"
    if not path.exists():
        save(path, numbered(3))
    broken = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(broken) - 1), min_size=1, max_size=3)):
        broken[place] ^= data.draw(st.integers(1, 255))
    damaged = tmp_path / f"damaged{suffix}"
    damaged.write_bytes(broken[: data.draw(st.integers(1, len(broken)))])
    with contextlib.suppress(MediaError):
        assert len(read_clip(damaged, max_frames=9, min_frames=1).frames) >= 1
    with contextlib.suppress(MediaError):
        assert isinstance(read_metadata(damaged), dict)


def test_an_unknown_codec_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mkv", numbered(3))
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/AVC"))
    with pytest.raises(MediaError, match="unknown codec"):
        read_clip(path)


def test_a_64_bit_box_size_is_understood(tmp_path: Path) -> None:
    path = save_foreign(tmp_path / "a.mp4", numbered(3))
    box = struct.pack(">I4sQ", 1, b"free", 24) + bytes(8)
    path.write_bytes(path.read_bytes() + box)
    assert len(read_clip(path).frames) == 3
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MediaError, match="cut off"):
        read_clip(path)


def test_metadata_of_what_has_none(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="does not exist"):
        read_metadata(tmp_path / "none.mp4")
    with pytest.raises(MediaError, match="no PNG frames"):
        read_metadata(tmp_path)
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(MediaError, match="cannot be read as a PNG"):
        read_metadata(tmp_path / "a.png")
    assert read_metadata(save(tmp_path / "a.mp4", numbered(1))) == {}


def test_a_matroska_file_of_four_bytes_is_refused(tmp_path):
    path = tmp_path / "stub.mkv"
    path.write_bytes(b"\x1aE\xdf\xa3")
    with pytest.raises(MediaError, match=r"stub\.mkv"):
        read_clip(path)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of types that are only looked at
def test_a_frame_is_gone_when_the_next_one_is_read(tmp_path):
    """Nothing waits for the garbage collector, and no thread of a converter is left."""
    path = tmp_path / "clip.mp4"
    frames = np.random.default_rng(0).integers(0, 256, (30, 64, 96, 3), np.uint8)
    with open_writer(path, height=64, width=96, fps=16) as writer:
        writer.write(frames)
    for _ in iter_frames(path):  # what is made once
        pass
    gc.collect()
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    gc.disable()
    try:
        num_read = sum(1 for _ in iter_frames(path))
        alive = [item for item in gc.get_objects() if type(item) is VideoFrame]
        assert num_read == 30
        assert len(alive) <= 4
    finally:
        gc.enable()
    assert len(list(Path("/proc/self/task").iterdir())) <= num_threads
