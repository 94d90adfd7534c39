import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swifti2v.errors import MediaError, ShapeError
from swifti2v.media import (
    PngSequenceWriter,
    VideoWriter,
    iter_frames,
    load_image,
    open_writer,
    probe_clip,
    read_clip,
    read_metadata,
    require_writable,
)
from swifti2v.media.encoder import CodecName

HEIGHT, WIDTH = 64, 96
SIZE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH}
NOTE = {"comment": json.dumps({"prompt": 'a "fox" — größer 狐', "seed": 7}), "title": "fox"}


def moving(num_frames: int) -> np.ndarray:
    columns, rows = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    frames = [
        np.stack([(columns * 2 + 5 * t) % 256, rows * 3, 255 - columns - t], -1)
        for t in range(num_frames)
    ]
    return np.stack(frames).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5))
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_lossless_pieces_of_any_length_come_back_exactly(tmp_path: Path, sizes: list[int]) -> None:
    frames = moving(sum(sizes))
    with VideoWriter(tmp_path / "a.mkv", **SIZE, codec="ffv1", metadata=NOTE) as writer:
        for piece in np.split(frames, np.cumsum(sizes)[:-1]):
            writer.write(piece)
    assert writer.num_frames_written == len(frames)
    np.testing.assert_array_equal(read_clip(tmp_path / "a.mkv", min_frames=1).frames, frames)
    assert read_metadata(tmp_path / "a.mkv") == NOTE


@pytest.mark.parametrize("ten_bit", [False, True])
@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "h265.mp4", "av1.mp4", "av1.mkv"])
def test_pieces_join_to_one_clip(tmp_path: Path, name: str, ten_bit: bool) -> None:
    frames = moving(13)
    codec: Any = name.split(".")[0]
    with VideoWriter(
        tmp_path / name, **SIZE, fps=23.976, metadata=NOTE, codec=codec, crf=10, ten_bit=ten_bit
    ) as writer:
        for piece in np.split(frames, [1, 5]):
            writer.write(piece)
    with av.open(tmp_path / name) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        colours = (context.color_primaries, context.color_trc, context.colorspace)
        assert (*colours, context.color_range) == (1, 1, 1, 1)
        assert context.pix_fmt == ("yuv420p10le" if ten_bit else "yuv420p")
        times = [float(frame.time) for frame in container.decode(stream)]
    np.testing.assert_allclose(times, np.arange(13) / 23.976, atol=0.001)  # Matroska ticks
    assert psnr(read_clip(tmp_path / name).frames, frames) > 30  # crossed fine colour ramps
    assert read_metadata(tmp_path / name) == NOTE


def top_boxes(path: Path) -> list[bytes]:
    data, position, kinds = path.read_bytes(), 0, []
    while position < len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        kinds.append(kind)
        position += size
    return kinds


def duration_of(path: Path, box: bytes) -> float:
    """Seconds that an MP4's header states (ISO/IEC 14496-12, sections 8.2.2 and 8.4.2)."""
    data = path.read_bytes()
    ticks, duration = struct.unpack_from(">II", data, data.index(box) + 4 + 4 + 8)
    return float(duration / ticks)


@pytest.mark.parametrize("name", ["h264.mp4", "av1.mp4", "h264.mkv", "ffv1.mkv"])
def test_a_finished_file_states_its_exact_rate(tmp_path: Path, name: str) -> None:
    rate = Fraction(30000, 1001)
    codec: Any = name.split(".")[0]
    with VideoWriter(tmp_path / name, **SIZE, fps=float(rate), codec=codec) as writer:
        writer.write(moving(9))
    assert probe_clip(tmp_path / name).fps == float(rate)


@pytest.mark.parametrize("name", ["h264.mp4", "h265.mp4", "av1.mp4", "h264.mkv", "ffv1.mkv"])
def test_a_finished_file_states_its_length_and_can_be_sought_in(tmp_path: Path, name: str) -> None:
    frames, path = moving(13), tmp_path / name
    writer = VideoWriter(path, **SIZE, fps=8, metadata=NOTE, codec=cast(Any, name.split(".")[0]))
    with writer:
        for piece in np.split(frames, [1, 5]):
            writer.write(piece)
        wait_for(writer, 13)
        grown = read_clip(path).frames
    np.testing.assert_array_equal(read_clip(path).frames, grown)
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert container.duration == pytest.approx(13 / 8 * 1e6, abs=1e3)
        assert stream.average_rate == 8
        container.seek(5 * 125_000)
        assert len(stream.index_entries) >= 3  # a key frame each; read when they are needed
        assert next(container.decode(stream)).time == pytest.approx(5 / 8)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    if path.suffix == ".mp4":
        assert top_boxes(path) == [b"ftyp", b"moov", b"free", b"mdat"]
        assert duration_of(path, b"mvhd") == pytest.approx(13 / 8, abs=1e-3)
        assert duration_of(path, b"mdhd") == 13 / 8
        assert (b"hvc1" in path.read_bytes()) == (name == "h265.mp4")


def wait_for(writer: VideoWriter, num_frames: int) -> None:
    while writer.num_frames_written < num_frames:
        time.sleep(0.01)


def test_same_frames_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        with VideoWriter(tmp_path / name, **SIZE) as writer:
            writer.write(moving(8)[:3])
            writer.write(moving(8)[3:])
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    "colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (9, 99, 200)]
)
def test_colours_are_bt709_limited_range(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    frames = np.broadcast_to(np.array(colour, np.uint8), (2, HEIGHT, WIDTH, 3))
    with VideoWriter(tmp_path / "a.mp4", **SIZE, crf=2) as writer:
        writer.write(frames)
    red, green, blue = np.array(colour) / 255
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # ITU-R BT.709, item 3.2
    expected = (
        16 + 219 * luma,
        128 + 224 * (blue - luma) / 1.8556,
        128 + 224 * (red - luma) / 1.5748,
    )
    with av.open(tmp_path / "a.mp4") as container:
        planes = next(container.decode(video=0)).planes
        means = [np.frombuffer(bytes(plane), np.uint8)[: plane.width].mean() for plane in planes]
    np.testing.assert_allclose(means, expected, atol=1)
    decoded = read_clip(tmp_path / "a.mp4").frames.astype(int)
    assert np.abs(decoded - frames).max() <= 3  # one level of 8-bit chroma is up to two of RGB


def test_the_clip_is_never_held(tmp_path: Path) -> None:
    released = threading.Event()

    class Slow(VideoWriter):
        def _save(self, frames: np.ndarray) -> None:
            released.wait(10)
            super()._save(frames)

    writer = Slow(tmp_path / "a.mp4", **SIZE, queue_size=1)
    done = threading.Event()

    def feed() -> None:
        for _ in range(4):
            writer.write(moving(2))
        done.set()

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert not done.wait(0.2)  # one piece at work, one waiting: the third has to wait
    released.set()
    feeder.join()
    writer.close()
    assert writer.num_frames_written == 8


def fail_after(writer: VideoWriter, num_frames: int) -> None:
    with writer:
        if num_frames:
            writer.write(moving(num_frames))
        raise KeyError


def test_an_exception_leaves_a_playable_file(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", **SIZE, metadata=NOTE)
    with pytest.raises(KeyError):
        fail_after(writer, 5)
    assert len(read_clip(tmp_path / "a.mp4").frames) == 5
    with pytest.raises(MediaError, match="is closed"):
        writer.write(moving(1))
    writer.close()


def test_nothing_written_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(MediaError, match="no frames were written"),
        VideoWriter(tmp_path / "a.mp4", **SIZE),
    ):
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_replaced_only_by_frames(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("old")
    with pytest.raises(KeyError):
        fail_after(VideoWriter(tmp_path / "a.mp4", **SIZE), 0)
    assert (tmp_path / "a.mp4").read_text() == "old"
    with VideoWriter(tmp_path / "a.mp4", **SIZE) as writer:
        writer.write(moving(2))
    assert len(read_clip(tmp_path / "a.mp4").frames) == 2


Interrupted = tuple[Path, subprocess.CompletedProcess[str]]
_INTERRUPTED = """
import os, resource, signal, sys, time
import numpy as np
from swifti2v.errors import MediaError
from swifti2v.media import PngSequenceWriter, VideoWriter

folder, note = sys.argv[1:]
noise = np.random.default_rng(0).integers(0, 256, (4, 64, 96, 3), dtype=np.uint8)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for kind, name in ((VideoWriter, "full.mp4"), (PngSequenceWriter, "full")):
    writer = kind(f"{folder}/{name}", height=64, width=96)
    writer.write(noise)
    while writer.num_frames_written < 4:
        time.sleep(0.01)
    size = os.path.getsize(f"{folder}/{name}") if name == "full.mp4" else 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5000, hard))
    try:
        for _ in range(50):
            writer.write(noise)
            time.sleep(0.02)
        print("no error", flush=True)
    except MediaError as error:
        print(error, flush=True)
    try:
        writer.close()
        print("no error", flush=True)
    except MediaError as error:
        print(error, flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
with VideoWriter(f"{folder}/unindexed.mp4", height=64, width=96) as writer:
    writer.write(noise)
    while writer.num_frames_written < 4:
        time.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    writer.close()
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
with VideoWriter(f"{folder}/killed.mp4", height=64, width=96, metadata={"comment": note}) as writer:
    writer.write(noise)
    writer.write(noise)
    while writer.num_frames_written < 8:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """Files left by a process that met a file size limit twice and then was killed."""
    folder = tmp_path_factory.mktemp("interrupted")
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, str(folder), NOTE["comment"]],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return folder, done


@pytest.mark.slow
def test_a_killed_process_leaves_its_pieces_playable(interrupted: Interrupted) -> None:
    folder, done = interrupted
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(read_clip(folder / "killed.mp4").frames) == 8
    assert read_metadata(folder / "killed.mp4") == {"comment": NOTE["comment"]}


def test_a_full_disk_is_one_error_and_keeps_what_was_written(interrupted: Interrupted) -> None:
    folder, done = interrupted
    messages = done.stdout.splitlines()
    assert len(messages) == 4, done.stderr
    assert messages[0] == messages[1]
    assert messages[2] == messages[3]
    for message, name in ((messages[0], "full.mp4"), (messages[2], "full")):
        assert f"writing {folder / name} failed (File too large); its first 4 frames" in message
    assert len(read_clip(folder / "full.mp4").frames) == 4
    assert sorted(path.name for path in (folder / "full").iterdir()) == [
        f"0000{index}.png" for index in range(4)
    ]


def test_a_full_disk_costs_a_whole_clip_its_index_alone(interrupted: Interrupted) -> None:
    folder, done = interrupted
    assert "unindexed.mp4 is complete, but has no index for players to seek by" in done.stderr
    assert len(read_clip(folder / "unindexed.mp4").frames) == 4
    assert not list(folder.glob("*.writing*"))


def test_what_cannot_be_written_is_refused_up_front(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder").mkdir()
    for name, codec, reason in (
        ("none/a.mp4", "h264", "none does not exist; create it"),
        ("folder.mp4", "h264", "is a folder"),
        ("a.avi", "h264", r"'.avi' does not fit codec h264; use .mp4 or .mkv"),
        ("a.mp4", "ffv1", r"does not fit codec ffv1; use .mkv"),
        ("a.mp4", "vp9", "'vp9' is unknown; use one of h264"),
        ("a.png", "h264", "names one PNG"),
        ("a%s.png", "h264", "names one PNG"),
        ("none/%05d.png", "h264", "none does not exist"),
        ("none/frames", "png", "none does not exist"),
        ("frames", "h264", r"frames has no suffix; .* frames\.mp4, or give --codec png"),
        ("folder", "h264", "folder is a folder; give .* or --codec png"),
        ("a.mp4", "png", "is a video; with codec png give a folder"),
    ):
        with pytest.raises(MediaError, match=reason):
            require_writable(tmp_path / name, codec)
        with pytest.raises(MediaError, match=reason):
            open_writer(tmp_path / name, **SIZE, codec=cast(Any, codec))
    for name in ("a.mp4", "a.MKV", "%05d.png"):
        require_writable(tmp_path / name)
    for name in ("frames", "v1.2", "folder", "folder.mp4", "%05d.png"):
        require_writable(tmp_path / name, "png")
    for option in ({"crf": 20}, {"ten_bit": True}):
        with pytest.raises(MediaError, match="leave crf and ten_bit out"):
            open_writer(tmp_path / "frames", **SIZE, codec="png", **cast(Any, option))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "folder.mp4"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(MediaError, match="not writable"):
        require_writable(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"crf": 52}, "crf 52"),
        ({"crf": -1}, "crf -1"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"queue_size": 0}, "queue_size is 0"),
        ({"height": 63}, "96x63 does not fit; both sides must be even"),
    ],
)
def test_options_out_of_range_are_refused(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(MediaError, match=reason):
        VideoWriter(tmp_path / "a.mp4", **{**SIZE, **options})


def test_frames_of_another_kind_are_refused(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", **SIZE) as writer:
        for frames in (moving(1)[0], moving(1)[:, :32], moving(1).astype(float), moving(1)[:0]):
            with pytest.raises(ShapeError, match=r"a\.mp4"):
                writer.write(frames)
        writer.write(moving(2))
    assert len(read_clip(tmp_path / "a.mp4").frames) == 2


@pytest.mark.parametrize(
    ("target", "first"), [("frames", "00000.png"), ("shot_%03d.png", "shot_000.png")]
)
def test_png_sequences_are_exact(tmp_path: Path, target: str, first: str) -> None:
    codec: CodecName = "h264" if "%" in target else "png"
    with open_writer(tmp_path / target, **SIZE, metadata=NOTE, codec=codec) as writer:
        assert isinstance(writer, PngSequenceWriter)
        writer.write(moving(3)[:2])
        writer.write(moving(3)[2:])
    folder = tmp_path if "%" in target else tmp_path / target
    files = sorted(folder.glob("*.png"))
    assert (len(files), files[0].name) == (3, first)
    np.testing.assert_array_equal(
        np.stack([np.asarray(load_image(path)) for path in files]), moving(3)
    )
    assert read_metadata(tmp_path / target) == NOTE
    with pytest.raises(MediaError, match="already holds PNGs"):
        open_writer(tmp_path / target, **SIZE, codec=codec)


def test_open_writer_picks_by_suffix(tmp_path: Path) -> None:
    with open_writer(tmp_path / "a.mkv", **SIZE, codec="ffv1", fps=30) as writer:
        assert isinstance(writer, VideoWriter)
        writer.write(moving(2))
    np.testing.assert_array_equal(list(iter_frames(tmp_path / "a.mkv")), moving(2))
