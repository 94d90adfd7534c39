"""Costs of feeding Stage II at 2560x1408 from made clips: processor seconds a sample, memory of a rank.

    python runs/feeding_2k.py DIRECTORY [--frames 97]

Clips (H.264, a camera over noise and shapes) are made in DIRECTORY once. Decoding and resizing are
timed apart, for whole pieces of 81 frames; then two workers read windows as ``train stage2`` does.
"""

import argparse
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from swifti2v.config import GenerationConfig
from swifti2v.media import iter_frames, open_writer
from swifti2v.models.loading.architectures import find_architecture
from swifti2v.models.loading.sources import find_model
from swifti2v.shapes import PixelShape
from swifti2v.training.data.buckets import BucketRules
from swifti2v.training.data.clips import DataConfig, ManifestClips, ManifestConfig
from swifti2v.training.data.decoding import decode_clip
from swifti2v.training.engine.draws import Draw, split_batch
from swifti2v.training.engine.task import read_ahead
from swifti2v.training.stages.clip_sources import Stage2Clips
from swifti2v.training.windows import WindowConfig

BUCKET = PixelShape(81, 1408, 2560)
SIZES = ((1408, 2560), (2160, 3840))
NUM_CLIPS, NUM_SAMPLES, NUM_WORKERS = 2, 8, 2
GB = 2**30


def make_clip(path: Path, height: int, width: int, num_frames: int, seed: int) -> None:
    """A camera that goes over a picture of soft shapes with some grain."""
    if path.exists():
        return
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), np.uint8))
    size = (width + 4 * num_frames, height + 2 * num_frames)
    picture = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    picture = np.clip(picture + rng.integers(-12, 13, picture.shape), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"unfinished-{path.name}")
    with open_writer(aside, height=height, width=width, fps=16, crf=23) as writer:
        for number in range(num_frames):
            top, left = 2 * number, 4 * number
            writer.write(picture[None, top : top + height, left : left + width])
    aside.rename(path)


def clips_of(folder: Path) -> ManifestClips:
    """The clips of a folder in one bucket, as a training takes them."""
    rules = BucketRules(buckets=((BUCKET.num_frames, BUCKET.height, BUCKET.width),))
    config = DataConfig(manifests=(ManifestConfig(path=str(folder)),), rules=rules)
    return ManifestClips(config, 1, 0, "stop")


def time_decoding(clips: ManifestClips) -> tuple[float, float]:
    """Processor seconds to decode a piece of 81 frames, and to resize it besides."""
    whole, plain = [], []
    for placement in clips.placements.values():
        start = time.process_time()
        decode_clip(placement.sample, BUCKET, 16.0, np.random.default_rng(0), facts=placement.facts)
        whole.append(time.process_time() - start)
        path = placement.sample.open()
        assert isinstance(path, Path)
        start = time.process_time()
        for _ in iter_frames(path, 16.0, max_frames=BUCKET.num_frames):
            pass
        plain.append(time.process_time() - start)
    return min(plain), max(0.0, min(whole) - min(plain))


class Feeding:
    """Loads windows as Stage II's task does; nothing is encoded."""

    def __init__(self, clips: Stage2Clips) -> None:
        self.clips = clips

    def load_batch(self, draw: Draw) -> Any:
        """Read a micro-batch."""
        return self.clips.load(draw)


class Watch(threading.Thread):
    """Most memory of this process and its children, shared pages counted once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.is_over = 0, False

    def run(self) -> None:
        """Look again and again until ``is_over``."""
        own = psutil.Process()
        while not self.is_over:
            total = 0
            for process in (own, *own.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.most = max(self.most, total)
            time.sleep(0.2)


def feed(clips: ManifestClips) -> tuple[float, float, float]:
    """Processor seconds a sample, seconds a sample, and the most bytes of a rank with two workers."""
    index, root = find_model("paper")
    vae: Any = find_architecture("stage2_vae", index.components["stage2_vae"], root).make_empty("")
    source = Stage2Clips(clips, WindowConfig(), vae, 4, None, GenerationConfig().stage2)
    watch, own = Watch(), psutil.Process()
    watch.start()
    parts = split_batch(1, 1, 1)
    task: Any = Feeding(source)
    batches = read_ahead(task, 0, parts, 0, range(NUM_SAMPLES), NUM_WORKERS)
    start, used = time.perf_counter(), 0.0
    for number, _ in enumerate(batches, 1):
        if number == NUM_SAMPLES:
            used = sum(sum(c.cpu_times()[:2]) for c in own.children(recursive=True))
    seconds = time.perf_counter() - start
    watch.is_over = True
    return used / NUM_SAMPLES, seconds / NUM_SAMPLES, watch.most


def main() -> None:
    """Print a row of the table for each size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--frames", type=int, default=97)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for height, width in SIZES:
        folder = options.directory / f"{width}x{height}"
        for number in range(NUM_CLIPS):
            path = folder / f"{number}.mp4"
            make_clip(path, height, width, options.frames, number)
            path.with_suffix(".txt").write_text("a camera goes right")
        clips = clips_of(folder)
        decoding, resizing = time_decoding(clips)
        used, seconds, most = feed(clips)
        sys.stdout.write(
            f"| {width}x{height} | {decoding:.1f} | {resizing:.1f} | {used:.1f} | {seconds:.1f} | "
            f"{most / GB:.2f} |\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
