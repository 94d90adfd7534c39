"""All checks of a model, and the report of them."""

import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from swifti2v import __version__
from swifti2v.config import GenerationConfig, parse_config
from swifti2v.evaluation.verify.files import Outlines, check_files, check_lora, check_match
from swifti2v.evaluation.verify.findings import Finding, SkippedError, attempt, judge
from swifti2v.evaluation.verify.known_sampling import check_sampling
from swifti2v.evaluation.verify.moving_clip import MOTION, draw_photo
from swifti2v.evaluation.verify.networks import (
    NUM_FRAMES,
    Trial,
    check_denoising,
    check_image,
    check_text,
    check_vae,
)
from swifti2v.jobs.report import peak_rss_bytes
from swifti2v.media import fit_image
from swifti2v.models.loading.components import STAGES
from swifti2v.models.loading.sources import find_model
from swifti2v.models.runtime.placement import collect_memory
from swifti2v.models.runtime.roles import Placement
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.planning.devices import PRECISIONS, Precision
from swifti2v.planning.measurement import free_bytes, measure_here, memory_bytes
from swifti2v.planning.plans import Option, Wish, make_plan
from swifti2v.planning.stored import find_costs
from swifti2v.shapes import NUM_WAYS
from swifti2v.shipped import PACKAGE
from swifti2v.units import GB

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
SLOWER = 3.0
"""Times the planned seconds, above which a clip is called slow; the first run also compiles kernels."""
START_SECONDS = 20.0
"""Seconds that are granted besides."""
MEMORY_SLACK = 1.1
"""Times the planned memory, above which a clip is called too large."""
LIBRARY_BYTES = GB
"""Memory that Python and its libraries take in this process besides."""
LEAST_FIRST_PSNR = 15.0
"""dB between photo and first frame, below which the clip is not of the photo. An assumption."""
OnFinding = Callable[[Finding], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Findings, and the machine they are from: nothing of the user's is in it."""

    model: str
    """Name of the model; of a file or folder of the user's only its last part."""
    environment: dict[str, Any]
    """Versions, device and number type."""
    findings: tuple[Finding, ...]
    """In the order of the checks."""
    seconds: float
    """Seconds of all checks."""

    @property
    def is_good(self) -> bool:
        """Whether nothing is off."""
        return all(finding.status == "ok" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "is_good": self.is_good}


def verify(
    model: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement | None = None,
    image: Image.Image | None = None,
    on_finding: OnFinding | None = None,
) -> Report:
    """Check a model: each check runs whatever became of the others, and its finding names the fault.

    Args:
        model: See ``find_model``.
        device: Device that computes.
        dtype: Number type of the weights.
        placement: Placement of the weights; None for the fastest that fits.
        image: Photo for all checks; by default a drawn one.
        on_finding: Called with each finding as soon as it is there.

    Raises:
        ConfigError: No such model.
    """
    start = time.perf_counter()
    index, root = find_model(model)
    config = parse_config(GenerationConfig, index.settings, model)
    config = replace(config, num_frames=NUM_FRAMES)
    size = (config.height, config.width)
    photo = draw_photo(*size) if image is None else fit_image(image, *size, "crop").image
    trial = Trial(
        outlines=Outlines(index, root, dtype),
        config=config,
        dtype=dtype,
        device=device,
        placement=placement or "resident",
        photo=photo,
        dropped_loras=set(),
    )
    findings = []
    for finding in _check(trial, model, placement):
        findings.append(finding)
        if on_finding is not None:
            on_finding(finding)
    return Report(
        model=Path(model).stem if Path(model).exists() else model,
        environment=describe_environment(device, dtype),
        findings=tuple(findings),
        seconds=round(time.perf_counter() - start, 1),
    )


def _check(trial: Trial, model: str, placement: Placement | None) -> Iterator[Finding]:
    """Files first, then each network, then a clip."""
    outlines, config = trial.outlines, trial.config
    index = outlines.index
    is_whole = True
    for role in index.components:
        finding = attempt(f"files of {role}", partial(check_files, outlines, role))
        is_whole = is_whole and finding.status == "ok"
        yield finding
    for role, source in index.components.items():
        for lora in source.loras:
            name = f"LoRA {Path(lora.path).name} on {role}"
            finding = attempt(name, partial(check_lora, outlines, role, lora))
            if finding.status != "ok":
                trial.dropped_loras.add(lora.path)
            yield finding
    extra = {"latents": 0, "displacement": NUM_WAYS}
    fits = partial(check_match, outlines, config.stage1.motion, extra)
    match = attempt("parts belong together", fits)
    yield match
    for stage in STAGES:
        sampling = getattr(config, stage).sampling
        yield attempt(
            f"sampling of {stage}",
            partial(check_sampling, outlines, stage, sampling, trial.dropped_loras),
        )
    yield attempt("text encoder", partial(check_text, trial))
    if "image_encoder" in index.components:
        yield attempt("image encoder", partial(check_image, trial))
    for stage in STAGES:
        collect_memory(trial.device)
        yield attempt(f"VAE of {stage}", partial(check_vae, trial, stage))
        yield attempt(
            f"denoising of {stage}",
            partial(_if_matching, match, stage, partial(check_denoising, trial, stage)),
        )
    collect_memory(trial.device)
    is_whole = is_whole and not trial.dropped_loras and match.status == "ok"
    yield attempt("a short clip", partial(_check_clip, trial, model, placement, is_whole=is_whole))


def _if_matching(match: Finding, stage: str, run: Callable[[], Finding]) -> Finding:
    """Run a check of a stage, unless its VAE is known to be another model's."""
    sizes = {match.values.get(f"{stage} {part} channels") for part in ("VAE", "transformer")}
    if len(sizes) > 1:
        raise SkippedError(f"needs parts that belong together: {match.cause}")
    return run()


def _check_clip(
    trial: Trial, model: str, placement: Placement | None, *, is_whole: bool
) -> Finding:
    """Five frames at full size: whether they are those of the photo, within planned memory and time."""
    if not is_whole:
        raise SkippedError("needs all files and LoRAs, of parts that belong together")
    config, device = trial.config, trial.device
    option = plan_trial(model, config, trial.dtype, device, placement)
    config = replace(config, stage2=replace(config.stage2, vae_tile=option.vae_tile))
    pipe = SwiftI2VPipeline.from_pretrained(
        model,
        torch_dtype=trial.dtype,
        device=device,
        placement=option.placement,  # type: ignore[arg-type] # "8-bit" is never chosen
        staged=True,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    frames = np.concatenate(
        [piece.frames for piece in pipe.stream(trial.photo, MOTION, generator=1, config=config)]
    )
    seconds = time.perf_counter() - start
    if device.type == "cuda":
        peak, planned = torch.cuda.max_memory_allocated(device), option.peak_device_bytes["peak"]
    else:
        peak, planned = peak_rss_bytes(), option.host_bytes + LIBRARY_BYTES
    error = np.square(frames[0].astype(float) - np.asarray(trial.photo, dtype=float)).mean()
    psnr = 10 * np.log10(255**2 / max(error, 1e-3))
    values = {
        "frames": len(frames),
        "first frame dB": round(float(psnr), 1),
        "deviation": round(float(frames.std()), 1),
        "placement": str(option),
        "memory GB": round(peak / GB, 2),
        "planned GB": round(planned / GB, 2),
        "seconds": round(seconds, 1),
        "planned seconds": round(option.seconds["total"], 1),
    }
    causes = {
        "frames are missing": len(frames) != config.num_frames,
        "the first frame is not the photo: Stage II's VAE or weights are off": config.stage2.anchor
        == "given"
        and bool(psnr < LEAST_FIRST_PSNR),
        "the clip takes more memory than planned: post this report": peak > MEMORY_SLACK * planned,
        "the clip takes much longer than planned: other work on this machine, or a slow kernel": seconds
        > SLOWER * option.seconds["total"] + START_SECONDS,
    }
    expected = "frames of the photo, within planned memory, and seconds with those of loading"
    return judge("a short clip", values, expected, causes)


def plan_trial(
    model: str,
    config: GenerationConfig,
    dtype: torch.dtype,
    device: torch.device,
    placement: Placement | None,
) -> Option:
    """The fastest way to make the short clip on this machine.

    Raises:
        ConfigError: None fits.
    """
    name = str(dtype).removeprefix("torch.")
    precision: Precision = next(kind for kind in PRECISIONS if kind == name)
    is_cuda = device.type == "cuda"
    machine = measure_here(precision, with_gpu=is_cuda)
    tile = config.stage2.vae_tile
    wish = Wish(placement=placement, is_tile_given=tile is not None, vae_tile=tile)
    host = memory_bytes(torch.device("cpu")) if is_cuda else None
    costs = find_costs(model, config, precision)
    return make_plan(costs, machine, precision, free_bytes(device), wish, host).require_fit()


def describe_environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Versions and machine, without names of users and folders."""
    is_cuda = device.type == "cuda"
    return {
        "swifti2v": __version__,
        "commit": _find_commit(),
        "python": platform.python_version(),
        "platform": platform.system(),
        **{name: metadata.version(name) for name in LIBRARIES},
        "cuda": torch.version.cuda if is_cuda else None,
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "device GB": round(memory_bytes(device) / GB, 1),
        "host GB": round(memory_bytes(torch.device("cpu")) / GB, 1),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _find_commit() -> str | None:
    """Commit of a checkout that this package runs from; None for an installed one."""
    try:
        found = subprocess.run(
            ["git", "-C", str(PACKAGE), "rev-parse", "--short", "HEAD"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
