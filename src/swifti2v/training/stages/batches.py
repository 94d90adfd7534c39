"""What Stage I and Stage II are trained on: clips and windows, as frames or as latents."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from swifti2v.pipelines.course import Course
from swifti2v.segments import Segment
from swifti2v.training.engine.draws import Draw


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage1Batch:
    """Clips at Stage I's size."""

    ids: tuple[str, ...]
    """Of the b samples."""
    num_replaced: int
    """Samples that could not be read and were replaced."""
    num_latent_frames: int
    """F of the whole clips."""
    latent_frames: tuple[int, ...]
    """Which of them ``video`` covers: all, or the photo's and a few more."""
    video: Tensor
    """``[b, 3, T, h, w]`` in [-1, 1]; frame 0 is the photo."""
    prompts: tuple[str, ...]
    """Of the b samples."""
    course: Course
    """Of the T frames of each clip."""
    displacement: Tensor | None = None
    """``[b, 2, T, h, w]``, where each point was in the photo, in pixels; None where nobody knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage1Latents:
    """Clips that were encoded before, and their photos."""

    ids: tuple[str, ...]
    """Of the b samples."""
    num_replaced: int
    """Samples that could not be read and were replaced."""
    latents: Tensor
    """``[b, C, F, h, w]``."""
    condition: Tensor
    """``[b, 4 + C, F, h, w]``: mask and image latents."""
    image_embeds: Tensor | None
    """``[b, L, D]`` of CLIP; None for models that do not take them."""
    prompts: tuple[str, ...]
    """Of the b samples."""


class Stage1Source(Protocol):
    """Loads clips."""

    def load(self, draw: Draw) -> Stage1Batch | Stage1Latents:
        """The samples of a micro-batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage2Batch:
    """Windows of clips, all of the same segment."""

    ids: tuple[str, ...]
    """Of the b samples."""
    num_replaced: int
    """Samples that could not be read and were replaced."""
    segment: Segment
    """Within the whole clip."""
    latent_frames: tuple[int, ...]
    """Which of the clip's latent frames ``video`` covers: the window, or all up to its end."""
    video: Tensor
    """``[b, 3, T, H, W]`` in [-1, 1]."""
    reference: Tensor
    """``[b, 3, T, H, W]``, what Stage II is given instead."""
    prompts: tuple[str, ...]
    """Of the b samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage2Latents:
    """Windows of clips that were encoded before, all of the same segment."""

    ids: tuple[str, ...]
    """Of the b samples."""
    num_replaced: int
    """Samples that could not be read and were replaced."""
    segment: Segment
    """Within the whole clip."""
    latents: Tensor
    """``[b, C, N, h, w]`` of the window."""
    reference: Tensor
    """``[b, C, N, h, w]``, what Stage II is given instead."""
    prompts: tuple[str, ...]
    """Of the b samples."""


class Stage2Source(Protocol):
    """Loads windows."""

    def num_frames(self, draw: Draw, rng: np.random.Generator) -> int:
        """Length of all clips of a step; ``rng`` is the same on all ranks."""

    def load(
        self, draw: Draw, segment: Segment, num_latent_frames: int
    ) -> Stage2Batch | Stage2Latents:
        """One window of each sample of a micro-batch; F is that of the whole clip."""
