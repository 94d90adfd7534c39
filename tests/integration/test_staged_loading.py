"""Models that are loaded part after part: the same clip, and never all of them in memory."""

import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swifti2v.errors import LoadingError
from swifti2v.models.runtime.placement import is_empty
from swifti2v.pipelines.progress import Progress
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from tests.helpers.command_line import copy_model, generate, succeed
from tests.helpers.hub import make_hub, photo, write_preset
from tests.helpers.limited_memory import save_model

ROLES = (
    "text_encoder",
    "image_encoder",
    "stage1_transformer",
    "stage1_vae",
    "stage2_transformer",
    "stage2_vae",
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hub(tmp_path_factory.mktemp("hub"))


def make_clip(
    name: Path, *, staged: bool, placement: Any = "resident"
) -> tuple[Any, dict[str, set[str]]]:
    """A clip, and the components that are in memory while each stage computes."""
    pipe = SwiftI2VPipeline.from_pretrained(name, device="cpu", placement=placement, staged=staged)
    loaded: dict[str, set[str]] = {}
    alive: list[weakref.ref[Any]] = []

    def look(progress: Progress) -> None:
        models = {role: getattr(pipe.components, role) for role in ROLES}
        full = {r: m for r, m in models.items() if m is not None and not is_empty(m)}
        loaded.setdefault(progress.stage, set()).update(full)
        alive.extend(weakref.ref(model) for model in full.values())

    frames = pipe(photo(), "zoom", generator=1, on_progress=look).frames
    if staged:
        assert {ref() for ref in alive} == {None}
        assert all(is_empty(getattr(pipe.components, role)) for role in ROLES)
        again = pipe(photo(), "zoom", generator=1).frames  # the next job of a server
        np.testing.assert_array_equal(again, frames)
    return frames, loaded


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["resident", "streamed", "offloaded"])
def test_one_part_after_the_other_gives_the_same_clip(
    hub: Path, tmp_path: Path, placement: Any
) -> None:
    name = write_preset(hub, tmp_path)
    expected, together = make_clip(name, staged=False, placement=placement)
    frames, staged = make_clip(name, staged=True, placement=placement)
    np.testing.assert_array_equal(frames, expected)
    assert together["stage1"] == {*ROLES}
    assert staged["stage1"] == {"stage1_transformer", "stage1_vae"}
    assert staged["stage2"] == {"stage2_transformer", "stage2_vae"}


@pytest.mark.parametrize("role", ["transformer", "vae"])
def test_a_damaged_file_of_the_last_part_stops_the_run_before_the_first(
    hub: Path, tmp_path: Path, role: str
) -> None:
    own = copy_model(hub, tmp_path / "hub")
    name = write_preset(own, tmp_path)
    file = own / "Wan2.2-TI2V" / role / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(LoadingError, match="cut short"):
        SwiftI2VPipeline.from_pretrained(name, device="cpu", staged=True)


def test_a_lora_that_does_not_fit_stops_the_run_before_the_first_part(
    hub: Path, tmp_path: Path, lora_of_stage1: Path
) -> None:
    def load(role: str) -> SwiftI2VPipeline:
        loras = {"loras": [{"path": str(lora_of_stage1), "strength": 0.5}]}
        name = write_preset(hub, tmp_path, **{role: loras})
        return SwiftI2VPipeline.from_pretrained(name, device="cpu", staged=True)

    (line,) = load("stage1_transformer").components.describe_loras()
    assert "2 of 2 keys merged at strength 0.5" in line
    with pytest.raises(LoadingError, match="does not fit SegmentTransformer3DModel"):
        load("stage2_transformer")


@pytest.fixture
def lora_of_stage1(tmp_path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    key = "diffusion_model.blocks.0.cross_attn.k_img"
    tensors = {
        f"{key}.lora_down.weight": torch.ones(1, 128),
        f"{key}.lora_up.weight": torch.ones(128, 1),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


@pytest.mark.slow
def test_a_run_with_a_stored_stage1_loads_neither_text_encoder_nor_stage1(
    model: Path, photo: Path, tmp_path: Path
) -> None:
    own = copy_model(model, tmp_path / "model")
    work = tmp_path / "work"
    arguments = ("--codec", "ffv1", "--work-dir", work)
    succeed(generate(own, photo, tmp_path / "first.mkv", *arguments))
    (work / "segment_0001.safetensors").unlink()
    for folder in ("text_encoder", "stage1/transformer"):
        (file,) = (own / folder).glob("*.safetensors")
        damage(file)
    succeed(generate(own, photo, tmp_path / "again.mkv", *arguments, "--resume"))
    assert (tmp_path / "again.mkv").read_bytes() == (tmp_path / "first.mkv").read_bytes()


def damage(file: Path) -> None:
    """Make every weight NaN: its file looks whole, and what is computed with it cannot be."""
    import torch
    from safetensors.torch import load_file, save_file

    state = {key: torch.full_like(tensor, torch.nan) for key, tensor in load_file(file).items()}
    save_file(state, file, {"format": "pt"})


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not hold a process to its limit")
@pytest.mark.slow  # three processes, and 200 MB of weights
def test_the_peak_is_that_of_the_largest_part_and_not_the_sum(tmp_path: Path) -> None:
    largest = save_model(tmp_path)
    assert largest > 60e6
    # A part takes its mapped file and its weights; all three of them the file of the last as well.
    limit = 3 * largest

    def run(way: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.helpers.limited_memory", tmp_path, limit, way]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)

    staged = run("staged")
    assert staged.returncode == 0, staged.stderr
    assert staged.stdout == "(5, 64, 64, 3)"
    together = run("together")
    assert together.returncode != 0
    assert re.search("memory|mmap", together.stderr.splitlines()[-1], re.IGNORECASE), (
        together.stderr
    )
