"""Tiny clips, pictures and tables as training data comes."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from swifti2v.media import open_writer
from swifti2v.training.data.samples import MediaFile, Sample

OPENVID = (
    "video", "caption", "aesthetic score", "motion score", "temporal consistency score",
    "camera motion", "frame", "fps", "seconds",
)  # fmt: skip
ULTRAVIDEO = (
    "clip_id", "url", "frame_width", "frame_height", "fps", "start_frame", "end_frame",
    "total_frames", "start_time", "end_time", "duration", "vtss_score", "motion_score",
    "video_clip_score", "Brief Description", "Detailed Description", "Background",
    "Theme Description", "Style", "Shot Type", "Camera Movement", "Lighting",
    "Video Atmosphere", "Summarized Description",
)  # fmt: skip


def save_counting_clip(
    path: Path, num_frames: int, fps: float = 16, height: int = 32, width: int = 48, **options: Any
) -> Path:
    """A clip whose grey level is four times the number of the frame."""
    levels = (4 * np.arange(num_frames)).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)).copy()
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"codec": "ffv1", **options} if path.suffix == ".mkv" else {"crf": 4, **options}
    with open_writer(path, height=height, width=width, fps=fps, **options) as writer:
        writer.write(frames)
    return path


def save_damaged_clip(path: Path, num_frames: int = 30, height: int = 32, width: int = 48) -> Path:
    """A clip whose header and first frames are fine, and which breaks off in its midst."""
    shape = (num_frames, height, width, 3)
    frames = np.random.default_rng(3).integers(0, 256, shape, np.uint8)
    with av.open(path, "w", format="mov") as container:
        stream = container.add_stream("png", rate=16)
        stream.height, stream.width, stream.pix_fmt = height, width, "rgb24"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    path.write_bytes(data)
    return path


def save_picture(path: Path, height: int = 32, width: int = 48) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (200, 100, 50)).save(path)
    return path


def save_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Cells that a row does not name stay empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def sample_of(path: Path, **changes: Any) -> Sample:
    kind = "image" if path.suffix == ".png" else "video"
    return Sample(
        **{"id": path.name, "media": MediaFile(path), "kind": kind, "prompt": "x", **changes}
    )


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers of the frames of a clip that counts."""
    return [round(float(frame.mean()) / 4) for frame in frames]
