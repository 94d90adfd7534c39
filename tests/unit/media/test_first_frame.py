"""Clips read from a frame on: the same frames as in a whole reading, with less decoding."""

from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from swifti2v.media import iter_frames
from swifti2v.media.clips import _decode
from swifti2v.media.tracks import find_track

NUM_FRAMES = 60
KINDS = {
    "h264.mp4": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    "h264.mkv": ("libx264", {"g": "250", "bf": "2"}),
    "h265.mp4": ("libx265", {"x265-params": "keyint=16:log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"g": "10", "deadline": "realtime"}),
    "intra.mov": ("mjpeg", {}),
    "noise.avi": ("mpeg4", {"g": "12"}),
    "stream.ts": ("libx264", {"g": "12"}),
}


def save(path: Path, codec: str, options: dict[str, str], rate: Fraction, start: int = 0) -> Path:
    rng = np.random.default_rng(0)
    still = rng.integers(0, 256, (64, 96, 3), np.uint8)
    with av.open(path, "w") as container:
        stream: Any = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = 64, 96
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(NUM_FRAMES):
            frame = av.VideoFrame.from_ndarray(np.roll(still, 3 * number, axis=1), format="rgb24")
            frame.pts, frame.time_base = start + number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30000, 1001)])
def test_frames_from_one_on_are_those_of_the_whole_clip(kind, rate, tmp_path):
    path = save(tmp_path / kind, *KINDS[kind], rate, start=7)
    for fps in (None, 16.0, 24.0, 40.0):
        whole = list(iter_frames(path, fps))
        for first in (0, 1, 11, 12, 13, 27, len(whole) - 1):
            part = list(iter_frames(path, fps, first=first, max_frames=5, min_frames=1))
            expected = list(islice(whole, first, first + 5))
            assert len(part) == len(expected)
            assert all(np.array_equal(*pair) for pair in zip(part, expected, strict=True))


def test_a_varying_rate_is_counted_from_the_start(tmp_path):
    path = tmp_path / "vary.mkv"
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv420p"
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 8 * number, np.uint8), "rgb24")
            frame.pts, frame.time_base = number + number // 5 * 3, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    whole = list(iter_frames(path, 16.0))
    part = list(iter_frames(path, 16.0, first=9))
    assert [int(frame.mean()) for frame in part] == [int(frame.mean()) for frame in whole[9:]]


def test_what_lies_before_is_not_decoded(tmp_path):
    path = save(tmp_path / "h264.mp4", *KINDS["h264.mp4"], Fraction(25))
    track = find_track(path, None)
    assert track.can_seek
    target = track.start + Fraction(40, 25)
    first, _ = next(_decode(path, track, target))
    assert target - Fraction(14, 25) < first <= target
