"""Whole clips: beside diffusers' transformer, beside the plan, and against their length."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from swifti2v.config import SpeedConfig
from swifti2v.evaluation.speed.models import Subject, TokenTimestepTransformer, in_both_types
from swifti2v.evaluation.speed.rows import Row
from swifti2v.evaluation.speed.timing import Protocol, Timing, measure
from swifti2v.media import Frames
from swifti2v.models.loading.components import LOADERS, STAGES, Components
from swifti2v.models.loading.sources import find_model
from swifti2v.models.runtime.placement import loading_device, place
from swifti2v.models.runtime.roles import Placement
from swifti2v.models.runtime.speed import prepare_speed
from swifti2v.pipelines.progress import Stopwatch
from swifti2v.pipelines.stage1 import Conditions
from swifti2v.pipelines.transition import MotionReference
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.planning.costs import ClipWork
from swifti2v.planning.devices import PRECISIONS, find_device
from swifti2v.planning.measurement import free_bytes
from swifti2v.planning.models import Models, speed_of
from swifti2v.planning.plans import Option, Wish, make_plan
from swifti2v.planning.work import ClipCounter

WITHOUT_WEIGHTS = ("tokenizer", "image_processor")
FRAMES = (33, 81, 161, 321)
"""Lengths of which the cost is compared."""
PROMPT = "zoom in"


def choose_option(subject: Subject) -> tuple[Option, ClipWork]:
    """Placement and VAE tile that a plan takes for the memory that is free, and the clip's work.

    Raises:
        ConfigError: Nothing fits.
    """
    config = subject.config
    precision = next(name for name in PRECISIONS if name == subject.kind)
    counter = ClipCounter(Models(subject.name, subject.dtype, speed_of(config)), config)
    machine = find_device("cpu" if subject.device.type == "cpu" else "auto", precision)
    tile = config.stage2.vae_tile
    wish = Wish(is_tile_given=tile is not None, vae_tile=tile, keeps=True)
    option = make_plan(counter, machine, precision, free_bytes(subject.device), wish).require_fit()
    offloads = option.placement == "offloaded"
    return option, counter.count(option.vae_tile, offloads_history=offloads)


def make_pipeline(subject: Subject, option: Option, *, is_theirs: bool = False) -> SwiftI2VPipeline:
    """All components, placed as a plan says, or Stage II as diffusers' class without levers."""
    index, _ = find_model(subject.name)
    plain = SpeedConfig(attention="flash", skips_given=False)
    config = subject.config
    speed = {s: plain if is_theirs else getattr(config, s).speed for s in STAGES}
    stage2 = replace(config.stage2, speed=speed["stage2"], vae_tile=option.vae_tile)
    config = replace(config, stage1=replace(config.stage1, speed=speed["stage1"]), stage2=stage2)
    placement: Placement = option.placement  # type: ignore[assignment] # "8-bit" is never chosen
    parts: dict[str, Any] = {"tokenizer": None}
    for role in (role for role in LOADERS if role in index.components):
        if role in WITHOUT_WEIGHTS and subject.is_random:
            continue
        part = subject.load(role, home=loading_device(subject.device, placement))
        if role == "stage2_transformer" and is_theirs:
            part = TokenTimestepTransformer.from_segment_transformer(part)
        if role.endswith("_transformer"):
            prepare_speed(part, speed["stage1" if "1" in role else "stage2"], subject.device)
        parts[role] = part
    components = Components(
        **parts, max_text_length=index.max_text_length, device=subject.device, speed=speed
    )
    place(components, subject.device, placement)
    return SwiftI2VPipeline(components, config)


class Clip:
    """One clip of a pipeline: photo and embeddings of the prompt in, uint8 frames out."""

    def __init__(self, pipe: SwiftI2VPipeline, num_frames: int | None = None) -> None:
        self.pipe, num_frames = pipe, num_frames or pipe.config.num_frames
        self.config = config = replace(pipe.config, num_frames=num_frames)
        size = (config.height, config.width, 3)
        self.image = Image.fromarray(np.random.default_rng(0).integers(0, 256, size, np.uint8))
        self.stopwatch = Stopwatch()
        self.seconds_to_first = 0.0
        parts = pipe.components
        self._conditions = _random_conditions(parts) if parts.tokenizer is None else None

    def run(self) -> Frames:
        """Make the clip; a segment is let go of as soon as it is there, the last is returned."""
        self.stopwatch = watch = Stopwatch()
        pipe, config = self.pipe, self.config
        conditions = self._conditions or pipe.encode(self.image, PROMPT, config, watch)
        motion = pipe.generate_motion_reference(self.image, conditions, 0, config, stopwatch=watch)
        return self._synthesize(motion, conditions)

    def run_stage2(self) -> Frames:
        """Stage II alone, from a random motion reference."""
        self.stopwatch = watch = Stopwatch()
        pipe, config = self.pipe, self.config
        conditions = self._conditions or pipe.encode(self.image, PROMPT, config, watch)
        low = config.stage1.downscale
        size = (config.num_frames, config.height // low, config.width // low, 3)
        motion = np.random.default_rng(1).integers(0, 256, size, np.uint8)
        return self._synthesize(MotionReference(motion), conditions)

    def _synthesize(self, motion: MotionReference, conditions: Conditions) -> Frames:
        segments = self.pipe.synthesize(
            motion, self.image, conditions, 0, self.config, stopwatch=self.stopwatch
        )
        for segment in segments:
            frames = segment.frames
            if segment.index == 0:
                self.seconds_to_first = self.stopwatch.total()
        return frames


def _random_conditions(components: Components) -> Conditions:
    """Embeddings where there is no tokenizer: random weights have none."""
    dtype, device = components.stage2_transformer.dtype, components.device
    size = (1, components.max_text_length, components.text_encoder.config.d_model)
    encoder, image = components.image_encoder, None
    if encoder is not None:
        vision: Any = encoder.config
        tokens = (vision.image_size // vision.patch_size) ** 2 + 1
        image = torch.randn(1, tokens, vision.hidden_size, dtype=dtype, device=device)
    return Conditions(
        prompt_embeds=torch.randn(size, dtype=dtype, device=device),
        negative_prompt_embeds=None,
        image_embeds=image,
    )


def time_clips(subject: Subject, protocol: Protocol, *, against: bool) -> Iterator[Row]:
    """The whole clip: seconds by stage, of the plan as well, and until the first segment.

    On a CPU it is measured in bfloat16, too; ``against`` diffusers' transformer in Stage II, in
    both types.
    """
    config = subject.config
    case = f"clip, {config.width}x{config.height}, {config.num_frames} frames"
    expected: Frames | None = None
    for each in in_both_types(subject) if against else []:
        option, work = choose_option(each)
        clip = Clip(make_pipeline(each, option, is_theirs=True))
        timing, frames = measure(clip.run, each.device, protocol)
        expected = frames if expected is None else expected
        variant = f"Stage II by diffusers, {each.kind}"
        yield _clip_row(case, variant, clip, timing, work.flops["total"])
        del clip
    for each in in_both_types(subject):
        option, work = choose_option(each)
        clip = Clip(make_pipeline(each, option))
        timing, frames = measure(clip.run, each.device, protocol)
        expected = frames if expected is None else expected
        distance = np.abs(frames.astype(int) - expected).mean()
        with model_seconds(clip.pipe.components.stage2_transformer) as spent:
            clip.run()
        overhead = 1 - sum(spent) / clip.stopwatch.seconds["stage2"]
        note = (
            f"{option}; {overhead:.2%} of Stage II's time outside the model; differs by "
            f"{distance:.2f} of 255"
        )
        yield _clip_row(case, f"swifti2v, {each.kind}", clip, timing, work.flops["total"], note)
        yield _plan_row(case, each, option, timing)
        del clip


def _plan_row(case: str, subject: Subject, option: Option, measured: Timing) -> Row:
    seconds = option.seconds["total"]
    peak = round(option.peak_device_bytes["peak"])
    return Row(
        case=case,
        variant=f"plan, {subject.kind}",
        timing=Timing(seconds=seconds, spread=0, cold_seconds=seconds, peak_bytes=peak),
        note=f"predicted, {seconds / measured.seconds - 1:+.0%} of the measured",
        stages=option.seconds,
    )


def _clip_row(
    case: str, variant: str, clip: Clip, timing: Timing, flops: float, note: str = ""
) -> Row:
    stages = {**clip.stopwatch.seconds, "first_segment": clip.seconds_to_first}
    listed = ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items())
    return Row(
        case=case,
        variant=variant,
        timing=timing,
        flops=flops,
        note="; ".join(part for part in (listed, note) if part),
        stages=stages,
    )


def time_lengths(subject: Subject, protocol: Protocol) -> Iterator[Row]:
    """Stage II with the VAE for clips of several lengths: seconds a frame, and peak memory."""
    pipe = make_pipeline(subject, choose_option(subject)[0])
    for num_frames in FRAMES:
        clip = Clip(pipe, num_frames)
        timing, _ = measure(clip.run_stage2, subject.device, protocol)
        yield Row(
            case=f"Stage II, {clip.config.width}x{clip.config.height}, {num_frames} frames",
            variant="swifti2v",
            timing=timing,
            note=f"{timing.seconds / num_frames:.4f} s a frame",
        )


@contextmanager
def model_seconds(model: Any) -> Iterator[list[float]]:
    """Seconds of each call of a model within the block."""
    started: list[float] = []
    spent: list[float] = []

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    hooks = [
        model.register_forward_pre_hook(lambda *_: started.append(now())),
        model.register_forward_hook(lambda *_: spent.append(now() - started[-1])),
    ]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()
