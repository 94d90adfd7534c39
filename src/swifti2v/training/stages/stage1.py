"""Training of Stage I: clips at low resolution from a photo and a prompt."""

from collections.abc import Callable
from dataclasses import field
from typing import Any, Literal

import torch
from torch import Tensor

from swifti2v.config import Stage1Config, settings
from swifti2v.pipelines.displacement import enlarge, move_photo
from swifti2v.pipelines.stage1 import Stage1Pipeline
from swifti2v.training.engine.draws import Draw
from swifti2v.training.objectives import displacement_loss, flow_loss, photometric_loss
from swifti2v.training.stages.batches import EncodePrompts, Stage1Batch, Stage1Source
from swifti2v.training.stages.latent_task import LatentTask, Validate
from swifti2v.training.stages.noise_levels import NoiseLevelConfig


@settings
class Stage1Objective:
    """Settings of the loss of a step."""

    noise: NoiseLevelConfig = field(default_factory=NoiseLevelConfig)
    """Noise levels of the samples."""
    error_of: Literal["velocity", "clean"] = "velocity"
    """The velocity, or the clean latents, which counts all noise levels alike."""
    channel_weight_limit: float | None = None
    """Weigh a channel by its share of a pixel error, at most this; None weighs all alike."""
    displacement_weight: float = 1.0
    """Weight of the displacement's error in pixels, or of the moved photo's error where the
    displacement is unknown, beside the error of the latents."""


class Stage1Task(LatentTask[Stage1Source[Any]]):
    """Stage I as the trainer sees it: its transformer is trained, whole or through adapters."""

    def __init__(
        self,
        pipeline: Stage1Pipeline,
        sources: tuple[Stage1Source[Any], ...],
        objective: Stage1Objective,
        stage1: Stage1Config,
        encode_prompts: EncodePrompts,
        validate: Validate | None = None,
    ) -> None:
        super().__init__(pipeline.vae, sources, objective, encode_prompts, validate)
        self.model, self.pipeline = pipeline.transformer, pipeline
        self.objective, self.stage1 = objective, stage1

    def loss(self, batch: Stage1Batch, draw: Draw) -> Tensor:
        """``[b]`` flow loss, and the displacement's error where the model generates one."""
        latents, condition, image_embeds = self.source.encode(batch)
        still = latents[:, :, :1].expand_as(latents)
        predict = self._bind(condition, self.encode_prompts(batch.prompts), image_embeds)
        displaces = self.stage1.motion == "displacement"
        photo = self._decode(latents[:, :, :1]) if displaces else None
        displacements: list[Tensor] = []

        def model(noisy: Tensor, sigma: Tensor) -> Tensor:
            output = predict(noisy, sigma)
            if photo is None:
                return output
            displacements.append(self.pipeline.read_displacement(output, batch.course))
            return self.pipeline.add_to_moved(output, displacements[0], photo, still)

        loss = flow_loss(
            model,
            latents,
            still,
            self.draw_sigma(draw).to(latents.device),
            draw.noise_like(latents),
            parameterization=self.stage1.sampling.parameterization,
            error_of=self.objective.error_of,
            channel_weight=self.weigh(latents),
        )
        if photo is None:
            return loss
        error = self._motion_error(displacements[0], batch, photo, latents)
        return loss + self.objective.displacement_weight * error

    def _bind(
        self, condition: Tensor, embeds: Tensor, image_embeds: Tensor | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The transformer with photos and prompts bound."""

        def predict(noisy: Tensor, sigma: Tensor) -> Tensor:
            run: Any = self.model
            output: Tensor = run(
                hidden_states=torch.cat([noisy, condition], dim=1),
                timestep=sigma[:, 0] * 1000,
                encoder_hidden_states=embeds,
                encoder_hidden_states_image=image_embeds,
                return_dict=False,
            )[0]
            return output.float()

        return predict

    def _motion_error(
        self, displacement: Tensor, batch: Stage1Batch, photo: Tensor, latents: Tensor
    ) -> Tensor:
        """``[b]`` error of the displacement, or of the photo moved by it where no truth is known."""
        if batch.displacement is not None:
            return displacement_loss(displacement, batch.displacement.to(latents.device))
        moved = move_photo(photo, enlarge(displacement, *photo.shape[-2:]))
        return photometric_loss(moved, self._decode(latents))

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        return self.pipeline.decode(latents)
