from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from swifti2v.errors import MediaError
from swifti2v.media import VideoWriter
from swifti2v.media.sound import Sound, find_sound, require_sound_fits
from tests.helpers import foreign_clips

HEIGHT, WIDTH = 64, 96
NTSC = Fraction(30000, 1001)


def sound_of(path: Path) -> list[tuple[float, bytes]]:
    """Packets of the first sound track, each with seconds from the first frame."""
    with av.open(path) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        packets = [packet for packet in container.demux(video, sound) if packet.size]
        times = [(packet, float((packet.pts or 0) * packet.time_base)) for packet in packets]
        start = min(time for packet, time in times if packet.stream_index == video.index)
        return [(t - start, bytes(p)) for p, t in times if p.stream_index == sound.index]


def write(path: Path, num_frames: int, fps: float, sound: Sound | None) -> Path:
    codec: Any = "ffv1" if path.suffix == ".mkv" else "h264"
    frames = np.zeros((num_frames, HEIGHT, WIDTH, 3), np.uint8)
    with VideoWriter(path, height=HEIGHT, width=WIDTH, fps=fps, sound=sound, codec=codec) as writer:
        for piece in np.array_split(frames, 3):
            writer.write(piece)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("target", ["out.mp4", "out.mkv"])
@pytest.mark.parametrize("source", ["a.mp4", "a.mkv", "a.webm", "a.avi", "a.mpg", "late.mp4"])
def test_every_packet_keeps_its_bytes_and_its_time(
    tmp_path: Path, source: str, target: str
) -> None:
    path = tmp_path / source
    codec = {".webm": "libvpx", ".mpg": "mpeg2video", ".avi": "mpeg4"}.get(path.suffix, "libx264")
    foreign_clips.save(path, 60, rate=NTSC, codec=codec, sound_seconds=2, frames=noise(60))
    if source.startswith("late"):
        path = begin_later(path, tmp_path / "later.mp4")
    sound = find_sound(path)
    assert sound is not None
    copy = write(tmp_path / target, 60, float(NTSC), sound)
    expected, found = sound_of(path), sound_of(copy)
    within = [one for one in expected if -0.1 <= one[0] < 60 / NTSC]
    assert len(within) > 20
    assert [data for _, data in found] == [data for _, data in within]
    np.testing.assert_allclose(
        [time for time, _ in found], [time for time, _ in within], atol=0.0021
    )


def begin_later(source: Path, target: Path) -> Path:
    """A copy whose frames begin half a second after its sound."""
    with av.open(source) as clip, av.open(target, "w") as later:
        copies = [later.add_stream_from_template(stream) for stream in clip.streams]
        for packet in clip.demux():
            if packet.size and packet.pts is not None and packet.dts is not None:
                shift = 0
                if packet.stream.type == "video":
                    shift = round(Fraction(1, 2) / packet.time_base)
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = copies[packet.stream_index]
                later.mux(packet)
    return target


def noise(num_frames: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, HEIGHT, WIDTH, 3), np.uint8)


def test_sound_ends_with_the_frames(tmp_path: Path) -> None:
    path = foreign_clips.save(tmp_path / "a.mp4", 32, sound_seconds=2)
    copy = write(tmp_path / "b.mp4", 16, 16, find_sound(path))
    with av.open(copy) as container:
        assert float(container.duration or 0) / 1e6 == pytest.approx(1, abs=0.03)
    assert 0.95 < sound_of(copy)[-1][0] < 1


def test_sound_lies_beside_the_frames_it_belongs_to(tmp_path: Path) -> None:
    path = foreign_clips.save(tmp_path / "a.mp4", 320, sound_seconds=20)
    copy = write(tmp_path / "b.mp4", 320, 16, find_sound(path))
    with av.open(copy) as container:
        positions = [
            (packet.pos, float((packet.dts or 0) * packet.time_base))
            for packet in container.demux()
            if packet.size
        ]
    times = [time for _, time in sorted(positions)]
    assert max(before - after for before, after in pairwise(times)) < 1.5


def test_a_file_that_cannot_hold_the_sound_is_refused_at_once(tmp_path: Path) -> None:
    path = foreign_clips.save(tmp_path / "a.mkv", sound_seconds=1, sound_codec="tta")
    sound = find_sound(path)
    assert sound is not None
    require_sound_fits(".mkv", sound)
    with pytest.raises(MediaError, match=r"tta.*write an \.mkv.*--no-audio"):
        VideoWriter(tmp_path / "b.mp4", height=HEIGHT, width=WIDTH, sound=sound)
    assert not (tmp_path / "b.mp4").exists()


def test_sound_that_no_file_of_ours_can_hold_can_only_be_left_out(tmp_path: Path) -> None:
    path = foreign_clips.save(tmp_path / "a.avi", sound_seconds=1, sound_codec="pcm_mulaw")
    sound = find_sound(path)
    assert sound is not None
    for suffix in (".mp4", ".mkv"):
        with pytest.raises(MediaError, match=rf"to an \{suffix}; leave it out with --no-audio"):
            require_sound_fits(suffix, sound)


def test_a_silent_clip_has_no_sound(tmp_path: Path) -> None:
    assert find_sound(foreign_clips.save(tmp_path / "a.mp4")) is None
