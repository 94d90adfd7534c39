"""``swifti2v doctor``: what this machine and this installation can do."""

import platform
import sys
from importlib import metadata
from typing import Annotated, Any

import typer

from swifti2v import __version__
from swifti2v.cli.failures import exit_codes

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "av")
EXTRAS = ("tensorboard", "wandb", "datasets", "pyarrow", "torchao", "gguf", "pillow-heif",
          "torchvision", "dreamsim")  # fmt: skip
"""Libraries that some commands need."""


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout; sizes are bytes.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Print versions, devices, memory, video codecs and whether the nano model is there."""
    with exit_codes(debug=debug):
        import json

        facts = examine()
        typer.echo(json.dumps(facts) if as_json else "\n".join(_to_lines(facts)))


def examine() -> dict[str, Any]:
    """All that the command says, as plain values."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": sys.platform,
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "extras": {name: _find_version(name) for name in EXTRAS},
        "cpu": _examine_cpu(),
        "gpus": _examine_gpus(),
        "video_codecs": _find_codecs(),
        "nano": _examine_nano(),
    }


def _find_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _examine_cpu() -> dict[str, Any]:
    import os

    import torch

    from swifti2v.planning.measurement import free_bytes, memory_bytes

    cpu = torch.device("cpu")
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(cpu),
        "free_bytes": free_bytes(cpu),
    }


def _examine_gpus() -> dict[str, Any]:
    import torch

    from swifti2v.planning.measurement import free_bytes, memory_bytes

    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        devices.append(
            {
                "device": str(device),
                "name": torch.cuda.get_device_name(device),
                "memory_bytes": memory_bytes(device),
                "free_bytes": free_bytes(device),
            }
        )
    return {"cuda": torch.version.cuda, "devices": devices}


def _find_codecs() -> list[str]:
    from swifti2v.errors import MediaError
    from swifti2v.media.encoder import require_codec_fits

    codecs = []
    for codec in ("h264", "h265", "av1", "ffv1"):
        try:
            require_codec_fits(".mkv", codec)
        except MediaError:
            continue
        codecs.append(codec)
    return codecs


def _examine_nano() -> dict[str, Any]:
    from swifti2v.errors import SwiftI2VError
    from swifti2v.models.loading.official import locate
    from swifti2v.models.loading.sources import find_model

    try:
        index, root = find_model("nano")
        for role, source in index.components.items():
            locate(role, source, root)
    except SwiftI2VError as error:
        return {"problem": str(error)}
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    return {"problem": None, "directory": str(root), "num_bytes": size}


def _to_lines(facts: dict[str, Any]) -> list[str]:
    from swifti2v.units import format_bytes

    def memory(device: dict[str, Any]) -> str:
        free = format_bytes(device["free_bytes"])
        return f"{format_bytes(device['memory_bytes'])} memory, {free} free"

    cpu, gpus, nano = facts["cpu"], facts["gpus"], facts["nano"]
    installed = [f"{name} {version}" for name, version in facts["extras"].items() if version]
    missing = [name for name, version in facts["extras"].items() if not version]
    lines = [
        f"swifti2v {facts['version']}, Python {facts['python']}, {facts['platform']}",
        ", ".join(f"{name} {version}" for name, version in facts["libraries"].items()),
        f"optional: {', '.join(installed) or 'none'}; not installed: {', '.join(missing) or 'none'}",
        f"cpu: {cpu['cores']} cores, {cpu['threads']} threads used by torch, {memory(cpu)}",
        *(f"{gpu['device']}: {gpu['name']}, {memory(gpu)}" for gpu in gpus["devices"]),
    ]
    if not gpus["devices"]:
        built = f"CUDA {gpus['cuda']}" if gpus["cuda"] else "no CUDA"
        lines.append(f"gpu: none (torch is built with {built})")
    lines.append(f"video codecs: {', '.join(facts['video_codecs']) or 'none'}")
    if nano["problem"]:
        return [*lines, f"nano model: not usable ({nano['problem']})"]
    return [*lines, f"nano model: {nano['directory']}, {format_bytes(nano['num_bytes'])}"]
