"""Transformers: beside diffusers' class at equal shapes, and every lever by itself."""

import logging
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swifti2v.config import SpeedConfig
from swifti2v.errors import ConfigError
from swifti2v.evaluation.speed.models import (
    Subject,
    TokenTimestepTransformer,
    distance,
    in_both_types,
)
from swifti2v.evaluation.speed.rows import Row
from swifti2v.evaluation.speed.timing import Protocol, measure
from swifti2v.models.runtime.speed import attention_order, prepare_speed
from swifti2v.models.vae.streaming import scale_factors
from swifti2v.pipelines.first_frame import make_stage1
from swifti2v.pipelines.stage1 import Stage1Pipeline
from swifti2v.pipelines.stage2 import predict_window
from swifti2v.planning.models import Models
from swifti2v.segments import Segment
from swifti2v.shapes import LatentShape, PixelShape

logger = logging.getLogger(__name__)

OFF = SpeedConfig(skips_given=False)
"""All levers off."""
LEVERS = {
    "given frames left out": replace(OFF, skips_given=True),
    "attention by cudnn": replace(OFF, attention="cudnn"),
    "attention by flash": replace(OFF, attention="flash"),
    "attention by efficient": replace(OFF, attention="efficient"),
    "compiled blocks": replace(OFF, compile=True),
    "float32 residual": replace(OFF, residual="float32"),
    "int8 weights": replace(OFF, linear="int8"),
    "float8 products": replace(OFF, linear="float8"),
}
NUM_TEXT = 512
"""Tokens of the prompt; diffusers' class cuts image tokens off by this number."""


def latent_shape(subject: Subject, stage: str) -> LatentShape:
    """Latent shape of the whole clip in one of the stages."""
    config, patch = subject.config, subject.architecture(f"{stage}_transformer").config
    vae: Any = subject.architecture(f"{stage}_vae").make_empty(f"{stage}_vae")
    low = config.stage1.downscale if stage == "stage1" else 1
    pixels = PixelShape(config.num_frames, config.height // low, config.width // low)
    scale = scale_factors(vae, patch.get("patch_size", (1, 2, 2))[1])
    return LatentShape.from_pixel_shape(pixels, scale, vae.config["z_dim"])


def largest_segment(subject: Subject, num_latent_frames: int) -> Segment:
    """One of the clip's windows with most frames."""
    segments = subject.config.stage2.plan(num_latent_frames)
    return max(segments, key=lambda segment: len(segment.window))


class Window:
    """Inputs of Stage II's transformer: one window at one noise level."""

    def __init__(self, subject: Subject, channels: int, text_dim: int) -> None:
        whole = latent_shape(subject, "stage2")
        self.subject, self.segment = subject, largest_segment(subject, whole.num_frames)
        self.num_given = len(self.segment.given)
        frames = len(self.segment.window)
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator)
        device = subject.device
        self.inputs = draw(1, channels, frames, *whole[2:]).to(device)
        self.text = draw(1, NUM_TEXT, text_dim).to(device)
        self.sigma = torch.full((1, frames), 0.9375, device=device)
        self.sigma[:, : self.num_given] = 0
        self.name = f"stage2, window of {frames}x{whole[2]}x{whole[3]} latents"

    def run(self, transformer: Any, speed: SpeedConfig = OFF) -> Tensor:
        """``[1, C, M, h, w]``: what is predicted for the target's frames."""
        config = replace(self.subject.config.stage2, speed=speed)
        num_given = self.num_given if speed.skips_given else 0
        with attention_order(speed.attention, self.inputs.device):
            output = predict_window(
                transformer, self.segment, self.inputs, self.sigma, self.text, config, num_given
            )
        return output[:, :, -len(self.segment.target) :]

    def flops(self) -> float:
        """Least work: nothing is computed that nobody reads."""
        empty = copy(self)
        empty.inputs, empty.text, empty.sigma = (
            tensor.to("meta") for tensor in (self.inputs, self.text, self.sigma)
        )
        models = Models(self.subject.name, self.subject.dtype)
        cost = models.count_layers(
            "stage2_transformer", lambda model: empty.run(model, SpeedConfig()), least=2
        )
        return cost.flops


def window_of(subject: Subject) -> Window:
    """Stage II's window of a model."""
    transformer: Any = Models(subject.name, subject.dtype).get("stage2_transformer", 1)
    return Window(subject, transformer.config["in_channels"], transformer.config["text_dim"])


def compare_transformers(subject: Subject, protocol: Protocol) -> Iterator[Row]:
    """Stage II's transformer beside ``WanTransformer3DModel`` with the same weights."""
    window = window_of(subject)
    flops = window.flops()
    theirs = TokenTimestepTransformer.from_segment_transformer(subject.load("stage2_transformer"))
    timing, expected = measure(partial(window.run, theirs), subject.device, protocol)
    variant = f"diffusers, {subject.kind}"
    yield Row(case=window.name, variant=variant, timing=timing, flops=flops)
    del theirs
    for each in in_both_types(subject):
        model, speed = each.load("stage2_transformer"), each.config.stage2.speed
        prepare_speed(model, speed, each.device)
        run = partial(window.run, model, speed)
        timing, result = measure(run, subject.device, protocol)
        yield Row(
            case=window.name,
            variant=f"swifti2v, {each.kind}",
            timing=timing,
            flops=flops,
            note=f"differs from diffusers by {distance(result, expected):.1e}",
        )


def pull_levers(subject: Subject, protocol: Protocol) -> Iterator[Row]:
    """Measure every lever alone on Stage II's window: seconds, memory, error against float32."""
    window = window_of(subject)
    flops = window.flops()
    with torch.inference_mode():
        reference = window.run(subject.load("stage2_transformer", torch.float32))
    for name, speed in {f"all off, {subject.kind}": OFF, **LEVERS}.items():
        model = subject.load("stage2_transformer")
        try:
            prepare_speed(model, speed, subject.device)
        except ConfigError as error:
            logger.warning("%s is left out: %s", name, error)
            continue
        timing, result = measure(partial(window.run, model, speed), subject.device, protocol)
        yield Row(
            case=f"levers, {window.name}",
            variant=name,
            timing=timing,
            flops=flops,
            error=distance(result, reference),
        )
        del model, result


def time_stage1(subject: Subject, protocol: Protocol) -> Iterator[Row]:
    """Stage I's transformer over the whole clip, each kernel of attention, plain and compiled."""
    shape = latent_shape(subject, "stage1")
    model = subject.load("stage1_transformer")
    models = Models(subject.name, subject.dtype)
    vae = models.get("stage1_vae")
    arguments = _stage1_arguments(subject, make_stage1(model, vae), shape)
    meta: list[Any] = [None if value is None else value.to("meta") for value in arguments]
    cost = models.count_layers("stage1_transformer", lambda m: make_stage1(m, vae).predict(*meta))
    case = f"stage1, {'x'.join(map(str, shape[1:]))} latents"
    for name, speed in {"attention by flash": OFF, **_stage1_levers(subject)}.items():
        if speed.compile:
            prepare_speed(model, speed, subject.device)

        def run(speed: SpeedConfig = speed) -> Tensor:
            with attention_order(speed.attention, subject.device):
                return make_stage1(model, vae).predict(*arguments)

        timing, _ = measure(run, subject.device, protocol)
        yield Row(case=case, variant=name, timing=timing, flops=cost.flops)


def _stage1_levers(subject: Subject) -> dict[str, SpeedConfig]:
    if subject.device.type != "cuda":
        return {}
    best = replace(OFF, attention="auto", compile=True)
    return {"attention as chosen": replace(OFF, attention="auto"), "compiled blocks": best}


def _stage1_arguments(subject: Subject, pipeline: Stage1Pipeline, shape: LatentShape) -> list[Any]:
    """Arguments of ``Stage1Pipeline.predict`` for the whole clip."""
    config, draw = pipeline.transformer.config, partial(torch.randn, device=subject.device)
    image_dim = config.get("image_dim")
    sigma = torch.full((1, shape.num_frames), 0.9375, device=subject.device)
    sigma[:, : int(pipeline.shows_given)] = 0
    return [
        draw(1, *shape),
        draw(1, pipeline.scale.time + shape.channels, *shape[1:]),
        sigma,
        draw(1, NUM_TEXT, config["text_dim"]),
        None if image_dim is None else draw(1, 257, image_dim),
    ]
