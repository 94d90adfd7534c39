"""What the nano model's Stage I is trained on: all camera motions over one view of a picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import UMT5EncoderModel

from swifti2v.models.codec import BlockCodec
from swifti2v.models.text import encode_prompt
from swifti2v.pipelines.stage1 import draw_chart
from swifti2v.sampling import plan_sigmas
from swifti2v.training.camera_motion import CAMERA_MOTIONS, draw_prompt, draw_view, render_motion
from swifti2v.training.data import Frames, pixel_frames
from swifti2v.training.motion_phases import make_phases
from swifti2v.training.nano_codec import encode_window
from swifti2v.training.nano_config import NANO_SCALE, NanoConfig
from swifti2v.training.optimization import Randomness
from swifti2v.training.text_encoder import make_tokenizer


@dataclass(frozen=True, slots=True)
class Stage1Batch:
    """One clip for each of ``CAMERA_MOTIONS``, in that order, from the same view."""

    frames: tuple[int, ...]
    """Latent frames after the photo's, in order."""
    latents: Tensor
    """``[7, C, 1 + len(frames), h, w]``."""
    condition: Tensor
    """``[7, 4 + C, 1 + len(frames), h, w]``."""
    prompt_embeds: Tensor
    """``[7, L, text_dim]``."""
    sigma: Tensor
    """``[7]`` noise levels."""
    noise: Tensor
    """Standard normal of the shape of ``latents``."""

    @property
    def noisy_latents(self) -> Tensor:
        """``latents`` at their noise levels."""
        level = self.sigma[:, None, None, None, None]
        return (1 - level) * self.latents + level * self.noise


class Stage1Batches:
    """Draws batches.

    Args:
        codec: With statistics.
        text_encoder: Frozen; its device is where batches are.
        stills: ``[H, W, 3]`` uint8 pictures.
        config: Settings.
        randomness: Source of all draws.
    """

    def __init__(
        self,
        codec: BlockCodec,
        text_encoder: UMT5EncoderModel,
        stills: Sequence[Frames],
        config: NanoConfig,
        randomness: Randomness,
    ) -> None:
        self.codec, self.text_encoder, self.stills = codec, text_encoder, stills
        self.config, self.randomness = config, randomness
        self.tokenizer = make_tokenizer()
        self.device = text_encoder.device
        self.size = (config.height // config.downscale, config.width // config.downscale)
        self.sigmas = torch.tensor(plan_sigmas(config.num_inference_steps)[:-1], device=self.device)
        self.chart = self._encode_chart()

    def draw(self, frames: tuple[int, ...]) -> Stage1Batch:
        """One view of one picture, moved over in all ways, with a prompt for each.

        Args:
            frames: Latent frames to render besides the photo's.
        """
        rng = self.randomness.numpy
        still, view = self._draw_still(), draw_view(rng)
        pixels = [pixel for frame in (0, *frames) for pixel in pixel_frames(frame)]
        times = [pixel / (self.config.num_frames - 1) for pixel in pixels]
        videos = [render_motion(still, motion, times, view, self.size) for motion in CAMERA_MOTIONS]
        latents = encode_window(self.codec, torch.stack(videos))
        prompt_embeds = encode_prompt(
            self.text_encoder,
            self.tokenizer,
            [draw_prompt(motion, rng) for motion in CAMERA_MOTIONS],
            self.config.max_text_length,
            truncate=True,
        )
        return Stage1Batch(
            frames=frames,
            latents=latents,
            condition=self.prepare_condition(latents[:, :, :1], frames),
            prompt_embeds=prompt_embeds,
            sigma=self.randomness.choose(self.sigmas, len(latents)),
            noise=self.randomness.normal_like(latents),
        )

    def all_frames(self) -> tuple[int, ...]:
        """Every latent frame after the photo's."""
        return tuple(range(1, self.config.num_latent_frames))

    def draw_frames(self) -> tuple[int, ...]:
        """A few latent frames after the photo's, in order; the chart tells their time."""
        drawn = self.randomness.numpy.permutation(self.all_frames())
        return tuple(sorted(drawn[: self.config.stage1.num_drawn_frames].tolist()))

    def phases(self, frames: Sequence[int]) -> Tensor:
        """Phases of every motion at the photo and ``frames``: ``[7, L, 12]``."""
        held = [pixel_frames(frame) for frame in (0, *frames)]
        times = [sum(pixels) / len(pixels) / (self.config.num_frames - 1) for pixels in held]
        grid = (self.size[0] // NANO_SCALE.space, self.size[1] // NANO_SCALE.space)
        phases = [make_phases(motion, times, grid) for motion in CAMERA_MOTIONS]
        return torch.stack(phases).to(self.device)

    def prepare_condition(self, photo: Tensor, frames: Sequence[int]) -> Tensor:
        """Mask, photo and chart, as ``Stage1Pipeline.prepare_condition`` lays out a whole clip.

        Args:
            photo: ``[B, C, 1, h, w]`` latents.
            frames: Latent frames after the photo.

        Returns:
            ``[B, 4 + C, 1 + len(frames), h, w]``.
        """
        chart = self.chart[:, :, [frame - 1 for frame in frames]]
        condition = torch.cat([photo, chart.expand(len(photo), -1, -1, -1, -1)], dim=2)
        mask = torch.zeros_like(condition[:, :4])
        mask[:, :, 0] = 1
        return torch.cat([mask, condition], dim=1)

    def _draw_still(self) -> Tensor:
        rng = self.randomness.numpy
        still = torch.tensor(self.stills[int(rng.integers(len(self.stills)))], device=self.device)
        picture = still.permute(2, 0, 1).float() / 127.5 - 1
        return picture.flip(-1) if rng.random() < 0.5 else picture

    def _encode_chart(self) -> Tensor:
        """Latents ``[1, C, F - 1, h, w]`` of what follows the photo."""
        blank = torch.zeros(1, 3, 1, *self.size, device=self.device)
        last = self.config.num_latent_frames - 1
        charts = [draw_chart(blank, frame / last) for frame in range(1, last + 1)]
        video = torch.cat([blank, *(c.expand(-1, -1, 4, -1, -1) for c in charts)], dim=2)
        return encode_window(self.codec, video)[:, :, 1:]
