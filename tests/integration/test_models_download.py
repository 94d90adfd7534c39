"""``swifti2v models download`` from a Hub on this machine, and runs that need none after it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from swifti2v.models.loading.availability import find_missing_weights
from tests.helpers import hub
from tests.helpers import packed_files as layouts
from tests.helpers.hub_server import HubServer, etag
from tests.unit.models.weights import test_names as wan_files

FIRST, SECOND, SMALL = "people/Wan2.1-I2V", "people/Wan2.2-TI2V", "repackagers/fp8"
LORA = "repackagers/loras/styles/a.safetensors"
FILE = f"{SMALL}/deep/ti2v_fp8_scaled.safetensors"
LARGE_BYTES = 25_000_000
"""More than two of the pieces that ``huggingface_hub`` reads."""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repositories")
    hub.make_hub(root / "people")
    (root / FILE).parent.mkdir(parents=True)
    native = wan_files.original_transformer(hub.state_of(hub.stage2_base()))
    layouts.write(layouts.SAFETENSORS["ComfyUI old"](native), root / FILE)
    (root / LORA).parent.mkdir(parents=True)
    pair = {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.ones(1, 128),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.ones(128, 1),
    }
    save_file(pair, root / LORA)
    return root


@pytest.fixture
def server(repositories: Path) -> Any:
    with HubServer(repositories).run() as running:
        yield running


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """All components on the Hub, and a smaller variant of one."""
    values = hub.preset(tmp_path)
    for source in values["components"].values():
        source["source"] = f"people/{source['source']}"
    values["components"]["stage1_transformer"]["loras"] = [{"path": LORA}]
    values["components"]["stage2_transformer"]["variants"] = {"fp8": {"source": FILE}}
    path = tmp_path / "preset.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(server: HubServer, cache: Path, *words: object) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "swifti2v", "models", "download", *map(str, words)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(server: HubServer, cache: Path, *words: object) -> tuple[int, str, str]:
    process = start(server, cache, *words)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def block(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A machine whose network does not answer, with a cache of the Hub."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))


@pytest.mark.slow
def test_a_downloaded_preset_runs_without_asking_the_hub(
    server: HubServer, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    code, out, err = run(server, cache, preset, "--variant", "fp8")
    assert code == 0, err
    assert out == f"complete: --model {preset}:fp8\n"
    assert "files, " in err
    fetched = {path for method, path, _ in server.requests if method == "GET"}
    assert any(path.endswith("ti2v_fp8_scaled.safetensors") for path in fetched)
    assert not any(path.startswith(f"/{SECOND}/") and "/transformer/" in path for path in fetched)

    block(monkeypatch, cache)
    name = f"{preset}:fp8"
    assert find_missing_weights(name, with_stage1=True) == []
    found = hub.load(name)
    assert found.describe_loras()
    layer = found.stage2_transformer.blocks[0].attn1.to_q
    assert type(layer).__name__ == "PackedLinear"
    missing = find_missing_weights(str(preset), with_stage1=True)
    assert [(files.repo_id, files.pattern) for files in missing] == [(SECOND, "transformer")]


@pytest.mark.slow
def test_a_stopped_download_goes_on_where_it_was(
    server: HubServer, repositories: Path, preset: Path, tmp_path: Path
) -> None:
    cache, large = tmp_path / "cache", repositories / LORA
    original = large.read_bytes()
    try:
        large.write_bytes(os.urandom(LARGE_BYTES))
        etag.cache_clear()
        server.stall_after = 20_000_000
        process = start(server, cache, preset)
        parts = f"hub/models--repackagers--loras/blobs/{etag(large)}.swifti2v-part"
        deadline = time.monotonic() + 60
        while not (cache / parts).is_file() or (cache / parts).stat().st_size < 10_000_000:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        had = (cache / parts).stat().st_size
        server.stall_after = None
        server.go_on.set()
        server.requests.clear()
        code, _, err = run(server, cache, preset)
        assert code == 0, err
        ranges = [
            asked for _, path, asked in server.requests if asked and path.endswith(LORA[-13:])
        ]
        assert ranges == [f"bytes={had}-"]
        place = cache / "hub/models--repackagers--loras/snapshots"
        assert next(place.rglob("a.safetensors")).read_bytes() == large.read_bytes()
        assert not (cache / parts).exists()
    finally:
        large.write_bytes(original)
        etag.cache_clear()


@pytest.mark.slow
def test_what_came_wrong_is_fetched_anew(
    server: HubServer, repositories: Path, preset: Path, tmp_path: Path
) -> None:
    cache, large = tmp_path / "cache", repositories / LORA
    original = large.read_bytes()
    try:
        large.write_bytes(os.urandom(LARGE_BYTES))
        etag.cache_clear()
        part = cache / f"hub/models--repackagers--loras/blobs/{etag(large)}.swifti2v-part"
        part.parent.mkdir(parents=True)
        part.write_bytes(b"x" * 1000)  # of another file
        code, _, err = run(server, cache, preset)
        assert code == 1
        assert "came with another SHA-256" in err
        code, _, err = run(server, cache, preset)
        assert code == 0, err
    finally:
        large.write_bytes(original)
        etag.cache_clear()


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    server: HubServer, preset: Path, tmp_path: Path
) -> None:
    server.sizes[LORA] = 10**15
    code, _, err = run(server, tmp_path / "cache", preset)
    assert code == 1
    assert "are to be downloaded to" in err
    assert "free; make room, set HF_HOME" in err
    assert not any("/resolve/" in path for _, path, _ in server.requests)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_a_dry_run_lists_the_files_and_fetches_none(
    server: HubServer, preset: Path, tmp_path: Path
) -> None:
    code, out, _ = run(server, tmp_path / "cache", preset, "--variant", "fp8", "--dry-run")
    assert code == 0
    listed = dict(line.split("\t") for line in out.splitlines())
    assert int(listed[FILE]) == (server.root / FILE).stat().st_size
    assert not any("/resolve/" in path for _, path, _ in server.requests)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variant", "fp7"], "variant 'fp7' is unknown; there are bf16, fp8"),
        (["--variant", "bf16"], "nothing"),
    ],
)
def test_mistakes_are_named(
    words: list[str], message: str, server: HubServer, preset: Path, tmp_path: Path
) -> None:
    if message == "nothing":
        values = yaml.safe_load(preset.read_text())
        values["components"]["stage2_vae"]["source"] = "people/nothing"
        preset.write_text(yaml.safe_dump(values))
    code, _, err = run(server, tmp_path / "cache", preset, *words)
    assert code == 1
    assert message in err


@pytest.mark.slow
def test_files_of_a_models_folder_are_used_instead_of_the_hub(
    server: HubServer,
    repositories: Path,
    preset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "models"
    shutil.copytree(repositories / "people", folder)
    (folder / "diffusion_models").mkdir()
    shutil.copy(repositories / FILE, folder / "diffusion_models/TI2V_FP8_scaled.safetensors")
    (folder / "loras").mkdir()
    shutil.copy(repositories / LORA, folder / "loras")
    cache = tmp_path / "cache"
    code, out, err = run(server, cache, preset, "--variant", "fp8", "--models-dir", folder)
    assert (code, out) == (0, f"complete: --model {preset}:fp8\n"), err
    assert "0 files" in err
    assert server.requests == []
    block(monkeypatch, cache)
    monkeypatch.setenv("SWIFTI2V_MODELS_DIR", str(folder))
    found = hub.load(f"{preset}:fp8")
    assert found.describe_loras()
    hub.load(preset)
    (folder / "Wan2.2-TI2V/transformer/diffusion_pytorch_model.safetensors").unlink()
    missing = find_missing_weights(str(preset), with_stage1=True)
    assert [(files.repo_id, files.pattern) for files in missing] == [(SECOND, "transformer")]
    assert json.loads(json.dumps(missing))
