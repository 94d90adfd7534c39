"""Costs of the parts of nano's training."""

import torch

from swifti2v.shapes import PixelShape
from swifti2v.training.costs.plan import ClipSample, SamplePlan, TrainingPlan, plan_transformer
from swifti2v.training.engine.memory import count_parameters
from swifti2v.training.nano.config import NanoConfig, TextEncoderConfig
from swifti2v.training.nano.models import (
    STAGE1_SCALE,
    STAGE2_SCALE,
    make_stage1_transformer,
    make_stage2_transformer,
)
from swifti2v.training.nano.text_encoder import MotionClassifier


def plan_text_encoder(config: TextEncoderConfig) -> TrainingPlan:
    """Predict the training of nano's text encoder, without its activations."""
    with torch.device("meta"):
        model = MotionClassifier(config)
    what = f"{config.max_tokens} bytes of a prompt"
    return TrainingPlan(
        part="text",
        parameters=count_parameters(model),
        run=config.run,
        optimizers=[phase.optimizer for phase in config.phases],
        samples=[
            SamplePlan(phase=phase.name, what=what, tokens=config.max_tokens)
            for phase in config.phases
        ],
    )


def plan_nano(config: NanoConfig) -> list[TrainingPlan]:
    """Predict the parts of nano's training."""
    width, first, second = config.text.width, config.stage1, config.stage2
    with torch.device("meta"):
        models = (
            make_stage1_transformer(first.size, width),
            make_stage2_transformer(second.size, width),
        )
    largest = (
        max(config.low_sizes(phase.scale), key=lambda size: size.num_pixels)
        for phase in first.phases
    )
    drawn = [
        ClipSample(
            PixelShape(config.num_frames, *size), 1 + max(first.num_drawn_frames), STAGE1_SCALE
        )
        for size in largest
    ]
    windows = second.objective.windows
    shapes = [PixelShape(max(p.num_frames), second.crop, second.crop) for p in second.phases]
    cut = [ClipSample.of(shape, None, windows, STAGE2_SCALE) for shape in shapes]
    return [
        plan_text_encoder(config.text),
        plan_transformer(
            "stage1",
            models[0],
            count_parameters(models[0]),
            first.run,
            first.phases,
            drawn,
            num_text_tokens=config.max_text_length,
        ),
        plan_transformer(
            "stage2",
            models[1],
            count_parameters(models[1]),
            second.run,
            second.phases,
            cut,
            num_text_tokens=1,  # its prompt is empty
        ),
    ]
