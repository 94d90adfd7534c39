import json
import os
import re
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from runs.card.__main__ import app
from runs.card.camera import ASKS
from runs.card.stages import (
    CARRIED,
    COPY_DETAIL,
    LANCZOS,
    MODEL,
    MODEL_NO_ANCHOR,
    Stage2Row,
    measure_codec,
    measure_seconds,
    measure_stage2,
    stage2_methods,
)
from runs.card.tables import END, START
from swifti2v.config import read_config
from swifti2v.errors import ShapeError
from swifti2v.media import downscale, open_writer
from tests.helpers.tiny import NUM_FRAMES, SIZE, tiny_pipeline

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def config(pipe):
    return pipe.configure(segment_size=2)  # then some latent frames start inside a segment


def texture(height: int = SIZE, width: int = SIZE, seed: int = 0) -> np.ndarray:
    """Grey texture with large and fine structure, [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 190, (height // 8, width // 8)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height)), np.float64)
    grey = smooth + rng.normal(0, 15, (height, width))
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def moving_clip(num_frames: int = NUM_FRAMES) -> np.ndarray:
    picture = texture(SIZE, 2 * SIZE)
    return np.stack([picture[:, shift : shift + SIZE] for shift in range(num_frames)])


def test_codec_keeps_all_but_rounding(pipe):
    grey = moving_clip(9)
    colour = np.random.default_rng(0).integers(0, 256, grey.shape).astype(np.uint8)
    rows = measure_codec(pipe.components.stage2_vae, {"grey": grey, "colour": colour})
    assert [(row.clip, row.height, row.width) for row in rows] == [
        ("grey", SIZE, SIZE),
        ("colour", SIZE, SIZE),
    ]
    for row in rows:
        assert row.psnr_db > 50
        assert row.coherence > 0.999


def test_stage2_rows_of_a_still_clip_know_what_each_method_can_do(pipe, config):
    still = texture()[None].repeat(NUM_FRAMES, axis=0)
    seen: list[Stage2Row] = []
    rows = measure_stage2(pipe, {"still": still}, config, {"twin": config}, on_row=seen.append)
    assert rows == seen
    by_method = {row.method: row for row in rows}
    assert by_method[COPY_DETAIL].psnr_db > 45  # the photo itself, up to rounding
    assert by_method[COPY_DETAIL].hf_ratio == pytest.approx(1, abs=0.01)
    assert by_method[CARRIED].psnr_db > 45
    assert by_method[COPY_DETAIL].carried > 0.95 > 0.6 > by_method[LANCZOS].carried
    assert by_method[COPY_DETAIL].cadence == pytest.approx(1)
    assert by_method[COPY_DETAIL].blockiness == pytest.approx(1, abs=0.1)
    assert by_method[LANCZOS].hf_ratio < 0.2
    assert by_method[LANCZOS].seam == pytest.approx(1)  # all frames are equal
    twin = replace(by_method["twin"], method=MODEL)
    assert twin == by_method[MODEL]
    assert by_method[MODEL_NO_ANCHOR] != replace(twin, method=MODEL_NO_ANCHOR)


def test_without_the_anchor_no_detail_of_the_photo_is_seen(pipe, config):
    photo = texture()
    sharper = photo.copy()
    sharper[::2, ::2] ^= 1
    low = downscale(moving_clip(), 4)
    first, second = (stage2_methods(pipe, low, image, config) for image in (photo, sharper))
    assert np.array_equal(first[MODEL_NO_ANCHOR](), second[MODEL_NO_ANCHOR]())
    assert not np.array_equal(first[MODEL](), second[MODEL]())


def test_stage2_refuses_a_clip_of_another_length_before_any_run(pipe, config):
    rows: list[Stage2Row] = []
    clips = {"good": moving_clip(), "short": moving_clip(9)}
    with pytest.raises(ShapeError, match=r"clip short is \(9, 64, 64, 3\)"):
        measure_stage2(pipe, clips, config, on_row=rows.append)
    assert rows == []


def test_seconds_of_the_stages_add_up_to_less_than_the_whole(pipe, config):
    seconds = measure_seconds(pipe, Image.fromarray(texture()), "zoom in", config)
    total, first = seconds.pop("total"), seconds.pop("first segment")
    assert set(seconds) == {"text", "stage1", "reference", "stage2", "decode"}
    assert 0 < first < total
    assert sum(seconds.values()) <= total


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, a clip of 64x64 and a larger photo."""
    root = tmp_path_factory.mktemp("files")
    tiny_pipeline().save_pretrained(root / "model")
    (root / "clips").mkdir()
    (root / "photos").mkdir()
    clip = root / "clips" / "walk.mkv"
    with open_writer(clip, height=SIZE, width=SIZE, fps=15, codec="ffv1") as writer:
        writer.write(moving_clip(NUM_FRAMES + 2))
    Image.fromarray(texture(80, 96)).save(root / "photos" / "hill.png")
    return root


def measure(
    root: Path,
    output: Path,
    *held_out: str,
    num_frames: int = NUM_FRAMES,
    more: tuple[str, ...] = (),
) -> Result:
    names = [word for name in held_out for word in ("--held-out", name)]
    words: list[object] = ["--model", root / "model", "--clips", root / "clips"]
    words += ["--photos", root / "photos", *names, "--output", output, "--device", "cpu"]
    words += ["--num-frames", num_frames, "--height", SIZE, "--width", SIZE]
    words += ["--variant", "stage2.context_size=0", "--further-photos", 0, *more]
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.slow
def test_the_command_fills_the_card_and_keeps_its_text(files, tmp_path):
    output = tmp_path / "card.md"
    output.write_text(f"# Tiny\n\n{START}\noutdated\n{END}\n\nMore.\n", encoding="utf-8")
    result = measure(files, output, "walk", "hill.png", more=("--moving", "walk"))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("| mark | wanted | measured |")
    assert result.stdout.endswith(f"\n{output}\n")
    assert "codec: 1 clips" in result.stderr
    assert f"camera: {len(ASKS)} clips of 1 photos" in result.stderr
    assert "hill.png: photo 96x80 scaled and cropped" in result.stderr
    text = output.read_text(encoding="utf-8")
    assert text.startswith(f"# Tiny\n\n{START}\n")
    assert text.endswith(f"{END}\n\nMore.\n")
    assert "outdated" not in text
    for part in (
        "| walk |",
        "| prompt | hill |",
        "moving camera**: walk.",
        "stage2.context_size=0",
    ):
        assert part in text
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
def test_the_command_prints_every_measurement_as_json(files, tmp_path):
    output = tmp_path / "card.md"
    output.write_text(START + END, encoding="utf-8")
    more = ("--json", "--moving", "walk.mkv", "--dtype", "bfloat16")
    result = measure(files, output, "walk.mkv", "hill", more=more)
    assert result.exit_code == 0, result.output
    card = json.loads(result.stdout)
    assert card["moving"] == ["walk"]
    assert len(card["camera"]) == 2 * len(ASKS)
    assert {row["stage"] for row in card["camera"]} == {"Stage I", "Stage I + II"}
    assert {row["method"] for row in card["stage2"]} >= {MODEL, CARRIED, LANCZOS}
    marks = {mark["text"]: mark for mark in card["marks"]}
    assert marks["weights, MB"]["is_met"] is True
    assert card["machine"]["weights loaded as"] == "bfloat16"
    assert marks["seconds of a clip"]["value"] == card["seconds"]["total"]
    assert marks["Stage I's displacement, px off"]["value"] is None  # the tiny model knows none
    for mark in marks.values():
        assert str(mark["wanted"]) in output.read_text(encoding="utf-8")


def test_a_moving_clip_has_to_be_held_out(files, tmp_path):
    output = tmp_path / "card.md"
    output.write_text(START + END, encoding="utf-8")
    result = measure(files, output, "walk", "hill", more=("--moving", "hill"))
    assert result.exit_code == 1
    assert "--moving hill is not a held-out clip" in result.stderr


@pytest.mark.parametrize(
    ("held_out", "num_frames", "card", "message"),
    [
        (("hill",), NUM_FRAMES, START + END, "names no clip"),
        (("walk",), NUM_FRAMES, START + END, "names no photo"),
        (("walk", "valley"), NUM_FRAMES, START + END, "--held-out valley is no file"),
        (("walk", "walk.mkv"), NUM_FRAMES, START + END, "walk is there twice"),
        (("walk", "hill"), 21, START + END, "gives 19 frame(s), at least 21 are needed"),
        (("walk", "hill"), NUM_FRAMES + 1, START + END, "num_frames 18 does not fit"),
        (("walk",), NUM_FRAMES, "no markers", "needs the lines"),
        (("walk",), NUM_FRAMES, None, "does not exist"),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_card_alone(
    files, tmp_path, held_out, num_frames, card, message
):
    output = tmp_path / "card.md"
    if card is not None:
        output.write_text(card, encoding="utf-8")
    result = measure(files, output, *held_out, num_frames=num_frames)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert (output.read_text(encoding="utf-8") if card is not None else None) == card


def test_the_shipped_card_is_measured_on_exactly_what_training_holds_out(tmp_path):
    held_out = read_config(ROOT / "src/swifti2v/configs/nano.yaml")["held_out"]
    recorder = tmp_path / "python"
    recorder.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    recorder.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", str(ROOT / "runs/nano_card.sh")]
    words = subprocess.check_output(script, text=True, env=environment).splitlines()
    pairs = list(pairwise(words))
    named = {Path(value).stem for flag, value in pairs if flag == "--held-out"}
    moving = [value for flag, value in pairs if flag == "--moving"]
    assert named == set(held_out)
    assert len(moving) == 4
    assert named > set(moving)
    data = (ROOT / "docs/nano.md").read_text(encoding="utf-8").partition("### Data")[2]
    for name in held_out:
        (line,) = [line for line in data.splitlines() if re.search(rf"\b{name}\b", line)]
        assert "*held out*" in line
        assert ("moving camera" in line) == (name in moving)
