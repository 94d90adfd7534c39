"""Requests of prompts, Stage I's true displacement, and rows of planted models."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from runs.card.camera import ASKS, FURTHER_ASKS, CameraRow, displacement_error, measure_camera
from swifti2v.config import GenerationConfig, parse_config
from swifti2v.pipelines.camera_moves import MOVES, ROLL, SHIFT, ZOOM, CameraMove
from swifti2v.pipelines.course import draw_course
from swifti2v.pipelines.displacement import enlarge, move_photo
from swifti2v.pipelines.stage1 import Stage1Clip, Stage1Pipeline
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from tests.helpers.tiny import NUM_FRAMES, SETTINGS, SIZE, tiny_components, tiny_pipeline
from tests.unit.runs.card.test_stages import texture

FRAME = (24, 40)
"""Height and width in pixels."""
CELLS = (3, 5)
SEED = 3


def pan_left(num_frames: int, cells: tuple[int, int], width: int, seed: int) -> Tensor:
    """Its true displacement, written down anew: what is seen comes from further left."""
    displacement = torch.zeros(num_frames, 2, *cells)
    displacement[:, 0] = -SHIFT * width * draw_course(num_frames, seed).clock[:, None, None]
    return displacement


def test_the_true_displacement_of_a_pan_is_no_error_and_a_known_one_is_measured():
    true = pan_left(9, CELLS, FRAME[1], SEED)
    assert displacement_error(true, MOVES["pan left"], SEED, FRAME) == pytest.approx(0, abs=1e-5)
    off = torch.tensor([3.0, -4.0]).view(1, 2, 1, 1)
    assert displacement_error(true + off, MOVES["pan left"], SEED, FRAME) == pytest.approx(5)
    slow = displacement_error(true, CameraMove(pan=-0.5), SEED, FRAME)
    clock = draw_course(9, SEED).clock[1:].mean()
    assert slow == pytest.approx(0.5 * SHIFT * FRAME[1] * float(clock), rel=1e-5)
    assert displacement_error(true, MOVES["pan left"], SEED + 1, FRAME) > 0.01  # another course


def test_the_true_displacement_of_a_zoom_and_a_roll_is_about_the_centre_of_the_frame():
    clock = draw_course(9, SEED).clock[:, None, None]
    row = ((torch.arange(3) - 1.0) * 8)[:, None].expand(CELLS)  # cells of 8x8 pixels
    column = ((torch.arange(5) - 2.0) * 8).expand(CELLS)
    growth = ZOOM**clock - 1
    zoom = torch.stack([growth * column, growth * row], dim=1)
    assert displacement_error(zoom, MOVES["zoom in"], SEED, FRAME) == pytest.approx(0, abs=1e-5)
    turned = torch.complex(column, row) * torch.exp(1j * ROLL * clock)
    roll = torch.stack([turned.real - column, turned.imag - row], dim=1)
    assert displacement_error(roll, MOVES["roll right"], SEED, FRAME) == pytest.approx(0, abs=1e-5)


def test_every_ask_names_what_its_move_does():
    asks = [*ASKS, *FURTHER_ASKS]
    assert len(ASKS) == 7
    assert len({ask.prompt for ask in asks}) == len(asks)
    assert [ask.prompt for ask in asks if ask.has_parallax] == [
        "dolly in",
        "dolly out",
        "orbit left",
        "orbit right",
    ]
    for ask in asks:
        if ask.prompt in MOVES:
            assert ask.move == MOVES[ask.prompt]
        if ask.labels == ("static",):
            assert ask.move == CameraMove()


@pytest.mark.parametrize(
    ("asked", "measured", "is_right"),
    [
        (("pan left",), ("pan left", "zoom in"), True),
        (("pan left",), ("zoom in", "pan left"), False),
        (("pan left",), (), False),
        (("static",), (), True),
        (("static",), ("tilt up",), False),
        (("pan left", "zoom in"), ("zoom in", "pan left", "tilt up"), True),
        (("pan left", "zoom in"), ("zoom in", "tilt up", "pan left"), False),
        (("pan left", "zoom in"), ("zoom in",), False),
        ((), ("tilt up",), None),
    ],
)
def test_the_strongest_components_have_to_be_those_asked_for(
    planted_rows, asked, measured, is_right
):
    row = replace(planted_rows[0], asked=asked, measured=measured)
    assert row.is_right is is_right


class PanningStage1(Stage1Pipeline):
    """Pans left whatever the prompt says, and knows it."""

    def __call__(self, image, conditions, num_frames, seed, config, on_progress=None):
        height, width = image.shape[-2:]
        own = pan_left(num_frames, (4, 4), width, seed).transpose(0, 1)[None]
        return Stage1Clip(move_photo(image, enlarge(own, height, width)), own)


@pytest.fixture(scope="module")
def planted_rows() -> list[CameraRow]:
    pipe = tiny_pipeline()
    pipe.stage1 = PanningStage1(pipe.components.stage1_transformer, pipe.components.stage1_vae)
    photos = {name: Image.fromarray(texture(seed=seed)) for seed, name in enumerate("ab")}
    return measure_camera(pipe, photos, pipe.config, further=["b"], seed=SEED)


def test_rows_ask_every_photo_for_seven_moves_and_some_for_more(planted_rows):
    prompts, more = ([ask.prompt for ask in asks] for asks in (ASKS, FURTHER_ASKS))
    for stage in ("Stage I", "Stage I + II"):
        rows = [(row.photo, row.prompt) for row in planted_rows if row.stage == stage]
        assert rows == [("a", name) for name in prompts] + [("b", name) for name in prompts + more]


def test_a_stage1_that_always_pans_left_is_right_once_and_off_by_what_is_known(planted_rows):
    rows = {(row.prompt, row.photo): row for row in planted_rows if row.stage == "Stage I"}
    width = SIZE // 4
    way = SHIFT * width * float(draw_course(NUM_FRAMES, SEED).clock[1:].mean())
    wanted = {
        "pan left": 0,
        "pan right": 2 * way,
        "static camera": way,
        "quickly pan right": 2.7 * way,
    }
    for prompt, value in wanted.items():
        assert rows[prompt, "b"].displacement_px == pytest.approx(value, rel=1e-4, abs=1e-5)
    assert math.isnan(rows["dolly in", "b"].displacement_px)
    assert all(
        math.isnan(row.displacement_px) for row in planted_rows if row.stage == "Stage I + II"
    )
    assert rows["pan left", "a"].is_right
    assert not rows["pan right", "a"].is_right
    clock = float(draw_course(NUM_FRAMES, SEED).clock[-1])
    assert rows["pan left", "a"].pan == pytest.approx(SHIFT * clock, abs=0.02)
    assert min(row.first_frame_psnr_db for row in rows.values()) == 60


@pytest.mark.slow
def test_a_model_without_displacement_has_no_error():
    pipe = tiny_pipeline()
    rows = measure_camera(pipe, {"a": Image.fromarray(texture())}, pipe.config)
    assert all(math.isnan(row.displacement_px) for row in rows)
    full = [row for row in rows if row.stage == "Stage I + II"]
    assert min(row.first_frame_psnr_db for row in full) > 50  # frame 0 is the photo, which is grey


@pytest.mark.slow
def test_a_saved_model_that_generates_displacement_is_loaded_and_measured(tmp_path):
    parts = tiny_components()
    stage1 = dict(parts.stage1_transformer.config) | {"out_channels": 5 + 768}
    kind: Any = type(parts.stage1_transformer)  # untyped in diffusers
    parts.stage1_transformer = kind.from_config(stage1)
    torch.nn.init.zeros_(parts.stage1_transformer.proj_out.weight)
    torch.nn.init.zeros_(parts.stage1_transformer.proj_out.bias)
    settings = copy.deepcopy(SETTINGS)
    settings["stage1"]["motion"] = "displacement"
    settings["stage1"]["sampling"]["parameterization"] = "reference_residual"
    config = parse_config(GenerationConfig, settings, "test")
    SwiftI2VPipeline(parts, config).save_pretrained(tmp_path)
    pipe = SwiftI2VPipeline.from_pretrained(tmp_path, device="cpu")
    rows = measure_camera(pipe, {"a": Image.fromarray(texture())}, pipe.config, ["a"], seed=SEED)
    off = {row.prompt: row.displacement_px for row in rows if row.stage == "Stage I"}
    way = SHIFT * SIZE / 4 * float(draw_course(NUM_FRAMES, SEED).clock[1:].mean())
    assert off["static camera"] == off["do not zoom in"] == 0  # the photo rests
    assert off["tilt down"] == pytest.approx(way, rel=1e-5)
    assert off["slowly pan right"] == pytest.approx(way / 2, rel=1e-5)
    assert math.isnan(off["orbit left"])
