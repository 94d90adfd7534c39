"""Camera motion as rotary phases: the structured start of nano's Stage I."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from swifti2v.errors import ConfigError
from swifti2v.models.text import encode_prompt
from swifti2v.training.camera_motion import CAMERA_MOTIONS, CameraMotion, View, render_motion
from swifti2v.training.data import make_procedural_material
from swifti2v.training.draws import Draw
from swifti2v.training.initialization import fit_output_layer
from swifti2v.training.motion_phases import (
    FeatureLayout,
    initialize_stage1,
    make_phases,
    measure_displacement,
)
from swifti2v.training.nano_codec import fit_codec
from swifti2v.training.nano_config import INFERENCE_LEVELS, NanoConfig, TextEncoderConfig
from swifti2v.training.nano_models import TransformerSize, make_stage1_transformer
from swifti2v.training.stage1 import Stage1Objective, Stage1Task
from swifti2v.training.stage1_sources import CameraMotionSource
from swifti2v.training.text_encoder import MotionClassifier, make_tokenizer

SIZE = TransformerSize(num_heads=2, num_layers=2)
TEXT_WIDTH = 32
MATERIAL = make_procedural_material(height=64, width=64, num_frames=17, num_clips=2, seed=0)


def make_started_stage1() -> tuple[WanTransformer3DModel, FeatureLayout]:
    torch.manual_seed(0)
    transformer = make_stage1_transformer(SIZE, TEXT_WIDTH)
    return transformer, initialize_stage1(transformer)


@pytest.mark.parametrize("motion", CAMERA_MOTIONS)
@settings(max_examples=20)
@given(time=st.floats(0, 1))
def test_displacement_tells_where_a_place_was(motion: CameraMotion, time: float) -> None:
    # A picture whose values are its coordinates: red the row, green the column.
    side = torch.linspace(-1, 1, 256, dtype=torch.float64)
    row, column = torch.meshgrid(side, side, indexing="ij")
    picture = torch.stack([row, column, row])
    view = View(size=0.5, center=(0.1, -0.1))
    frames = render_motion(picture, motion, [0.0, time], view, (64, 96))
    tokens = torch.nn.functional.avg_pool2d(frames[:2].transpose(0, 1), 8)  # [2, 2, 8, 12]
    step = tokens[0, :, 1, 1] - tokens[0, :, 0, 0]
    away = (tokens[1] - tokens[0]) / step[:, None, None]
    expected = measure_displacement(motion, time, (8, 12)).double()
    torch.testing.assert_close(away, expected, atol=1e-5, rtol=0)


def test_phases_are_those_of_the_rotary_embedding() -> None:
    """A query with the phases, rotated, is the query without them rotated at the other place."""
    rope = make_started_stage1()[0].rope
    cosines, sines = (table[0, :, 0] for table in rope(torch.zeros(1, 1, 1, 12, 20)))  # [L, 64]
    phases = make_phases("pan right", [1.0], (12, 20))  # 2.4 columns
    for axis, start in enumerate((rope.t_dim, rope.t_dim + rope.h_dim)):
        for index in range(3):
            feature, phase = start + 2 * index, 6 * axis + 2 * index
            here = torch.complex(cosines[:, feature], sines[:, feature])
            turned = here * torch.complex(phases[:, phase], phases[:, phase + 1])
            turn = 10000 ** (-2 * index / 20) * (2.4 if axis else 0.0)
            torch.testing.assert_close(
                turned, here * torch.polar(torch.ones(()), torch.tensor(turn)), atol=1e-4, rtol=0
            )


def test_attention_with_phases_fetches_the_displaced_content() -> None:
    transformer, layout = make_started_stage1()
    rows, columns = grid = (6, 10)
    num_places = rows * columns
    content = torch.randn(num_places, layout.num_content)
    tokens = torch.zeros(2, num_places, layout.width)  # the photo and one later frame
    tokens[0, :, : layout.num_content] = content
    tokens[..., layout.constants] = torch.tensor([5.0, -5, -5, 5])
    tokens[0, :, layout.constants] = torch.tensor([5.0, -5, 5, -5])
    rotary = transformer.rope(torch.zeros(1, 1, 2, rows, columns))
    block: Any = transformer.blocks[1]
    # 0.12 of the size: 1.2 columns, 0.72 rows; both round to one token.
    shifts: dict[CameraMotion, int] = {"pan right": 1, "tilt down": columns, "pan left": -1}
    for motion, shift in shifts.items():
        tokens[..., layout.phases] = make_phases(motion, [0.0, 1.0], grid).reshape(2, -1, 12)
        with torch.no_grad():
            normed = block.norm1(tokens.reshape(1, -1, layout.width))
            fetched = block.attn1(normed, None, None, rotary)[0, num_places:]
        places = torch.arange(num_places).reshape(grid)[2:4, 3:7].flatten()
        for features, expected in ((layout.moved, places + shift), (layout.still, places)):
            found = (fetched[places, features] @ content.T).argmax(dim=1)
            assert torch.equal(found, expected)


def test_features_of_a_token_do_not_overlap() -> None:
    for width in (128, 192, 256, 512):
        layout, num_content = FeatureLayout(width), 24
        parts = (layout.moved, layout.still, layout.phases, layout.chart, layout.constants)
        used = [*range(layout.moved.start), *(i for part in parts for i in range(width)[part])]
        assert layout.num_content == num_content
        assert len(set(used)) == len(used)
        assert max(used) == width - 1
        assert len(set(layout.channels)) == num_content


def test_other_shapes_have_no_structured_start() -> None:
    flat = make_stage1_transformer(replace(SIZE, num_layers=1), TEXT_WIDTH)
    with pytest.raises(ConfigError, match="at least 2 blocks"):
        initialize_stage1(flat)


def draw(step: int, size: int) -> Draw:
    return Draw(seed=0, step=step, batch_size=size, indices=tuple(range(size)))


def make_stage1_task(transformer: WanTransformer3DModel) -> Stage1Task:
    """Clips of 16x80 pixels in whole, at the levels of sampling."""
    encoder, tokenizer = (
        MotionClassifier(TextEncoderConfig(width=32, num_layers=1)).encoder,
        make_tokenizer(),
    )
    return Stage1Task(
        transformer,
        fit_codec(MATERIAL.clips, 4, 4),
        (CameraMotionSource(MATERIAL.stills, (16, 80), 5, {4: 1.0}),),
        Stage1Objective(noise=INFERENCE_LEVELS, error_of="clean"),
        NanoConfig().to_generation_config().stage1,
        lambda prompts: encode_prompt(encoder, tokenizer, prompts, 40, truncate=True),
    )


def test_ridge_fit_explains_part_of_the_motion() -> None:
    """With the true phases in block 0's output it beats a still clip, and a fit without them."""
    errors = []
    for has_phases in (True, False):
        transformer, layout = make_started_stage1()
        task = make_stage1_task(transformer)
        times = [0.0, *((4 * frame - 1.5) / 16 for frame in range(1, 5))]
        phases = [make_phases(motion, times, (4, 20)) for motion in CAMERA_MOTIONS]
        written = torch.stack(phases) * has_phases

        def write_phases(
            _: nn.Module,
            __: object,
            tokens: Tensor,
            written: Tensor = written,
            layout: FeatureLayout = layout,
        ) -> Tensor:
            tokens[..., layout.phases] = written
            return tokens

        transformer.blocks[0].register_forward_hook(write_phases)
        fit_output_layer(transformer, (task.draw_fit_sample(draw(k, 7)) for k in range(16)))
        with torch.no_grad():
            samples = [task.draw_fit_sample(draw(100 + k, 7)) for k in range(4)]
            left = [
                (cast(Tensor, s.forward()) - s.residual).square().mean().item() for s in samples
            ]
            errors.append(sum(left) / sum(s.residual.square().mean().item() for s in samples))
    assert errors[0] < min(0.97, errors[1])
