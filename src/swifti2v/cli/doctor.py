"""``swifti2v doctor``: what this machine and this installation can do."""

import platform
import sys
from importlib import metadata
from typing import Annotated

import typer

from swifti2v import __version__
from swifti2v.cli.failures import exit_codes

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "av")


def doctor(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Print versions, devices, memory, video codecs and whether the nano model is there."""
    with exit_codes(debug=debug):
        typer.echo(f"swifti2v {__version__}, Python {platform.python_version()}, {sys.platform}")
        typer.echo(", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES))
        for line in (*_devices(), _codecs(), _nano()):
            typer.echo(line)


def _devices() -> list[str]:
    import os

    import torch

    lines = [f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads used by torch"]
    if hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        lines[0] += f", {total / 2**30:.1f} GiB memory"
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        return [*lines, f"gpu: none (torch is built with {built})"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index}: {device.name}, {device.total_memory / 2**30:.1f} GiB, "
            f"CUDA {torch.version.cuda}"
        )
    return lines


def _codecs() -> str:
    from swifti2v.errors import MediaError
    from swifti2v.media.encoder import require_codec_fits

    found = []
    for codec in ("h264", "h265", "av1", "ffv1"):
        try:
            require_codec_fits(".mkv", codec)
        except MediaError:
            continue
        found.append(codec)
    return f"video codecs: {', '.join(found) or 'none'}"


def _nano() -> str:
    from swifti2v.errors import SwiftI2VError
    from swifti2v.models.official import locate
    from swifti2v.models.sources import find_model

    try:
        index, root = find_model("nano")
        for role, source in index.components.items():
            locate(role, source, root)
    except SwiftI2VError as error:
        return f"nano model: not usable ({error})"
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    return f"nano model: {root}, {size / 2**20:.0f} MiB"
