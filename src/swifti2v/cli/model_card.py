"""``swifti2v models card``: measure a model on held-out files and write the tables of its card."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.report import peak_rss_bytes
from swifti2v.cli.seeds import choose_seed
from swifti2v.storage import write_whole

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    from swifti2v.config import GenerationConfig
    from swifti2v.evaluation.card_tables import Card, WeightsRow
    from swifti2v.evaluation.model_card import CameraRow, Stage2Row
    from swifti2v.pipelines.two_stage import SwiftI2VPipeline

MAX_FPS = 16.0
"""Faster clips are resampled to this rate; slower ones keep theirs, so no frame is shown twice."""
PROMPT = "zoom in"
"""Of the clip that is timed."""

models = typer.Typer(help="Ready models: measure, export and convert them.", no_args_is_help=True)


@models.command()
def card(
    clips: Annotated[Path, typer.Option(help="Folder with video files.")],
    photos: Annotated[Path, typer.Option(help="Folder with photos.")],
    held_out: Annotated[
        list[str],
        typer.Option(help="Name of a clip or photo that was not trained on; give each one."),
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Card; only what its markers enclose is replaced."),
    ],
    model: Annotated[str, typer.Option(help="nano, a directory or a Hub id.")] = "nano",
    num_frames: Annotated[int, typer.Option(help="Frames of every clip, 4k + 1.")] = 33,
    height: Annotated[int, typer.Option(help="Output height in pixels.")] = 384,
    width: Annotated[int, typer.Option(help="Output width in pixels.")] = 640,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise; -1 draws one.")] = 0,
    full_photos: Annotated[
        int, typer.Option(min=0, help="Photos whose camera clips go through Stage II as well.")
    ] = 1,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A.B=C", help="Measure Stage II with this setting as well. May be repeated."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")] = False,
) -> None:
    """Measure codec, both stages and cost on held-out files; write the card's tables."""
    with exit_codes(debug=debug):
        from swifti2v.evaluation.card_tables import render_tables, replace_tables
        from swifti2v.pipelines.two_stage import SwiftI2VPipeline

        replace_tables(_read_card(output), "")  # refuse a card without markers before any work
        clip_paths, photo_paths = _find_held_out(held_out, clips, photos)
        pipe = SwiftI2VPipeline.from_pretrained(model, device=device)
        config = pipe.configure(num_frames=num_frames, height=height, width=width)
        pipe.require_fit(config)
        job = Job(
            model=model,
            config=config,
            variants=_variants(config, variant or []),
            seed=choose_seed(seed),
            num_full_photos=full_photos,
            clips={path.stem: _read_clip(path, config) for path in clip_paths},
            photos={path.stem: _read_photo(path, config) for path in photo_paths},
        )
        tables = render_tables(_measure(pipe, job))
        write_whole(output, replace_tables(_read_card(output), tables))
        typer.echo(str(output.resolve()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is measured, with its inputs in memory."""

    model: str
    """Name of the model."""
    config: "GenerationConfig"
    """Settings."""
    variants: dict[str, "GenerationConfig"]
    """Further settings of Stage II, by the name of their row."""
    seed: int
    """Of the noise."""
    num_full_photos: int
    """Photos whose camera clips go through Stage II as well."""
    clips: dict[str, "npt.NDArray[np.uint8]"]
    """``[T, H, W, 3]`` each, by name."""
    photos: dict[str, "Image.Image"]
    """Images of the output's size, by name."""


def _measure(pipe: "SwiftI2VPipeline", job: Job) -> "Card":
    from swifti2v.evaluation import model_card
    from swifti2v.evaluation.card_tables import Card

    config, low = job.config, job.config.stage1.downscale
    photos = job.photos | _first_frames(job.clips)
    weights = _weights(job.model, pipe)  # now: the files may change while this runs
    _say(
        f"{job.model}: timing a clip of {config.num_frames} frames, {config.width}x{config.height}"
    )
    image = next(iter(photos.values()))
    seconds = model_card.measure_seconds(pipe, image, PROMPT, config, job.seed)
    peak = peak_rss_bytes()  # before the metrics add their own
    _say(f"codec: {len(job.clips)} clips at two sizes")
    codec = model_card.measure_codec(pipe.components.stage2_vae, job.clips)
    small = {name: model_card.downscale(frames, low) for name, frames in job.clips.items()}
    codec += model_card.measure_codec(pipe.components.stage1_vae, small)
    camera = model_card.measure_camera(
        pipe, photos, config, list(photos)[: job.num_full_photos], job.seed, on_row=_say_camera
    )
    stage2 = model_card.measure_stage2(
        pipe, job.clips, config, job.variants, job.seed, on_row=_say_stage2
    )
    return Card(
        model=job.model,
        setting=_setting(config, job.seed),
        codec=codec,
        stage2=stage2,
        camera=camera,
        seconds=seconds,
        peak_rss_bytes=peak,
        weights=weights,
        machine=_machine(pipe),
    )


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _say_stage2(row: "Stage2Row") -> None:
    _say(
        f"Stage II, {row.clip}, {row.method}: {row.psnr_db:.2f} dB, coherence {row.coherence:.3f}, "
        f"seam {row.seam:.2f}, HF energy {row.hf_ratio:.2f}, cadence {row.cadence:.2f}, "
        f"carried {row.carried:.3f}, blockiness {row.blockiness:.3f}"
    )


def _say_camera(row: "CameraRow") -> None:
    _say(
        f"{row.stage}, {row.photo}, '{row.prompt}': {row.measured}, "
        f"first frame {row.first_frame_psnr_db:.2f} dB, cadence {row.cadence:.2f}, "
        f"carried {row.carried:.3f}, blockiness {row.blockiness:.3f}"
    )


def _read_card(path: Path) -> str:
    from swifti2v.errors import ConfigError

    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: write the card's text first, with the lines "
            "'<!-- tables -->' and '<!-- /tables -->' where the tables shall stand"
        )
    return path.read_text(encoding="utf-8")


def _find_held_out(
    names: Sequence[str], clips: Path, photos: Path
) -> tuple[list[Path], list[Path]]:
    """Files of the clips and of the photos, in the order of the names.

    Raises:
        InputError: A name is not exactly one file, or there is no clip.
    """
    from swifti2v.errors import InputError

    found: tuple[list[Path], list[Path]] = ([], [])
    for name in names:
        matches = [
            (paths, file)
            for paths, folder in zip(found, (clips, photos), strict=True)
            if folder.is_dir()
            for file in sorted(folder.iterdir())
            if file.is_file() and name in (file.name, file.stem)
        ]
        if len(matches) != 1:
            files = ", ".join(str(file) for _, file in matches) or "no file"
            raise InputError(
                f"--held-out {name} is {files} in {clips} and {photos}; name exactly one, "
                "with its suffix if need be"
            )
        paths, file = matches[0]
        paths.append(file)
    stems = [file.stem for files in found for file in files]
    if repeated := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise InputError(f"--held-out: {', '.join(repeated)} is there twice; give each file once")
    if not found[0]:
        raise InputError(f"--held-out names no clip in {clips}; Stage II is measured on clips")
    return found


def _read_clip(path: Path, config: "GenerationConfig") -> "npt.NDArray[np.uint8]":
    """The first frames, at most at ``MAX_FPS``, scaled to cover the size and cropped."""
    import numpy as np
    from PIL import Image

    from swifti2v.media import fit_image, iter_frames, probe_clip

    info = probe_clip(path)
    for note in info.notes:
        typer.echo(f"note: {path}: {note}", err=True)
    fps = MAX_FPS if info.fps > MAX_FPS else None
    # One more than is needed, so that a clip that is too short is refused.
    frames = iter_frames(path, fps, max_frames=config.num_frames + 1, min_frames=config.num_frames)
    fitted = [
        np.asarray(fit_image(Image.fromarray(frame), config.height, config.width).image)
        for frame in frames
    ]
    return np.stack(fitted[: config.num_frames])


def _read_photo(path: Path, config: "GenerationConfig") -> "Image.Image":
    from swifti2v.media import fit_image, load_image

    return fit_image(load_image(path), config.height, config.width).image


def _first_frames(truths: dict[str, "npt.NDArray[np.uint8]"]) -> dict[str, "Image.Image"]:
    from PIL import Image

    return {
        f"{name}, frame 0": Image.fromarray(frames[0].copy()) for name, frames in truths.items()
    }


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

    from swifti2v.evaluation.card_tables import WeightsRow
    from swifti2v.models.official import locate
    from swifti2v.models.sources import find_model

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
    """Commit of the package's source, or that there is none."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + (" with changes" if _git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "none (installed package)"


def _git(*words: str) -> str:
    folder = str(Path(__file__).parents[1])
    command = ["git", "-C", folder, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
