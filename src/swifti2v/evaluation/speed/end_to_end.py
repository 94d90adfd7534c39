"""The alternative to two stages: one model over all frames of the whole size at once."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swifti2v.evaluation.speed.models import Subject, make_random
from swifti2v.evaluation.speed.rows import Row
from swifti2v.evaluation.speed.timing import Protocol, measure
from swifti2v.models.loading.architectures import KNOWN, Architecture
from swifti2v.models.loading.components import cast_weights
from swifti2v.models.runtime.speed import attention_order
from swifti2v.planning.costs import extrapolate
from swifti2v.planning.counting import META, count
from swifti2v.shapes import LatentShape, latent_frames

CALLS = 100
"""Model calls of a clip: 50 steps with guidance, as these models are run without distillation."""
MODELS = {
    "Wan2.2-TI2V-5B": ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", 16),
    "Wan2.1-I2V-14B": ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", 8),
}
"""Hub id, and pixels along the side of a latent cell."""


def time_end_to_end(subject: Subject, protocol: Protocol) -> Iterator[Row]:
    """One model call over the whole clip, with random weights; a clip is 100 times that.

    The VAE and the text encoder are left out, which flatters these models.
    """
    config = subject.config
    frames = latent_frames(config.num_frames)
    case = f"end to end, {config.width}x{config.height}, {config.num_frames} frames, one call"
    for name, (source, scale) in MODELS.items():
        architecture = KNOWN[source]["transformer"]
        channels = architecture.config["in_channels"]
        shape = LatentShape(channels, frames, config.height // scale, config.width // scale)
        model = make_random(architecture, name, subject.dtype, subject.device)
        flops = _count(architecture, shape, subject.dtype)
        once = replace(protocol, warmups=min(1, protocol.warmups), repeats=1)
        run = partial(_call, model, shape, subject.dtype, subject.device)
        with attention_order("auto", subject.device):
            timing, _ = measure(run, subject.device, once)
        yield Row(
            case=case,
            variant=name,
            timing=timing,
            flops=flops,
            note=f"{timing.seconds * CALLS:,.0f} s a clip, extrapolated to {CALLS} calls, no VAE",
        )
        del model, run


def _call(model: Any, shape: LatentShape, dtype: torch.dtype, device: torch.device) -> Tensor:
    config = model.config
    image = None
    if config["image_dim"] is not None:
        image = torch.randn(1, 257, config["image_dim"], dtype=dtype, device=device)
    text = torch.randn(1, 512, config["text_dim"], dtype=dtype, device=device)
    output: Tensor = model(
        torch.randn(1, *shape, dtype=dtype, device=device),
        torch.full((1,), 937.5, device=device),
        text,
        encoder_hidden_states_image=image,
        return_dict=False,
    )[0]
    return output


def _count(architecture: Architecture, shape: LatentShape, dtype: torch.dtype) -> float:
    costs = []
    for num_layers in (1, 2):
        small = architecture._replace(config={**architecture.config, "num_layers": num_layers})
        model = cast_weights(small.make_empty("transformer"), dtype)
        costs.append(count(partial(_call, model, shape, dtype, META)))
    return extrapolate(costs[0], costs[1], architecture.config["num_layers"] - 1).flops
