"""Runs of the command line inside the test process, and the files they need."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from swifti2v.cli import app
from swifti2v.media import open_writer, read_clip

LOSSLESS = ("--codec", "ffv1")


def save_photo(path: Path, width: int, height: int, mode: str = "RGB") -> Path:
    ramp = np.linspace(0, 255, width * height * len(mode)).reshape(height, width, len(mode))
    Image.fromarray(ramp.astype(np.uint8), mode).save(path)
    return path


def save_clip(path: Path, num_frames: int, width: int = 16, height: int = 16) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), np.uint8)
    with open_writer(path, height=height, width=width, fps=8, codec="ffv1") as writer:
        writer.write(frames)
    return path


def swifti2v(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def generate(model: Path, photo: Path, output: Path, *more: object) -> Result:
    return swifti2v(
        "generate", photo, "-p", "zoom", "-o", output, "--model", model, "--seed", 7, *more
    )


def succeed(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def error_line(result: Result) -> str:
    """The message of a run that failed as it should."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def frames_of(path: Path) -> Any:
    return read_clip(path).frames


def assert_same_frames(path: Path, other: Path) -> None:
    np.testing.assert_array_equal(frames_of(path), frames_of(other))


def fill_with_nan(model: Path, stage: str) -> None:
    (file,) = (model / stage / "transformer").glob("*.safetensors")
    state = load_file(file)
    state["proj_out.bias"] = torch.full_like(state["proj_out.bias"], torch.nan)
    save_file(state, file)


def copy_model(model: Path, to: Path) -> Path:
    for file in model.rglob("*"):
        if file.is_file():
            target = to / file.relative_to(model)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return to


def save_lora(path: Path, width: int = 24) -> Path:
    generator = torch.Generator().manual_seed(0)
    name = "transformer.blocks.0.attn1.to_q"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(2, width, generator=generator),
        f"{name}.lora_B.weight": torch.randn(width, 2, generator=generator),
    }
    save_file(tensors, path)
    return path


def refine(model: Path, motion: Path, photo: Path, output: Path, *more: object) -> Result:
    return swifti2v(
        "refine", motion, "--image", photo, "-p", "zoom", "-o", output, "--model", model,
        "--seed", 7, *more,
    )  # fmt: skip
