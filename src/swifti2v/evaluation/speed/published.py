"""The planner beside what others have measured and published."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from swifti2v.evaluation.speed.models import Subject
from swifti2v.evaluation.speed.rows import Row
from swifti2v.evaluation.speed.timing import Protocol, Timing
from swifti2v.models.loading.architectures import WAN21_I2V_14B, Architecture
from swifti2v.models.loading.components import cast_weights
from swifti2v.planning.costs import Count, extrapolate
from swifti2v.planning.counting import META, count
from swifti2v.planning.devices import DEVICES, HOPPER_FLASH, Rates

CASE = "Wan2.1-T2V-14B, one call, 832x480, 81 frames"
PUBLISHED = {"h100": 4.60, "rtx4090": 13.66}
"""Seconds, eager, with PyTorch's own choice of attention; on the RTX 4090 with weights in host memory.

Source:
    github.com/huggingface/diffusers, pull request 11605.
"""


def count_published() -> Count:
    """Cost of that call."""
    plain = {"in_channels": 16, "image_dim": None, "added_kv_proj_dim": None}
    latents = torch.empty(1, 16, 21, 60, 104, dtype=torch.bfloat16, device=META)
    text = torch.empty(1, 512, 4096, dtype=torch.bfloat16, device=META)
    costs = []
    for num_layers in (1, 2):
        config = WAN21_I2V_14B | plain | {"num_layers": num_layers}
        model = Architecture(WanTransformer3DModel, config).make_empty("Wan")
        model = cast_weights(model, torch.bfloat16)
        costs.append(count(partial(model, latents, torch.empty(1, device=META), text)))
    return extrapolate(costs[0], costs[1], WAN21_I2V_14B["num_layers"] - 1)


def published_rates(name: str) -> Rates:
    """Rates of a device with the attention of the published measurement."""
    rates = DEVICES[name].rates["bfloat16"]
    return replace(rates, attention=HOPPER_FLASH) if name == "h100" else rates


def predict(cost: Count, rates: Rates) -> float:
    """Seconds of a transformer, as a plan has them."""
    return (
        cost.linear / rates.linear
        + cost.attention / rates.attention
        + cost.other_bytes / rates.traffic
    )


def compare_published(subject: Subject, protocol: Protocol) -> Iterator[Row]:
    """Prediction for each published time; nothing is run."""
    del subject, protocol
    cost = count_published()
    for name, seconds in PUBLISHED.items():
        predicted = predict(cost, published_rates(name))
        for variant, value in (("published", seconds), ("plan", predicted)):
            timing = Timing(seconds=value, spread=0, cold_seconds=value, peak_bytes=None)
            error = f"{predicted / seconds - 1:+.1%}" if variant == "plan" else ""
            yield Row(
                case=f"{CASE}, {name}",
                variant=variant,
                timing=timing,
                flops=cost.flops,
                note=error,
            )
