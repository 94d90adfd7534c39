"""Training of Stage II: segments of clips from their small versions, windows as in sampling."""

from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from swifti2v.config import Stage2Config, settings
from swifti2v.errors import ConfigError
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.pipelines.stage2 import predict_window, prepare_window_reference
from swifti2v.segments import Segment
from swifti2v.training.channel_weights import weigh_channels
from swifti2v.training.engine.draws import Draw
from swifti2v.training.objectives import ErrorMeasure, segment_flow_loss, window_flow_loss
from swifti2v.training.stages.batches import Stage2Batch, Stage2Latents, Stage2Source
from swifti2v.training.stages.latents import encode_clips
from swifti2v.training.stages.noise_levels import NoiseLevelConfig, draw_step_sigmas
from swifti2v.training.windows import WindowConfig, draw_window, localize

EncodePrompts = Callable[[tuple[str, ...]], Tensor]
"""``b`` prompts to embeddings ``[b, L, D]``."""


@settings
class Stage2Objective:
    """What a step asks of the transformer."""

    windows: WindowConfig = field(default_factory=WindowConfig)
    """Which segments."""
    noise: NoiseLevelConfig = field(default_factory=NoiseLevelConfig)
    """At which noise levels."""
    loss_on: Literal["target", "window"] = "target"
    """The target frames, or all frames of a window."""
    channel_weight_limit: float | None = None
    """Weigh a channel by its share of a pixel error, at most this; None weighs all alike."""
    error: Literal["squared", "root"] = "squared"
    """Mean square of all errors, or mean over the cells of the root of each cell's mean square:
    places that cannot be told then do not outweigh all others."""


class Stage2Task:
    """Stage II as the trainer sees it.

    Args:
        transformer: To train.
        vae: Frozen.
        sources: Of each phase.
        objective: Settings of the loss.
        stage2: The open points, as sampling will have them.
        encode_prompts: Frozen text encoder.
        validate: Measures the model; None measures nothing.
    """

    def __init__(
        self,
        transformer: SegmentTransformer3DModel,
        vae: VideoVAE,
        sources: tuple[Stage2Source, ...],
        objective: Stage2Objective,
        stage2: Stage2Config,
        encode_prompts: EncodePrompts,
        validate: Callable[[Path], Mapping[str, float]] | None = None,
    ) -> None:
        self.model, self.vae = transformer, vae
        self.sources = sources
        self.objective, self.stage2 = objective, stage2
        self.encode_prompts, self._validate = encode_prompts, validate
        self.phase = 0
        limit = objective.channel_weight_limit
        self.channel_weight = None if limit is None else weigh_channels(vae, limit)

    def enter_phase(self, phase: int) -> None:
        """Take the source of a phase."""
        self.phase = phase

    def load_batch(self, draw: Draw) -> Stage2Batch | Stage2Latents:
        """Windows of one segment, drawn for the whole step."""
        segment, num_latent_frames = self.draw_segment(draw)
        return self.sources[self.phase].load(draw, segment, num_latent_frames)

    def draw_segment(self, draw: Draw) -> tuple[Segment, int]:
        """The segment of a step, and the latent frames of its clips."""
        rng = draw.shared()
        num_frames = self.sources[self.phase].num_frames(draw, rng)
        num_latent_frames = (num_frames - 1) // int(self.vae.config["scale_factor_temporal"]) + 1
        segment = draw_window(
            self.objective.windows,
            num_latent_frames,
            rng,
            generates_anchor=self.stage2.anchor == "generated",
            shows_anchor=self.stage2.shows_anchor,
        )
        return segment, num_latent_frames

    def loss(self, batch: Stage2Batch | Stage2Latents, draw: Draw) -> Tensor:
        """``[b]`` flow loss on the target frames."""
        latents, reference = self.encode(batch)
        given = len(batch.segment.window) - len(batch.segment.target)
        reference = prepare_window_reference(latents[:, :, :given], reference, self.stage2)
        weight = self.channel_weight
        loss = segment_flow_loss if self.objective.loss_on == "target" else window_flow_loss
        return loss(
            self.predictor(batch),
            latents,
            reference,
            localize(batch.segment),
            self.draw_sigma(draw).to(latents.device),
            draw.noise_like(latents),
            parameterization=self.stage2.sampling.parameterization,
            measure=ErrorMeasure(
                None if weight is None else weight.to(latents.device), self.objective.error
            ),
        )

    def validate(self, directory: Path) -> Mapping[str, float]:
        """See ``Task``."""
        return {} if self._validate is None else self._validate(directory)

    def predictor(self, batch: Stage2Batch | Stage2Latents) -> Callable[[Tensor, Tensor], Tensor]:
        """The transformer with segment and prompts of a batch bound."""
        embeds, segment = self.encode_prompts(batch.prompts), batch.segment
        # What the loss never reads is not computed.
        num_skipped = len(segment.given) if self.objective.loss_on == "target" else 0

        def predict(hidden_states: Tensor, sigma: Tensor) -> Tensor:
            return predict_window(
                self.model, segment, hidden_states, sigma, embeds, self.stage2, num_skipped
            )

        return predict

    def draw_sigma(self, draw: Draw) -> Tensor:
        """``[b]`` noise levels of a micro-batch."""
        return draw_step_sigmas(self.objective.noise, draw)

    @torch.no_grad()
    def encode(self, batch: Stage2Batch | Stage2Latents) -> tuple[Tensor, Tensor]:
        """Latents of the window and of its reference, ``[b, C, N, h, w]`` each."""
        device = self.model.device
        if isinstance(batch, Stage2Latents):
            return batch.latents.to(device), batch.reference.to(device)
        return (
            encode_frames_of_window(self.vae, batch.video.to(device), batch),
            encode_frames_of_window(self.vae, batch.reference.to(device), batch),
        )


def encode_frames_of_window(vae: VideoVAE, video: Tensor, batch: Stage2Batch) -> Tensor:
    """Scaled latents of a batch's window.

    Args:
        vae: A causal one needs all frames before the window, ``BlockCodec`` only the window's.
        video: ``[b, 3, T, H, W]`` of ``batch.latent_frames``.
        batch: Says what of it is the window.

    Returns:
        ``[b, C, N, h, w]`` float32.

    Raises:
        ConfigError: A causal VAE was given the window alone.
    """
    covers_all = batch.latent_frames == tuple(range(batch.segment.window[-1] + 1))
    if not (covers_all or isinstance(vae, BlockCodec)):
        raise ConfigError(
            f"a causal VAE needs the frames before a window, not {batch.latent_frames} alone"
        )
    places = [batch.latent_frames.index(frame) for frame in batch.segment.window]
    return encode_clips(vae, video)[:, :, places]
