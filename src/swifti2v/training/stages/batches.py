"""Batches of Stage I and Stage II: clips and windows, as frames or as latents."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from swifti2v.pipelines.course import Course
from swifti2v.segments import Segment
from swifti2v.training.engine.draws import Draw

EncodePrompts = Callable[[tuple[str, ...]], Tensor]
"""``b`` prompts to embeddings ``[b, L, D]``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptedBatch:
    """The b samples of a micro-batch."""

    ids: tuple[str, ...]
    """Names of the samples, for messages."""
    num_replaced: int
    """Samples that could not be read and were replaced."""
    prompts: tuple[str, ...]
    """Prompts of the samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoBatch(PromptedBatch):
    """Clips or images, or crops of them."""

    video: Tensor
    """``[b, 3, T, H, W]`` in [-1, 1]; T is 1 of images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage1Batch(PromptedBatch):
    """Clips at Stage I's size, each with its photo."""

    course: Course
    """Clock and sway of the T frames of each clip."""
    displacement: Tensor | None = None
    """``[b, 2, T, h, w]``, places of each point in the photo, in pixels; None if unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage1Frames(Stage1Batch):
    """Clips as pixels."""

    video: Tensor
    """``[b, 3, T, h, w]`` in [-1, 1]; frame 0 is the photo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage1Latents(Stage1Batch):
    """Clips that were encoded before."""

    encoded: tuple[Tensor, Tensor, Tensor | None]
    """See ``Stage1Source.encode``; on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage2Batch(PromptedBatch):
    """Windows of clips, all of the same segment."""

    segment: Segment
    """Segment within the whole clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage2Frames(Stage2Batch):
    """Windows as pixels."""

    latent_frames: tuple[int, ...]
    """Latent frames of the clip that ``video`` covers: the window, or all up to its end."""
    video: Tensor
    """``[b, 3, T, H, W]`` in [-1, 1]."""
    reference: Tensor
    """``[b, 3, T, H, W]``, what Stage II is given instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage2Pixels(Stage2Batch):
    """Windows as the files have them, in 8 bits: a quarter of the memory, until they are on the device."""

    latent_frames: tuple[int, ...]
    """Latent frames of the clip that ``video`` covers, see ``Stage2Frames``."""
    video: Tensor
    """``[b, T, H, W, 3]`` uint8."""
    small: Tensor | None
    """``[b, T, h, w, 3]`` uint8 that Stage I made of it; None where the small version is computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage2Latents(Stage2Batch):
    """Windows that were encoded before."""

    encoded: tuple[Tensor, Tensor]
    """See ``Stage2Source.encode``; on the CPU."""


BatchT = TypeVar("BatchT", bound=PromptedBatch)
BatchT_co = TypeVar("BatchT_co", bound=PromptedBatch, covariant=True)


class FrameSource(Protocol[BatchT_co]):
    """Loads frames."""

    def load(self, draw: Draw) -> BatchT_co:
        """The samples of a micro-batch."""


class Stage1Source(Protocol[BatchT]):
    """Loads clips, and hands over their latents."""

    def load(self, draw: Draw) -> BatchT:
        """The samples of a micro-batch; runs in a worker process where there are some."""

    def encode(self, batch: BatchT) -> tuple[Tensor, Tensor, Tensor | None]:
        """Latents, condition and image embeddings of a batch, on the model's device.

        Returns:
            Latents ``[b, C, F, h, w]``; mask and image latents ``[b, 4 + C, F, h, w]``; and
            ``[b, L, D]`` of CLIP, None for models that do not take them.
        """


class Stage2Source(Protocol[BatchT]):
    """Loads windows, and hands over their latents."""

    def load(self, draw: Draw) -> BatchT:
        """One window of each sample of a micro-batch; the segment is the same on all ranks."""

    def encode(self, batch: BatchT) -> tuple[Tensor, Tensor]:
        """Latents of the windows and of their reference, ``[b, C, N, h, w]`` each."""
