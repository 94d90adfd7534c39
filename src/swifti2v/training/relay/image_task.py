"""Task of a relay on images: make one frame, or restore its lost detail."""

from dataclasses import field
from typing import Literal

import torch
from torch import Tensor

from swifti2v.config import GenerationConfig, Stage2Config, settings
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.pipelines.stage2 import predict_window
from swifti2v.sampling import to_velocity
from swifti2v.segments import Segment
from swifti2v.training.data.crops import degrade
from swifti2v.training.engine.draws import Draw
from swifti2v.training.objectives import Model, flow_loss, hfato_loss
from swifti2v.training.relay.degradations import DegradationConfig, degrade_latents
from swifti2v.training.stages.batches import EncodePrompts, FrameSource, VideoBatch
from swifti2v.training.stages.latent_task import LatentTask
from swifti2v.training.stages.latents import encode_clips
from swifti2v.training.stages.noise_levels import NoiseLevelConfig

ONE_FRAME = Segment(index=0, context=(), target=(0,))
"""The window of an image: a video of one latent frame, all of it to be made."""


@settings
class ImageObjective:
    """Settings of the loss of a step."""

    loss: Literal["flow", "hfato"] = "flow"
    """Flow matching; or bring back detail, see ``swifti2v.training.objectives.hfato_loss``."""
    noise: NoiseLevelConfig = field(default_factory=NoiseLevelConfig)
    """Noise levels of the samples."""
    error_of: Literal["velocity", "clean"] = "velocity"
    """Quantity whose error ``flow`` measures: the velocity, or the clean latents, which weighs all
    noise levels equally."""
    degradation: DegradationConfig | None = field(default_factory=DegradationConfig)
    """Degradation of the latents for ``hfato``. None takes the latents of the image made
    ``stage1.downscale`` times smaller and larger again, from which sampling starts."""
    channel_weight_limit: float | None = None
    """Weigh a channel by its share of a pixel error, at most this; None weighs all alike."""


class ImageTask(LatentTask[FrameSource[VideoBatch]]):
    """Stage II on images, as the trainer sees it.

    A transformer with reference channels is shown the image made ``stage1.downscale`` times smaller
    and larger again beside the latents, as in sampling. Settings are those of sampling, with the
    attention to train with.
    """

    def __init__(
        self,
        transformer: SegmentTransformer3DModel,
        vae: VideoVAE,
        sources: tuple[FrameSource[VideoBatch], ...],
        objective: ImageObjective,
        settings: GenerationConfig,
        encode_prompts: EncodePrompts,
    ) -> None:
        super().__init__(vae, sources, objective, encode_prompts)
        self.model, self.vae = transformer, vae
        self.objective, self.settings = objective, settings
        config = transformer.config
        parameterization = settings.stage2.sampling.parameterization
        self.takes_reference = (
            config["in_channels"] > config["out_channels"]
            or parameterization == "reference_residual"
        )

    def loss(self, batch: VideoBatch, draw: Draw) -> Tensor:
        """``[b]`` loss of each image."""
        objective = self.objective
        latents = self.encode(batch.video)
        is_hfato = objective.loss == "hfato"
        softened = latents
        if self.takes_reference or (is_hfato and objective.degradation is None):
            softened = self._soften(batch.video)
        model = self.predictor(batch, softened)
        sigma, noise = self.draw_sigma(draw).to(latents.device), draw.noise_like(latents)
        weight = self.weigh(latents)
        if not is_hfato:
            return flow_loss(
                model,
                latents,
                softened,
                sigma,
                noise,
                error_of=objective.error_of,
                channel_weight=weight,
            )
        degraded = softened
        if objective.degradation is not None:
            degraded = _degrade(latents, objective.degradation, draw)
        return hfato_loss(model, latents, degraded, sigma, noise, channel_weight=weight)

    def predictor(self, batch: VideoBatch, reference: Tensor) -> Model:
        """The velocity that the transformer predicts, with reference and captions bound."""
        embeds = self.encode_prompts(batch.prompts)
        stage2 = self.settings.stage2

        def predict(noisy: Tensor, sigma: Tensor) -> Tensor:
            hidden = torch.cat([noisy, reference], dim=1)
            output = predict_window(self.model, ONE_FRAME, hidden, sigma, embeds, stage2)
            return to_velocity(output, noisy, reference, sigma, stage2.sampling.parameterization)

        return predict

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Latents ``[b, C, 1, h, w]`` of images ``[b, 3, 1, H, W]``."""
        return encode_clips(self.vae, video).to(self.model.device)

    def _soften(self, video: Tensor) -> Tensor:
        """Latents of images made smaller and larger again, as those of Stage I are."""
        factor = self.settings.stage1.downscale
        return self.encode(degrade(video, factor, Stage2Config(reference_start="motion")))


def _degrade(latents: Tensor, config: DegradationConfig, draw: Draw) -> Tensor:
    """Degrade every sample with its own source of noise."""
    degraded = [
        degrade_latents(one, config, torch.Generator().manual_seed(int(rng.integers(2**63 - 1))))
        for one, rng in zip(torch.split(latents, 1), draw.samples(), strict=True)
    ]
    return torch.cat(degraded)
