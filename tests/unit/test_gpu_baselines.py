"""The clips of other systems: what can be checked of them without their weights."""

import importlib.util
import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from swifti2v.media import probe_clip

SCRIPT = Path(__file__).parents[2] / "runs" / "gpu_baselines.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_baselines", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_call_fits_the_installed_pipelines(script: ModuleType) -> None:
    given: dict[str, Any] = {"image": None, "prompt": "", "generator": None}
    latents: dict[str, Any] = {"latents": None, "audio_latents": None}
    calls = [
        (script.WanImageToVideoPipeline, {**given, **script.WAN_CALL}),
        (script.LTX2ImageToVideoPipeline, {**given, **script.LTX_FIRST_CALL}),
        (script.LTX2LatentUpsamplePipeline, {"latents": None, **script.LTX_UPSAMPLE_CALL}),
        (script.LTX2ImageToVideoPipeline, {**given, **latents, **script.LTX_SECOND_CALL}),
    ]
    for pipeline, arguments in calls:
        inspect.signature(pipeline.__call__).bind(None, **arguments)
    sizes = script.LTX_FIRST_CALL, script.LTX_SECOND_CALL
    assert [call[side] % 32 for call in sizes for side in ("height", "width")] == [0] * 4
    assert script.NUM_FRAMES % 8 == 1  # LTX-2's latent frames hold eight


def test_clips_are_made_once_with_their_cost(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "HEIGHT", 32)
    monkeypatch.setattr(script, "WIDTH", 64)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (100, 60), (250, 120, 0)).save(photos / f"{name}.png")
    seen = []

    def generate(photo: Image.Image, prompt: str) -> Any:
        seen.append((photo.size, prompt))
        return np.repeat(np.asarray(photo)[None] / 255, 3, axis=0)

    with pytest.raises(SystemExit, match=r"a\.png has no prompt"):
        script.run("row", photos, tmp_path, lambda: generate)
    for name in ("a", "b"):
        (photos / f"{name}.txt").write_text(f"prompt {name}\n")
    script.run("row", photos, tmp_path, lambda: generate)
    assert seen == [((64, 32), "prompt a"), ((64, 32), "prompt b")]
    assert probe_clip(tmp_path / "row" / "b.mp4").fps == script.FPS
    costs = [json.loads(line) for line in (tmp_path / "row.jsonl").read_text().splitlines()]
    assert [cost["name"] for cost in costs] == ["a", "b"]
    assert all(cost["seconds"] > 0 for cost in costs)
    script.run("row", photos, tmp_path, lambda: pytest.fail("nothing is left to make"))
