"""``swifti2v models card``: measure a model on held-out files and write the tables of its card."""

import json
import math
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swifti2v.cli.card_inputs import (
    MAX_FPS,
    find_held_out,
    find_moving,
    read_clip,
    read_photo,
    say,
)
from swifti2v.cli.failures import exit_codes
from swifti2v.cli.options import RunDtype
from swifti2v.cli.seeds import choose_seed
from swifti2v.jobs.devices import find_device, find_dtype
from swifti2v.jobs.report import peak_rss_bytes
from swifti2v.storage import write_whole

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    from swifti2v.config import GenerationConfig
    from swifti2v.evaluation.card.camera import CameraRow
    from swifti2v.evaluation.card.marks import Card, WeightsRow
    from swifti2v.evaluation.card.stages import Stage2Row
    from swifti2v.pipelines.two_stage import SwiftI2VPipeline

PROMPT = "zoom in"
"""Prompt of the timed clip."""

models = typer.Typer(help="Measure, export and convert ready models.", no_args_is_help=True)


@models.command()
def card(
    clips: Annotated[Path, typer.Option(help="Folder with video files.")],
    photos: Annotated[Path, typer.Option(help="Folder with photos.")],
    held_out: Annotated[
        list[str],
        typer.Option(help="Name of a clip or photo that no training used; give each one."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Card to update; only the part between its markers is replaced."
        ),
    ],
    moving: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out clip whose camera moves; the others count as still. Give each one."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Model: nano, a directory or a Hub id.")] = "nano",
    num_frames: Annotated[int, typer.Option(help="Frames of every clip, 4k + 1.")] = 33,
    height: Annotated[int, typer.Option(help="Output height in pixels.")] = 384,
    width: Annotated[int, typer.Option(help="Output width in pixels.")] = 640,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise; -1 draws one.")] = 0,
    further_photos: Annotated[
        int,
        typer.Option(
            min=0, help="Number of photos for which also roll, dolly, orbit and more are measured."
        ),
    ] = 3,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A.B=C",
            help="Setting with which Stage II is measured as well. May be repeated.",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device: cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[
        RunDtype | None,
        typer.Option(help="Number type of the weights, as in generate; auto measures a CPU."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all measurements as one JSON object.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")] = False,
) -> None:
    """Measure codec, both stages and cost on held-out files; write the card's tables, print the marks."""
    with exit_codes(debug=debug):
        import torch

        from swifti2v.evaluation.card.marks import describe_card
        from swifti2v.evaluation.card.tables import render_marks, render_tables, replace_tables
        from swifti2v.pipelines.two_stage import SwiftI2VPipeline

        replace_tables(_read_card(output), "")  # refuse a card without markers before any work
        clip_paths, photo_paths = find_held_out(held_out, clips, photos)
        kind = find_dtype(dtype and dtype.value, find_device(device))
        pipe = SwiftI2VPipeline.from_pretrained(
            model, device=device, torch_dtype=None if kind is None else getattr(torch, kind)
        )
        config = pipe.configure(num_frames=num_frames, height=height, width=width)
        pipe.require_fit(config)
        job = Job(
            model=model,
            config=config,
            variants=_variants(config, variant or []),
            seed=choose_seed(seed),
            num_further=further_photos,
            moving=find_moving(moving or [], clip_paths),
            clips={path.stem: read_clip(path, config) for path in clip_paths},
            photos={path.stem: read_photo(path, config) for path in photo_paths},
        )
        made = _measure(pipe, job)
        write_whole(output, replace_tables(_read_card(output), render_tables(made)))
        if as_json:
            typer.echo(json.dumps(describe_card(made), allow_nan=False))
        else:
            typer.echo(f"{render_marks(made)}\n{output.resolve()}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Measurements to make, with their inputs in memory."""

    model: str
    """Name of the model."""
    config: "GenerationConfig"
    """Settings."""
    variants: dict[str, "GenerationConfig"]
    """Further settings of Stage II, by the name of their row."""
    seed: int
    """Seed of the initial noise."""
    num_further: int
    """Photos that are asked for further moves as well."""
    moving: list[str]
    """Names of the clips whose camera moves."""
    clips: dict[str, "npt.NDArray[np.uint8]"]
    """``[T, H, W, 3]`` each, by name."""
    photos: dict[str, "Image.Image"]
    """Images of the output's size, by name."""


def _measure(pipe: "SwiftI2VPipeline", job: Job) -> "Card":
    from swifti2v.evaluation.card import stages as model_card
    from swifti2v.evaluation.card.camera import ASKS, FURTHER_ASKS, measure_camera
    from swifti2v.evaluation.card.marks import Card
    from swifti2v.media import downscale

    config, low = job.config, job.config.stage1.downscale
    weights = _weights(job.model, pipe)  # now: the files may change while this runs
    say(f"{job.model}: timing a clip of {config.num_frames} frames, {config.width}x{config.height}")
    image = next(iter(job.photos.values()))
    seconds = model_card.measure_seconds(pipe, image, PROMPT, config, job.seed)
    peak = peak_rss_bytes()  # before the metrics add their own
    say(f"codec: {len(job.clips)} clips at two sizes")
    codec = model_card.measure_codec(pipe.components.stage2_vae, job.clips)
    small = {name: downscale(frames, low) for name, frames in job.clips.items()}
    codec += model_card.measure_codec(pipe.components.stage1_vae, small)
    further = list(job.photos)[: job.num_further]
    count = len(job.photos) * len(ASKS) + len(further) * len(FURTHER_ASKS)
    say(f"camera: {count} clips of {len(job.photos)} photos")
    camera = measure_camera(pipe, job.photos, config, further, job.seed, on_row=_say_camera)
    stage2 = model_card.measure_stage2(
        pipe, job.clips, config, job.variants, job.seed, on_row=_say_stage2
    )
    return Card(
        model=job.model,
        setting=_setting(config, job.seed),
        codec=codec,
        stage2=stage2,
        moving=job.moving,
        camera=camera,
        seconds=seconds,
        peak_rss_bytes=peak,
        weights=weights,
        machine=_machine(pipe),
    )


def _say_stage2(row: "Stage2Row") -> None:
    say(
        f"Stage II, {row.clip}, {row.method}: {row.psnr_db:.2f} dB, coherence {row.coherence:.3f}, "
        f"seam {row.seam:.2f}, detail energy {row.hf_ratio:.2f}, cadence {row.cadence:.2f}, "
        f"carried {row.carried:.3f}, blockiness {row.blockiness:.3f}"
    )


def _say_camera(row: "CameraRow") -> None:
    px = row.displacement_px
    off = "" if math.isnan(px) else f"displacement off {px:.3f} px, "
    say(
        f"{row.stage}, {row.photo}, '{row.prompt}': {', '.join(row.measured) or 'static'}, "
        f"{off}first frame {row.first_frame_psnr_db:.2f} dB, cadence {row.cadence:.2f}, "
        f"carried {row.carried:.3f}, blockiness {row.blockiness:.3f}"
    )


def _read_card(path: Path) -> str:
    from swifti2v.errors import ConfigError

    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: write the card's text first, with the lines "
            "'<!-- tables -->' and '<!-- /tables -->' where the tables belong"
        )
    return path.read_text(encoding="utf-8")


def _variants(config: "GenerationConfig", texts: Sequence[str]) -> dict[str, "GenerationConfig"]:
    from swifti2v.config import GenerationConfig, merge, parse_config, parse_override, to_dict

    return {
        f"model, {text}": parse_config(
            GenerationConfig, merge(to_dict(config), parse_override(text)), f"--variant {text}"
        )
        for text in texts
    }


def _setting(config: "GenerationConfig", seed: int) -> str:
    low = config.stage1.downscale
    return (
        f"First {config.num_frames} frames (at most {MAX_FPS:.0f} a second), scaled to cover "
        f"{config.width}x{config.height} and cropped at the centre; Stage I at "
        f"{config.width // low}x{config.height // low}; "
        f"{config.stage1.sampling.num_inference_steps} + "
        f"{config.stage2.sampling.num_inference_steps} steps, "
        f"M = {config.stage2.segment_size}, N = {config.stage2.context_size}, seed {seed}."
    )


def _weights(model: str, pipe: "SwiftI2VPipeline") -> list["WeightsRow"]:
    import hashlib

    from torch import nn

    from swifti2v.evaluation.card.marks import WeightsRow
    from swifti2v.models.loading.official import locate
    from swifti2v.models.loading.sources import find_model

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
                    sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
                )
            )
    return rows


def _machine(pipe: "SwiftI2VPipeline") -> dict[str, str]:
    import os
    import platform

    import torch

    from swifti2v import __version__

    device = pipe.components.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {
        "processor": f"{_cpu_model()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads used by torch",
        "GPU": gpu,
        "software": f"swifti2v {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "weights loaded as": str(pipe.components.stage2_transformer.dtype).removeprefix("torch."),
        "commit": _commit(),
    }


def _cpu_model() -> str:
    import platform

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
    folder = str(Path(__file__).parents[1])
    command = ["git", "-C", folder, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
