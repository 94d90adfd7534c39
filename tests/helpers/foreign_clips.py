"""Tiny clips as cameras, browsers and editors write them."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

HEIGHT, WIDTH = 64, 96
RED, BLUE = (200, 40, 40), (40, 40, 200)


def counting(num_frames: int) -> np.ndarray:
    """Frames whose grey level is four times their number, red at the top left, blue opposite."""
    levels = (4 * np.arange(num_frames)).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (num_frames, HEIGHT, WIDTH, 3)).copy()
    frames[:, :16, :24], frames[:, -16:, -24:] = RED, BLUE
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers of frames that count, by their middle."""
    height, width = frames.shape[1:3]
    middle = frames[:, height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4]
    return [round(float(frame.mean()) / 4) for frame in middle]


def corners(frame: np.ndarray) -> dict[str, str]:
    """Places of red and blue."""
    places = {"TL": frame[3, 3], "TR": frame[3, -4], "BL": frame[-4, 3], "BR": frame[-4, -4]}
    return {
        name: place
        for place, (red, _, blue) in places.items()
        for name, value, other in (("red", red, blue), ("blue", blue, red))
        if value > 150 > other
    }


def save(
    path: Path,
    num_frames: int = 17,
    *,
    rate: Fraction | int = 16,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    times: Sequence[int] | None = None,
    tick: Fraction | None = None,
    pixel_aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    mux: dict[str, str] | None = None,
    sound_seconds: float = 0,
    sound_codec: str | None = None,
    frames: np.ndarray | None = None,
) -> Path:
    """A clip that counts, or of the given frames, beside a rising tone of a length of its own."""
    frames = counting(num_frames) if frames is None else frames
    layout = "rgba" if frames.shape[-1] == 4 else "rgb24"
    with av.open(path, "w", options=mux or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = tick or 1 / Fraction(rate)
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        sound = _add_sound(container, path, sound_codec) if sound_seconds else None
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format=layout)
            picture.pts = times[index] if times else index
            picture.time_base = tick or 1 / Fraction(rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        if sound is not None:
            _mux_tone(container, sound, sound_seconds)
    return path


def _add_sound(container: Any, path: Path, codec: str | None = None) -> Any:
    name = codec or {".webm": "libopus", ".mpg": "mp2"}.get(path.suffix, "aac")
    return container.add_stream(name, rate=48000, layout="mono")


def _mux_tone(container: Any, sound: Any, seconds: float) -> None:
    size = sound.codec_context.frame_size or 960
    for start in range(0, round(48000 * seconds), size):
        times = np.arange(start, start + size)[None] / 48000
        wave = np.sin(2 * np.pi * 440 * (1 + times) * times).astype(np.float32)
        samples = av.AudioFrame.from_ndarray(wave, "fltp", "mono")
        samples.sample_rate, samples.pts, samples.time_base = 48000, start, Fraction(1, 48000)
        container.mux(sound.encode(samples))
    container.mux(sound.encode())


def save_sound(path: Path, *, cover: bool = False) -> Path:
    """Half a second of sound, with or without a picture for a player to show."""
    with av.open(path, "w") as container:
        sound = _add_sound(container, path)
        if cover:
            picture: Any = container.add_stream("mjpeg", rate=1)
            picture.height, picture.width, picture.pix_fmt = HEIGHT, WIDTH, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            image = av.VideoFrame.from_ndarray(counting(1)[0], format="rgb24")
            container.mux(picture.encode(image))
            container.mux(picture.encode())
        _mux_tone(container, sound, 0.5)
    return path


def save_behind_still(path: Path, num_frames: int) -> Path:
    """A clip whose first video track is one picture."""
    with av.open(path, "w") as container:
        streams: list[Any] = [container.add_stream(name, rate=16) for name in ("mjpeg", "libx264")]
        for stream, pixel_format in zip(streams, ("yuvj420p", "yuv420p"), strict=True):
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pixel_format
        for stream, count in zip(streams, (1, num_frames), strict=True):
            for frame in counting(count):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return path


def save_recording(path: Path, times: Sequence[int]) -> Path:
    """Clip as a browser records it: no length, no rate, times in milliseconds."""
    live: dict[str, Any] = {
        "options": {"deadline": "realtime", "cpu-used": "8"},
        "mux": {"live": "1"},
    }
    save(path, len(times), rate=1000, codec="libvpx", times=times, tick=Fraction(1, 1000), **live)
    data = path.read_bytes()
    start = data.find(b"\x23\xe3\x83")  # the rate it states, made into an element that says nothing
    size = 4 + (data[start + 3] & 0x7F)
    void = b"\xec" + bytes([0x80 | size - 2]) + bytes(size - 2)
    path.write_bytes(data[:start] + void + data[start + size :])
    return path


def cut(source: Path, target: Path, *, first: int = 0, shift: Fraction = Fraction(0)) -> Path:
    """Packets from ``first`` on, times moved back: a cut without encoding again."""
    with av.open(source) as read, av.open(target, "w") as written:
        stream = read.streams.video[0]
        copy = written.add_stream_from_template(stream)
        ticks = int(shift / Fraction(stream.time_base or 1))
        packets = [packet for packet in read.demux(stream) if packet.dts is not None]
        for packet in packets[first:]:
            assert packet.pts is not None
            assert packet.dts is not None
            packet.stream = copy
            packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
            written.mux(packet)
    return target


def set_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Put a display matrix into an MP4's track header (ISO/IEC 14496-12, section 8.3.2)."""
    data = bytearray(path.read_bytes())
    start = data.find(b"tkhd") + 44
    values = [value << 16 for value in (a, b, 0, c, d, 0, 0, 0)]
    data[start : start + 36] = struct.pack(">8iI", *values, 1 << 30)
    path.write_bytes(data)
    return path
