"""Training of Stage II: segments of clips from their small versions, windows as in sampling."""

from collections.abc import Callable
from dataclasses import field
from typing import Any, Literal

from torch import Tensor

from swifti2v.config import Stage2Config, settings
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.pipelines.stage2 import predict_window, prepare_window_reference
from swifti2v.training.engine.draws import Draw
from swifti2v.training.objectives import ErrorMeasure, segment_flow_loss
from swifti2v.training.stages.batches import EncodePrompts, Stage2Batch, Stage2Source
from swifti2v.training.stages.latent_task import LatentTask, Validate
from swifti2v.training.stages.noise_levels import NoiseLevelConfig
from swifti2v.training.windows import WindowConfig, localize


@settings
class Stage2Objective:
    """Settings of the loss of a step."""

    windows: WindowConfig = field(default_factory=WindowConfig)
    """Segments of the windows."""
    noise: NoiseLevelConfig = field(default_factory=NoiseLevelConfig)
    """Noise levels of the samples."""
    loss_on: Literal["target", "window"] = "target"
    """The target frames, or all frames of a window."""
    channel_weight_limit: float | None = None
    """Weigh a channel by its share of a pixel error, at most this; None weighs all alike."""
    error: Literal["squared", "root"] = "squared"
    """Mean square of all errors, or mean over the cells of the root of each cell's mean square:
    places that cannot be told then do not outweigh all others."""


class Stage2Task(LatentTask[Stage2Source[Any]]):
    """Stage II as the trainer sees it."""

    def __init__(
        self,
        transformer: SegmentTransformer3DModel,
        vae: VideoVAE,
        sources: tuple[Stage2Source[Any], ...],
        objective: Stage2Objective,
        stage2: Stage2Config,
        encode_prompts: EncodePrompts,
        validate: Validate | None = None,
    ) -> None:
        super().__init__(vae, sources, objective, encode_prompts, validate)
        self.model, self.objective, self.stage2 = transformer, objective, stage2

    def loss(self, batch: Stage2Batch, draw: Draw) -> Tensor:
        """``[b]`` flow loss on the target frames."""
        latents, reference = self.source.encode(batch)
        given = len(batch.segment.window) - len(batch.segment.target)
        reference = prepare_window_reference(latents[:, :, :given], reference, self.stage2)
        return segment_flow_loss(
            self.predictor(batch),
            latents,
            reference,
            localize(batch.segment),
            self.draw_sigma(draw).to(latents.device),
            draw.noise_like(latents),
            parameterization=self.stage2.sampling.parameterization,
            measure=ErrorMeasure(self.weigh(latents), self.objective.error, self.objective.loss_on),
        )

    def predictor(self, batch: Stage2Batch) -> Callable[[Tensor, Tensor], Tensor]:
        """The transformer with segment and prompts of a batch bound."""
        embeds, segment = self.encode_prompts(batch.prompts), batch.segment
        # What the loss never reads is not computed.
        num_skipped = len(segment.given) if self.objective.loss_on == "target" else 0

        def predict(hidden_states: Tensor, sigma: Tensor) -> Tensor:
            return predict_window(
                self.model, segment, hidden_states, sigma, embeds, self.stage2, num_skipped
            )

        return predict
