"""Relay LoRA, HFATO and GCLF at nano scale; writes the tables into docs/vibe.md.

python runs/vibe_relay.py DATA_DIR OUTPUT_DIR (about ten minutes on an idle core; a second start goes on). For each seed a
small Stage II is trained on clips of half size and crops of 4x4 tokens. LoRAs on it see images of full size and crops of
8x8 tokens; all are measured on crops of held-out clips of full size, beside a Stage II that was trained on such clips.
"""

import copy
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from swifti2v import SwiftI2VPipeline
from swifti2v.config import AttentionConfig, GenerationConfig
from swifti2v.errors import InputError
from swifti2v.evaluation.metrics.detail_coherence import detail_coherence, hf_energy_ratio
from swifti2v.evaluation.metrics.fidelity import clip_psnr
from swifti2v.evaluation.metrics.noise import temporal_noise
from swifti2v.evaluation.metrics.temporal import compensated_flicker
from swifti2v.media import Frames, downscale, frames_to_video, resize_video, video_to_frames
from swifti2v.models.lora.merge import merge_lora
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.storage import write_whole
from swifti2v.training.ablations.clips import TestClip, cut_test_clips
from swifti2v.training.ablations.comparison import compare, render_comparison
from swifti2v.training.adapters import AdapterConfig, adapter_state_dict, add_adapter
from swifti2v.training.data.crops import cut_clip, draw_crop
from swifti2v.training.data.readers import CLIP_SUFFIXES, PHOTO_SUFFIXES
from swifti2v.training.engine.draws import Draw
from swifti2v.training.engine.optimizers import OptimizerConfig
from swifti2v.training.engine.ranks import Ranks
from swifti2v.training.engine.run_config import PhaseConfig, RunConfig
from swifti2v.training.engine.session import Session, train_task
from swifti2v.training.nano.material import Material, read_material
from swifti2v.training.nano.material_source import MaterialSource, MixConfig
from swifti2v.training.nano.models import NanoSize, make_stage2_transformer
from swifti2v.training.nano.stage2_start import make_stage2_task, start_stage2
from swifti2v.training.relay.degradations import DegradationConfig
from swifti2v.training.relay.image_task import ImageObjective, ImageTask
from swifti2v.training.stages.batches import VideoBatch
from swifti2v.training.stages.noise_levels import NoiseLevelConfig
from swifti2v.training.stages.stage2 import Stage2Objective, Stage2Task
from swifti2v.training.windows import WindowConfig

Row = dict[str, Any]
"""Measurements of one arm, seed and clip."""
Make = Callable[[TestClip], Frames]
"""Makes a clip from its small version and first frame."""

HELD_OUT = (
    "swifti2v_page_14", "swifti2v_page_4090_4", "sam2_05_default_juggle", "sam2_bedroom", "cockatoo",
    "sam2_cars", "snake",
)  # fmt: skip
SEEDS = (0, 1, 2)
SIZE = NanoSize(num_heads=4, num_layers=2)
NUM_FRAMES, CROP, NUM_CROPS = 17, 128, 2
VIDEO_STEPS, IMAGE_STEPS, BATCH = 100, 100, 4
VIDEO_RATE, IMAGE_RATE = 3.0e-4, 1.0e-3
READ_FRAMES = 33
NOISE = NoiseLevelConfig(distribution="inference", num_inference_steps=8)
NUM_INFERENCE_STEPS, STRENGTH = 4, 0.7
GCLF = AttentionConfig(kind="gclf", window=(4, 4))
FULL = AttentionConfig()
FLOW = ImageObjective(noise=NOISE, channel_weight_limit=2.0)
HFATO = replace(FLOW, loss="hfato", degradation=DegradationConfig())
HFATO_PIXELS = replace(HFATO, degradation=None)
ADAPTER = AdapterConfig(rank=16)
METRICS = {
    "psnr_db": ("PSNR, dB", "+.2f"),
    "coherence": ("coherence", "+.3f"),
    "hf_db": ("HF energy, dB of the truth's", "+.2f"),
    "boiling": ("temporal noise of the error, /255", "+.2f"),
    "temporal_noise": ("temporal noise where nothing moves, /255", "+.2f"),
    "steadiness": ("steadiness along motion", "+.4f"),
}
BASE = "base, low resolution only"
CLAIMS = (
    ("images alone fit a base to a larger size", "relay, HFATO, GCLF", BASE, "psnr_db", 1),
    ("a relay leaves less of the image modality than a plain LoRA", "relay", "naive LoRA", "boiling", -1),
    ("LoRA1 is better dropped", "relay, HFATO", "relay, HFATO, LoRA1 kept", "boiling", -1),
    ("HFATO brings back right detail", "relay, HFATO", "relay", "coherence", 1),
    ("HFATO comes closer to the truth", "relay, HFATO", "relay", "psnr_db", 1),
    ("GCLF helps beyond the native size", "relay, HFATO, GCLF", "relay, HFATO", "psnr_db", 1),
    ("the whole recipe comes closer to the truth than Lanczos", "relay, HFATO, GCLF", "Lanczos", "psnr_db", 1),
    ("it has more right detail than Lanczos", "relay, HFATO, GCLF", "Lanczos", "coherence", 1),
    ("it comes closer than training on large clips", "relay, HFATO, GCLF",
     "Stage II trained on large clips", "psnr_db", 1),
)  # fmt: skip
"""Claim, arm, what it is compared with, by which metric, and the sign that speaks for it."""
DOCUMENT = Path(__file__).parent.parent / "docs" / "vibe.md"
MARK = "<!-- relay table -->\n"


@dataclass(frozen=True)
class Arm:
    """A LoRA on high-resolution images: on the bare base or on one with LoRA1 fused."""

    is_relay: bool
    objective: ImageObjective
    attention: AttentionConfig


ARMS = {
    "naive LoRA": Arm(False, FLOW, FULL),
    "relay": Arm(True, FLOW, FULL),
    "relay, HFATO": Arm(True, HFATO, FULL),
    "relay, HFATO, GCLF": Arm(True, HFATO, GCLF),
    "relay, HFATO from the upscaled image": Arm(True, HFATO_PIXELS, FULL),
}


class PictureCrops:
    """Square crops of pictures in memory, half of them mirrored.

    Args:
        pictures: ``[H, W, 3]`` uint8 each, of any size.
        crop: Side in pixels.

    Raises:
        InputError: No picture is large enough.
    """

    def __init__(self, pictures: Sequence[Frames], crop: int) -> None:
        self.pictures = [picture for picture in pictures if min(picture.shape[:2]) >= crop]
        self.crop = crop
        if not self.pictures:
            raise InputError(
                f"none of {len(pictures)} pictures is {crop} px large; add larger ones"
            )

    def load(self, draw: Draw) -> VideoBatch:
        """See ``FrameSource``."""
        names, videos = [], []
        for rng in draw.samples():
            index = int(rng.integers(len(self.pictures)))
            picture = self.pictures[index]
            place = draw_crop((picture.shape[0], picture.shape[1]), self.crop, 1, rng)
            video = cut_clip(picture[None], place)
            videos.append(video.flip(-1) if rng.random() < 0.5 else video)
            names.append(f"picture {index}")
        prompts = ("",) * len(names)
        return VideoBatch(
            ids=tuple(names), num_replaced=0, video=torch.cat(videos), prompts=prompts
        )


def halve(frames: Frames) -> Frames:
    """``[T, H, W, 3]`` at half the size."""
    return downscale(frames, 2)


class Proof:
    """All runs of a seed after the other; an arm whose rows are on disk is not done again."""

    def __init__(self, data_dir: Path, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.pipe = SwiftI2VPipeline.from_pretrained("nano", stages=("stage2",))
        self.data_dir = data_dir
        self.factor = self.pipe.config.stage1.downscale
        self.text_dim = int(self.pipe.components.stage2_transformer.config["text_dim"])

    @cached_property
    def _split(self) -> tuple[Material, Material]:
        suffixes = CLIP_SUFFIXES | PHOTO_SUFFIXES
        names = {p.stem for p in self.data_dir.rglob("*") if p.suffix.lower() in suffixes}
        config = self.pipe.config
        read = partial(
            read_material,
            self.data_dir,
            height=config.height,
            width=config.width,
            fps=config.fps,
            max_frames=READ_FRAMES,
        )
        return read(held_out=HELD_OUT), read(held_out=sorted(names - {*HELD_OUT}))

    @cached_property
    def _materials(self) -> tuple[Material, Material]:
        """To train on: at full and at half size."""
        full = self._split[0]
        return full, Material(
            tuple(halve(clip) for clip in full.clips),
            tuple(halve(still[None])[0] for still in full.stills),
            tuple(halve(even(picture)[None])[0] for picture in full.pictures),
        )

    @cached_property
    def _tests(self) -> list[TestClip]:
        return cut_test_clips(self._split[1], NUM_FRAMES, CROP, NUM_CROPS, self.factor)

    def _settings(
        self, attention: AttentionConfig = FULL, strength: float = STRENGTH
    ) -> GenerationConfig:
        config = replace(self.pipe.config, num_frames=NUM_FRAMES, height=CROP, width=CROP)
        sampling = replace(
            config.stage2.sampling, num_inference_steps=NUM_INFERENCE_STEPS, strength=strength
        )
        # The photo's own detail, carried along, would hide what a LoRA learned of detail.
        stage2 = replace(
            config.stage2, attention=attention, sampling=sampling, reference_detail="none"
        )
        return replace(config, stage2=stage2)

    def _encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), 1, self.text_dim)

    def _session(self, name: str, seed: int) -> Session:
        ranks = Ranks.alone(torch.device("cpu"))
        return Session(directory=self.output_dir / f"{name}-{seed}", ranks=ranks, resume=True)

    def _train(
        self, task: Stage2Task | ImageTask, name: str, seed: int, steps: int, rate: float
    ) -> None:
        optimizer = OptimizerConfig(
            learning_rate=rate, decay="cosine_tail", betas=(0.9, 0.97), warmup_steps=20
        )
        run = RunConfig(seed=seed, batch_size=BATCH, ema_decay=0.99, num_checkpoints=1)
        phases = (PhaseConfig(steps=steps, optimizer=optimizer),)
        train_task(task, run, phases, self._session(name, seed))

    def video_model(
        self, name: str, material: Material, crop: int, seed: int
    ) -> SegmentTransformer3DModel:
        """A Stage II from nothing, on clips."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer = make_stage2_transformer(SIZE, self.text_dim)
        codec: Any = self.pipe.components.stage2_vae
        stage2 = self._settings().stage2
        source = MaterialSource(
            material,
            (),
            MixConfig(clips=0.5, pictures=0.5),
            crop,
            self.factor,
            {NUM_FRAMES: 1},
            WindowConfig(segment_sizes=(3,), context_sizes=(1,)),
            stage2,
        )
        objective = Stage2Objective(noise=NOISE, channel_weight_limit=2.0)
        task = make_stage2_task(transformer, codec, objective, stage2, [source])
        if not (self.output_dir / f"{name}-{seed}" / "checkpoints" / "latest").is_file():
            start_stage2(task, RunConfig(seed=seed, batch_size=BATCH))
        self._train(task, name, seed, VIDEO_STEPS, VIDEO_RATE)
        transformer.requires_grad_(False)
        return transformer

    def lora(
        self,
        base: SegmentTransformer3DModel,
        name: str,
        seed: int,
        *,
        stills: Sequence[Frames],
        crop: int,
        objective: ImageObjective,
        attention: AttentionConfig = FULL,
    ) -> dict[str, Tensor]:
        """A LoRA on images; the base stays as it is."""
        transformer = copy.deepcopy(base)
        add_adapter(transformer, replace(ADAPTER, seed=seed))
        task = ImageTask(
            transformer,
            self.pipe.components.stage2_vae,
            (PictureCrops(stills, crop),),
            objective,
            self._settings(attention),
            self._encode_prompts,
        )
        self._train(task, name, seed, IMAGE_STEPS, IMAGE_RATE)
        return adapter_state_dict(transformer)

    def measure(self, arm: str, seed: int, make: Make) -> list[Row]:
        """Rows of one way to make the test clips."""
        rows = []
        for clip in self._tests:
            output, truth = make(clip), clip.truth
            error = (output.astype(np.float32) - truth)[1:].mean(axis=-1)
            rows.append({
                "arm": arm, "seed": seed, "group": "held-out clips", "clip": clip.name,
                "psnr_db": clip_psnr(output[1:], truth[1:]),
                "coherence": detail_coherence(output, truth),
                "hf_ratio": float(hf_energy_ratio(output[1:], truth[1:]).nanmean()),
                "boiling": float(np.diff(error, axis=0).std() / np.sqrt(2)),
                "temporal_noise": 255 * temporal_noise(output[1:]),
                "steadiness": compensated_flicker(output),
            })  # fmt: skip
        return rows

    def _sample(
        self,
        transformer: SegmentTransformer3DModel,
        settings: GenerationConfig,
        seed: int,
        clip: TestClip,
    ) -> Frames:
        parts = replace(self.pipe.components, stage2_transformer=transformer.eval())
        pieces = SwiftI2VPipeline(parts, settings).refine(
            clip.low, Image.fromarray(clip.truth[0]), "", generator=seed, config=settings
        )
        return np.concatenate([piece.frames for piece in pieces])

    def rows(self, seed: int) -> list[Row]:
        """Measurements of all arms of a seed."""
        rows = self._keep("Lanczos", seed, lambda: self._enlarge)
        rows += self._keep("the truth", seed, lambda: lambda clip: clip.truth)

        def add(name: str, make: Callable[[], SegmentTransformer3DModel], **changes: Any) -> None:
            settings = self._settings(**changes)
            rows.extend(
                self._keep(name, seed, lambda: partial(self._sample, make(), settings, seed))
            )

        base = cache(lambda: self.video_model("base", self._materials[1], CROP // 2, seed))
        add(BASE, base)
        add("base, GCLF swapped in", base, attention=GCLF)
        fused = cache(lambda: merged(base(), self._lora1(base(), seed)))
        for name, arm in ARMS.items():
            start = fused if arm.is_relay else base
            lora2 = cache(partial(self._lora2, start, name, arm, seed))
            add(name, lambda: merged(base(), lora2()), attention=arm.attention)  # noqa: B023
            if name == "relay, HFATO":
                add("relay, HFATO, LoRA1 kept", lambda: merged(fused(), lora2()))  # noqa: B023
        video = cache(lambda: self.video_model("video", self._materials[0], CROP, seed))
        add("Stage II trained on large clips", video)
        add("Stage II trained on large clips, strength 1", video, strength=1.0)
        return rows

    def _keep(self, name: str, seed: int, make: Callable[[], Make]) -> list[Row]:
        """Rows of an arm, from disk where it was measured."""
        path = self.output_dir / "rows" / f"{slug(name)}-{seed}.json"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            write_whole(path, json.dumps(self.measure(name, seed, make())))
            sys.stderr.write(f"seed {seed}: {name}\n")
        rows: list[Row] = json.loads(path.read_text())
        return rows

    def _lora1(self, base: SegmentTransformer3DModel, seed: int) -> dict[str, Tensor]:
        stills = self._materials[1].stills
        return self.lora(base, "relay1", seed, stills=stills, crop=CROP // 2, objective=FLOW)

    def _lora2(
        self, start: Callable[[], SegmentTransformer3DModel], name: str, arm: Arm, seed: int
    ) -> dict[str, Tensor]:
        return self.lora(
            start(),
            slug(name),
            seed,
            stills=self._materials[0].stills,
            crop=CROP,
            objective=arm.objective,
            attention=arm.attention,
        )

    def _enlarge(self, clip: TestClip) -> Frames:
        low = frames_to_video(clip.low)
        output = video_to_frames(resize_video(low, CROP, CROP, "lanczos"))
        return np.concatenate([clip.truth[:1], output[1:]])


def slug(name: str) -> str:
    """For file names."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def even(picture: Frames) -> Frames:
    """Without an odd last row or column."""
    return picture[: len(picture) // 2 * 2, : picture.shape[1] // 2 * 2]


def merged(
    transformer: SegmentTransformer3DModel, lora: Mapping[str, Tensor]
) -> SegmentTransformer3DModel:
    """A copy with a LoRA in its weights."""
    other = copy.deepcopy(transformer)
    merge_lora(other, {key: value.clone() for key, value in lora.items()})
    return other


def judge(rows: Sequence[Row]) -> str:
    """Table of the claims, each with what the runs say about it."""
    lines = ["| claim | compared | difference | shows |", "| --- | --- | --- | --- |"]
    for claim, arm, base, metric, sign in CLAIMS:
        found = compare(rows, "held-out clips", metric, base, arm)
        title, form = METRICS[metric]
        if found is None or found.low is None or found.high is None:
            interval, verdict = "too few runs", "not measured"
        else:
            interval = f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})"
            ends = sorted((sign * found.low, sign * found.high))
            verdict = "yes" if ends[0] > 0 else "the opposite" if ends[1] < 0 else "not told apart"
        lines.append(f"| {claim} | {arm}, minus {base}: {title} | {interval} | {verdict} |")
    return "\n".join(lines)


def write_document(rows: list[Row]) -> None:
    """Put the table into the document: base's values, and the others' differences from it."""
    rows = [{**row, "hf_db": 10 * math.log10(row["hf_ratio"])} for row in rows]
    rows.sort(key=lambda row: row["arm"] != BASE)  # the base first, the others in order
    note = (
        f"_{len({row['seed'] for row in rows})} seeds, {len({row['clip'] for row in rows})} crops of {CROP}x{CROP} px and "
        f"{NUM_FRAMES} frames of held-out clips; {VIDEO_STEPS} steps on clips, {IMAGE_STEPS} a LoRA (rank {ADAPTER.rank}); "
        f"strength {STRENGTH:g}. First row: values; below: differences from it with 95 % bootstrap intervals over seeds and "
        "clips, bold where 0 is outside. Written by `python runs/vibe_relay.py DATA OUTPUT`._"
    )
    table = render_comparison(rows, metrics=METRICS)
    before, _, after = DOCUMENT.read_text(encoding="utf-8").partition(MARK)
    end = after[after.index("<!-- end -->") :]
    DOCUMENT.write_text(
        f"{before}{MARK}{note}\n\n{table}\n{judge(rows)}\n\n{end}", encoding="utf-8"
    )


def main(data_dir: Path, output_dir: Path) -> None:
    """Train, measure and write."""
    output_dir.mkdir(parents=True, exist_ok=True)
    proof = Proof(data_dir, output_dir)
    rows = []
    for seed in SEEDS:
        rows += proof.rows(seed)
        write_document(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
