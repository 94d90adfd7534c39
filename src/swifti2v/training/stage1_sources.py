"""Where Stage I's training clips come from: camera motions over still pictures, or a manifest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from swifti2v.media import Frames
from swifti2v.training.camera_motion import CAMERA_MOTIONS, draw_prompt, draw_view, render_motion
from swifti2v.training.data import pixel_frames
from swifti2v.training.draws import Draw

NUM_MOTIONS = len(CAMERA_MOTIONS)


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


class CameraMotionSource:
    """Every camera motion over one view of a picture, then over the next view.

    Seven samples in a row share view, frames and picture, so that only the prompt tells them
    apart. Frames are a few of the clip's; a chart in the condition tells the model their time.

    Args:
        stills: ``[H, W, 3]`` uint8 pictures.
        size: Height and width of the clips in pixels.
        num_latent_frames: F of a whole clip.
        num_drawn: Latent frames besides the photo's, with the probability of each number.
    """

    def __init__(
        self,
        stills: Sequence[Frames],
        size: tuple[int, int],
        num_latent_frames: int,
        num_drawn: dict[int, float],
    ) -> None:
        self.stills, self.size = stills, size
        self.num_latent_frames, self.num_drawn = num_latent_frames, num_drawn

    def load(self, draw: Draw) -> Stage1Batch:
        """See ``Stage1Source``."""
        frames = (0, *self._draw_frames(draw.shared()))
        clips = [self._render(draw, index, frames) for index in draw.indices]
        prompts = [
            draw_prompt(CAMERA_MOTIONS[index % NUM_MOTIONS], rng)
            for index, rng in zip(draw.indices, draw.samples(), strict=True)
        ]
        return Stage1Batch(
            ids=tuple(
                f"{CAMERA_MOTIONS[i % NUM_MOTIONS]} over {name}"
                for i, (name, _) in zip(draw.indices, clips, strict=True)
            ),
            num_replaced=0,
            num_latent_frames=self.num_latent_frames,
            latent_frames=frames,
            video=torch.stack([video for _, video in clips]),
            prompts=tuple(prompts),
        )

    def _draw_frames(self, rng: np.random.Generator) -> list[int]:
        numbers, shares = list(self.num_drawn), np.array(list(self.num_drawn.values()))
        number = numbers[int(rng.choice(len(numbers), p=shares / shares.sum()))]
        drawn = 1 + rng.permutation(self.num_latent_frames - 1)[:number]
        return sorted(int(frame) for frame in drawn)

    def _render(self, draw: Draw, index: int, frames: Sequence[int]) -> tuple[str, Tensor]:
        rng = draw.group(index // NUM_MOTIONS)
        number = int(rng.integers(len(self.stills)))
        still = torch.tensor(self.stills[number]).permute(2, 0, 1).float() / 127.5 - 1
        if rng.random() < 0.5:
            still = still.flip(-1)
        num_frames = pixel_frames(self.num_latent_frames - 1)[-1] + 1
        times = [pixel / (num_frames - 1) for frame in frames for pixel in pixel_frames(frame)]
        motion = CAMERA_MOTIONS[index % NUM_MOTIONS]
        return f"picture {number}", render_motion(still, motion, times, draw_view(rng), self.size)
