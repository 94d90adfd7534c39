"""Measure the attention of docs/vibe.md on nano, without training; writes the table there.

python runs/vibe_attention.py CLIPS_DIR (about 10 minutes on two idle cores). Nano's Stage II, trained with full
attention on 24x40 tokens, refines held-out clips from their small versions and first frames.
"""

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from swifti2v import SwiftI2VPipeline
from swifti2v.config import AttentionConfig
from swifti2v.evaluation.intervals import bootstrap_mean
from swifti2v.evaluation.metrics.detail_coherence import hf_energy_ratio
from swifti2v.evaluation.metrics.fidelity import psnr
from swifti2v.media import (
    Frames,
    fit_image,
    frames_to_video,
    read_clip,
    resize_video,
    video_to_frames,
)

CLIPS = ("swifti2v_page_14", "swifti2v_page_4090_4", "sam2_05_default_juggle")
SEEDS = (0, 1, 2)
NUM_FRAMES = 13
DOCUMENT = Path(__file__).parent.parent / "docs" / "vibe.md"
MARK = "<!-- attention table -->\n"
FULL = "full"
Scores = tuple[float, ...]
"""PSNR to the truth, PSNR to full attention, high-frequency energy."""
COARSE_KEYS: dict[str, dict[str, Any]] = {
    "pooled after RoPE": {},
    "pooled before RoPE": {"pooled_keys": "before_rope"},
    "no coarse keys": {"pool": None},
}
ARMS = {
    FULL: AttentionConfig(),
    **{
        f"{rows}x{columns}, {name}": AttentionConfig(kind="gclf", window=(rows, columns), **values)
        for (rows, columns), (name, values) in product(
            ((12, 20), (6, 10)),
            COARSE_KEYS.items(),
        )
    },
}


def refine(pipe: SwiftI2VPipeline, truth: Frames, seed: int, attention: AttentionConfig) -> Frames:
    """Stage II over a clip's small version, with its first frame as the photo."""
    height, width = truth.shape[1:3]
    low = resize_video(frames_to_video(truth), height // 4, width // 4, "area")
    config = pipe.configure(num_frames=len(truth))
    config = replace(config, stage2=replace(config.stage2, attention=attention))
    pieces = pipe.refine(
        video_to_frames(low), Image.fromarray(truth[0]), "", generator=seed, config=config
    )
    return np.concatenate([piece.frames for piece in pieces])


def main(clips: Path) -> None:
    """Measure every arm and put the table into the document."""
    pipe = SwiftI2VPipeline.from_pretrained("nano", stages=("stage2",))
    size = pipe.config.height, pipe.config.width
    scores: dict[str, list[Scores]] = {arm: [] for arm in ARMS}
    for name in CLIPS:
        frames = read_clip(clips / f"{name}.mp4", fps=pipe.config.fps, max_frames=NUM_FRAMES).frames
        truth = np.stack([np.asarray(fit_image(Image.fromarray(f), *size).image) for f in frames])
        own: dict[str, list[Scores]] = {arm: [] for arm in ARMS}
        for seed in SEEDS:
            full = refine(pipe, truth, seed, ARMS[FULL])
            for arm, attention in ARMS.items():
                output = full if arm == FULL else refine(pipe, truth, seed, attention)
                own[arm].append(
                    (
                        float(psnr(output[1:], truth[1:]).mean()),
                        float("nan") if arm == FULL else float(psnr(output[1:], full[1:]).mean()),
                        float(hf_energy_ratio(output[1:], truth[1:]).mean()),
                    )
                )
        for arm, values in own.items():
            scores[arm].append(tuple(np.mean(values, axis=0)))
        sys.stderr.write(f"{name} done\n")
    head = (
        "| window, coarse keys | PSNR to the truth, dB | PSNR to full attention, dB | HF energy |"
    )
    lines = [head, "| --- | --- | --- | --- |"]
    for arm, values in scores.items():
        cells = [bootstrap_mean(column) for column in zip(*values, strict=True)]
        texts = [
            "" if c.low is None else f"{c.value:.2f} [{c.low:.2f}, {c.high:.2f}]" for c in cells
        ]
        lines.append(f"| {arm} | {' | '.join(texts)} |")
    note = (
        f"_Nano, {NUM_FRAMES} frames of {size[1]}x{size[0]} (24x40 tokens), {len(CLIPS)} held-out "
        f"clips, mean of {len(SEEDS)} seeds; brackets hold 95 % intervals over the clips, hardly "
        "more than their range. Attention is swapped in without training. Written by "
        "`python runs/vibe_attention.py CLIPS`._"
    )
    before, _, after = DOCUMENT.read_text(encoding="utf-8").partition(MARK)
    rest = after.partition("\n## ")
    table = "\n".join([MARK, note, "", *lines, ""])
    DOCUMENT.write_text(f"{before}{table}{rest[1]}{rest[2]}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
