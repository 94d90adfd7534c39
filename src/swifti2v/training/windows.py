"""Draw the window of a training step from those of sampling."""

from dataclasses import replace

import numpy as np

from swifti2v.config import Stage2Config, settings
from swifti2v.errors import ConfigError
from swifti2v.segments import Segment


@settings
class WindowConfig:
    """Windows of Stage II's training; several sizes are mixed evenly."""

    segment_sizes: tuple[int, ...] = (3,)
    """M, latent frames a segment generates. One as long as the clip trains on whole clips."""
    context_sizes: tuple[int, ...] = (1,)
    """N, finished latent frames it sees besides the anchor."""

    def __post_init__(self) -> None:
        if not self.segment_sizes or min(self.segment_sizes) < 1:
            raise ConfigError(
                f"windows.segment_sizes is {self.segment_sizes}; give sizes of at least 1"
            )
        if not self.context_sizes or min(self.context_sizes) < 0:
            raise ConfigError(
                f"windows.context_sizes is {self.context_sizes}; give sizes of at least 0"
            )


def draw_window(
    config: WindowConfig, stage2: Stage2Config, num_latent_frames: int, rng: np.random.Generator
) -> Segment:
    """Draw one segment of the plan that sampling would follow.

    Raises:
        ConfigError: The clip has no segment.
    """
    segment_size = config.segment_sizes[int(rng.integers(len(config.segment_sizes)))]
    context_size = config.context_sizes[int(rng.integers(len(config.context_sizes)))]
    sampling = replace(stage2, segment_size=segment_size, context_size=context_size)
    segments = sampling.plan(num_latent_frames)
    if not segments:
        raise ConfigError(
            f"a clip of {num_latent_frames} latent frame has no segment to train on; take longer "
            "clips"
        )
    return segments[int(rng.integers(len(segments)))]


def localize(segment: Segment) -> Segment:
    """Count the segment from 0, for latents that hold its window alone."""
    num_given = len(segment.window) - len(segment.target)
    return replace(
        segment,
        context=tuple(range(num_given - len(segment.context), num_given)),
        target=tuple(range(num_given, len(segment.window))),
    )
