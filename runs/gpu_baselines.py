"""Clips of other systems at 2560x1408, each by its public id with its own settings; needs a GPU.

python runs/gpu_baselines.py ROW PHOTOS OUTPUT makes OUTPUT/ROW/NAME.mp4 for every PHOTOS/NAME.png (or
.jpg) with the prompt in PHOTOS/NAME.txt; what is there is kept. OUTPUT/ROW.jsonl gets seconds and peak memory.
Rows: wan22_ti2v_5b, ltx2_two_stage. Then, with clips of ours in OUTPUT/ours,

    swifti2v evaluate OUTPUT/ours --image PHOTOS --baseline OUTPUT/ROW -o OUTPUT/ROW_report
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from diffusers.pipelines.ltx2 import LTX2ImageToVideoPipeline, LTX2LatentUpsamplePipeline
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.utils import STAGE_2_DISTILLED_SIGMA_VALUES
from PIL import Image

from swifti2v.media import fit_image, load_image, open_writer

HEIGHT, WIDTH, NUM_FRAMES = 1408, 2560, 81
WAN, LTX = "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "Lightricks/LTX-2"
DISTILLED_LORA = "ltx-2-19b-distilled-lora-384.safetensors"
PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FPS = 24
"""Both models' own rate."""
Frames = np.ndarray[Any, np.dtype[Any]]
Generate = Callable[[Image.Image, str], Frames]
"""Photo of the output size and prompt to ``[T, H, W, 3]`` in [0, 1]."""

WAN_CALL: Mapping[str, Any] = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": NUM_FRAMES,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "output_type": "np",
}
LTX_FIRST_CALL: Mapping[str, Any] = {
    "height": HEIGHT // 2,
    "width": WIDTH // 2,
    "num_frames": NUM_FRAMES,
    "frame_rate": float(FPS),
    "num_inference_steps": 40,
    "guidance_scale": 4.0,
    "output_type": "latent",
    "return_dict": False,
}
LTX_UPSAMPLE_CALL: Mapping[str, Any] = {"output_type": "latent", "return_dict": False}
LTX_SECOND_CALL: Mapping[str, Any] = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": NUM_FRAMES,
    "frame_rate": float(FPS),
    "num_inference_steps": len(STAGE_2_DISTILLED_SIGMA_VALUES),
    "sigmas": STAGE_2_DISTILLED_SIGMA_VALUES,
    "noise_scale": STAGE_2_DISTILLED_SIGMA_VALUES[0],
    "guidance_scale": 1.0,
    "output_type": "np",
    "return_dict": False,
}


def seeded() -> torch.Generator:
    """The same noise for every clip."""
    return torch.Generator("cpu").manual_seed(0)


def load_wan() -> Generate:
    """Wan2.2-TI2V-5B end to end, with the scheduler of its repository."""
    vae = AutoencoderKLWan.from_pretrained(WAN, subfolder="vae", torch_dtype=torch.float32)
    vae.enable_tiling()
    pipe = WanImageToVideoPipeline.from_pretrained(WAN, vae=vae, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()

    def generate(photo: Image.Image, prompt: str) -> Frames:
        frames: Frames = pipe(image=photo, prompt=prompt, generator=seeded(), **WAN_CALL).frames[0]
        return frames

    return generate


def load_ltx() -> Generate:
    """LTX-2: half the size first, enlarged in latents, then three steps with the distilled LoRA."""
    pipe = LTX2ImageToVideoPipeline.from_pretrained(LTX, torch_dtype=torch.bfloat16)
    pipe.load_lora_weights(LTX, adapter_name="distilled", weight_name=DISTILLED_LORA)
    pipe.enable_model_cpu_offload()
    pipe.vae.enable_tiling()
    upsampler = LTX2LatentUpsamplerModel.from_pretrained(
        LTX, subfolder="latent_upsampler", torch_dtype=torch.bfloat16
    )
    upsample: Any = LTX2LatentUpsamplePipeline(vae=pipe.vae, latent_upsampler=upsampler)
    upsample.enable_model_cpu_offload()
    first = pipe.scheduler
    second = FlowMatchEulerDiscreteScheduler.from_config(
        first.config, use_dynamic_shifting=False, shift_terminal=None
    )

    def generate(photo: Image.Image, prompt: str) -> Frames:
        given = {"image": photo, "prompt": prompt, "generator": seeded()}
        pipe.scheduler = first
        pipe.disable_lora()
        latents, audio = pipe(**given, **LTX_FIRST_CALL)
        latents = upsample(latents=latents, **LTX_UPSAMPLE_CALL)[0]
        pipe.scheduler = second
        pipe.enable_lora()
        video, _ = pipe(**given, latents=latents, audio_latents=audio, **LTX_SECOND_CALL)
        frames: Frames = video[0]
        return frames

    return generate


ROWS: Mapping[str, Callable[[], Generate]] = {"wan22_ti2v_5b": load_wan, "ltx2_two_stage": load_ltx}


def run(row: str, photos: Path, output: Path, load: Callable[[], Generate]) -> None:
    """Make the clips of a row that are not there yet."""
    folder = output / row
    folder.mkdir(parents=True, exist_ok=True)
    paths = [path for path in sorted(photos.iterdir()) if path.suffix.lower() in PHOTO_SUFFIXES]
    missing = [path for path in paths if not (folder / f"{path.stem}.mp4").exists()]
    for path in missing:
        if not path.with_suffix(".txt").is_file():
            sys.exit(f"{path} has no prompt; write one into {path.with_suffix('.txt')}")
    generate = load() if missing else None
    for path in missing:
        assert generate is not None
        photo = fit_image(load_image(path), HEIGHT, WIDTH).image
        prompt = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        frames = np.rint(np.clip(generate(photo, prompt), 0, 1) * 255).astype(np.uint8)
        cost = {"name": path.stem, "seconds": time.perf_counter() - started}
        if torch.cuda.is_available():
            cost["peak_bytes"] = torch.cuda.max_memory_allocated()
        clip = folder / f"{path.stem}.mp4"
        with open_writer(clip, height=HEIGHT, width=WIDTH, fps=FPS) as writer:
            writer.write(frames)
        with (output / f"{row}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(cost) + "\n")
        sys.stderr.write(f"{clip}: {cost['seconds']:.1f} s\n")


def main() -> None:
    """Run one row."""
    if len(sys.argv) != 4 or sys.argv[1] not in ROWS:
        sys.exit(f"usage: gpu_baselines.py {'|'.join(ROWS)} PHOTOS OUTPUT")
    run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), ROWS[sys.argv[1]])


if __name__ == "__main__":
    main()
