"""What a model's card tells: codec, both stages, cost, weights and machine."""

import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

import swifti2v
from runs.card.camera import ASKS, FURTHER_ASKS, CameraRow, measure_camera
from runs.card.inputs import MAX_FPS, say
from runs.card.marks import Card, WeightsRow
from runs.card.stages import Stage2Row, measure_codec, measure_seconds, measure_stage2
from swifti2v.config import GenerationConfig, merge, parse_config, parse_override, to_dict
from swifti2v.jobs.report import peak_rss_bytes
from swifti2v.media import Frames, downscale
from swifti2v.models.loading.official import locate
from swifti2v.models.loading.sources import find_model
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.storage import hash_file

PROMPT = "zoom in"
"""Prompt of the timed clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardInputs:
    """Measurements to make, with their inputs in memory."""

    model: str
    """Name of the model."""
    config: GenerationConfig
    """Settings."""
    variants: dict[str, GenerationConfig]
    """Further settings of Stage II, by the name of their row."""
    seed: int
    """Seed of the initial noise."""
    num_further: int
    """Photos that are asked for further moves as well."""
    moving: list[str]
    """Names of the clips whose camera moves."""
    clips: dict[str, Frames]
    """``[T, H, W, 3]`` each, by name."""
    photos: dict[str, Image.Image]
    """Images of the output's size, by name."""


def measure_card(pipe: SwiftI2VPipeline, inputs: CardInputs) -> Card:
    """All measurements of a model, with a line of progress for each."""
    config, low = inputs.config, inputs.config.stage1.downscale
    weights = _weights(inputs.model, pipe)  # now: the files may change while this runs
    say(
        f"{inputs.model}: timing a clip of {config.num_frames} frames, {config.width}x{config.height}"
    )
    image = next(iter(inputs.photos.values()))
    seconds = measure_seconds(pipe, image, PROMPT, config, inputs.seed)
    peak = peak_rss_bytes()  # before the metrics add their own
    say(f"codec: {len(inputs.clips)} clips at two sizes")
    codec = measure_codec(pipe.components.stage2_vae, inputs.clips)
    small = {name: downscale(frames, low) for name, frames in inputs.clips.items()}
    codec += measure_codec(pipe.components.stage1_vae, small)
    further = list(inputs.photos)[: inputs.num_further]
    count = len(inputs.photos) * len(ASKS) + len(further) * len(FURTHER_ASKS)
    say(f"camera: {count} clips of {len(inputs.photos)} photos")
    camera = measure_camera(pipe, inputs.photos, config, further, inputs.seed, on_row=_say_camera)
    stage2 = measure_stage2(
        pipe, inputs.clips, config, inputs.variants, inputs.seed, on_row=_say_stage2
    )
    return Card(
        model=inputs.model,
        setting=_setting(config, inputs.seed),
        codec=codec,
        stage2=stage2,
        moving=inputs.moving,
        camera=camera,
        seconds=seconds,
        peak_rss_bytes=peak,
        weights=weights,
        machine=_machine(pipe),
    )


def _say_stage2(row: Stage2Row) -> None:
    say(
        f"Stage II, {row.clip}, {row.method}: {row.psnr_db:.2f} dB, coherence {row.coherence:.3f}, "
        f"seam {row.seam:.2f}, detail energy {row.hf_ratio:.2f}, cadence {row.cadence:.2f}, "
        f"carried {row.carried:.3f}, blockiness {row.blockiness:.3f}"
    )


def _say_camera(row: CameraRow) -> None:
    px = row.displacement_px
    off = "" if math.isnan(px) else f"displacement off {px:.3f} px, "
    say(
        f"{row.stage}, {row.photo}, '{row.prompt}': {', '.join(row.measured) or 'static'}, "
        f"{off}first frame {row.first_frame_psnr_db:.2f} dB, cadence {row.cadence:.2f}, "
        f"carried {row.carried:.3f}, blockiness {row.blockiness:.3f}"
    )


def add_settings(config: GenerationConfig, texts: Sequence[str]) -> dict[str, GenerationConfig]:
    """Settings with one more setting each, by the name of their row."""
    return {
        f"model, {text}": parse_config(
            GenerationConfig, merge(to_dict(config), parse_override(text)), f"--variant {text}"
        )
        for text in texts
    }


def _setting(config: GenerationConfig, seed: int) -> str:
    low = config.stage1.downscale
    return (
        f"First {config.num_frames} frames (at most {MAX_FPS:.0f} a second), scaled to cover "
        f"{config.width}x{config.height} and cropped at the centre; Stage I at "
        f"{config.width // low}x{config.height // low}; "
        f"{config.stage1.sampling.num_inference_steps} + "
        f"{config.stage2.sampling.num_inference_steps} steps, "
        f"M = {config.stage2.segment_size}, N = {config.stage2.context_size}, seed {seed}."
    )


def _weights(model: str, pipe: SwiftI2VPipeline) -> list[WeightsRow]:

    index, root = find_model(model)
    rows = []
    for role, source in index.components.items():
        component = getattr(pipe.components, role)
        if not isinstance(component, nn.Module):
            continue
        place = locate(role, source, root)
        for file in [place] if place.is_file() else sorted(place.glob("*.safetensors")):
            rows.append(
                WeightsRow(
                    component=role,
                    num_parameters=sum(weight.numel() for weight in component.parameters()),
                    num_bytes=file.stat().st_size,
                    sha256=hash_file(file),
                )
            )
    return rows


def _machine(pipe: SwiftI2VPipeline) -> dict[str, str]:
    import platform

    device = pipe.components.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {
        "processor": f"{_cpu_model()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads used by torch",
        "GPU": gpu,
        "software": f"swifti2v {swifti2v.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "weights loaded as": str(pipe.components.stage2_transformer.dtype).removeprefix("torch."),
        "commit": _commit(),
    }


def _cpu_model() -> str:

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Commit of the package's source, or words for a missing one."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + (" with changes" if _git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "none (installed package)"


def _git(*words: str) -> str:
    folder = str(Path(swifti2v.__file__).parent)
    command = ["git", "-C", folder, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
