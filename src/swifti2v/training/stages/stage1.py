"""Training of Stage I: clips at low resolution from a photo and a prompt."""

from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from swifti2v.config import Stage1Config, settings
from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.pipelines.course import Course, even_course
from swifti2v.pipelines.displacement import enlarge, move_photo
from swifti2v.pipelines.stage1 import Stage1Pipeline
from swifti2v.training.channel_weights import weigh_channels
from swifti2v.training.engine.draws import Draw
from swifti2v.training.objectives import displacement_loss, flow_loss, photometric_loss
from swifti2v.training.stages.batches import Stage1Batch, Stage1Latents, Stage1Source
from swifti2v.training.stages.latents import each_clip, encode_clips
from swifti2v.training.stages.noise_levels import NoiseLevelConfig, draw_step_sigmas

EncodePrompts = Callable[[tuple[str, ...]], Tensor]
"""``b`` prompts to embeddings ``[b, L, D]``."""
EncodePhotos = Callable[[Tensor], Tensor]
"""``[b, 3, 1, h, w]`` photos to the embeddings ``[b, L, D]`` of CLIP."""


@settings
class Stage1Objective:
    """What a step asks of the transformer."""

    noise: NoiseLevelConfig = field(default_factory=NoiseLevelConfig)
    """At which noise levels."""
    error_of: Literal["velocity", "clean"] = "velocity"
    """The velocity, or the clean latents, which counts all noise levels alike."""
    channel_weight_limit: float | None = None
    """Weigh a channel by its share of a pixel error, at most this; None weighs all alike."""
    displacement_weight: float = 1.0
    """Of the displacement's error in pixels, or of the moved photo's where it is not known; beside
    that of the latents."""


class Stage1Task:
    """Stage I as the trainer sees it.

    Args:
        transformer: To train, whole or through adapters.
        vae: Frozen.
        sources: Of each phase.
        objective: Settings of the loss.
        stage1: As sampling will have it.
        encode_prompts: Frozen text encoder.
        encode_photos: Frozen image encoder, for models that take its embeddings.
        validate: Measures the model; None measures nothing.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        vae: VideoVAE,
        sources: tuple[Stage1Source, ...],
        objective: Stage1Objective,
        stage1: Stage1Config,
        encode_prompts: EncodePrompts,
        encode_photos: EncodePhotos | None = None,
        validate: Callable[[Path], Mapping[str, float]] | None = None,
    ) -> None:
        self.model, self.vae, self.sources = transformer, vae, sources
        self.pipeline = Stage1Pipeline(transformer, vae)
        self.phase = 0
        self.objective, self.stage1 = objective, stage1
        self.encode_prompts, self.encode_photos = encode_prompts, encode_photos
        self._validate = validate
        limit = objective.channel_weight_limit
        self.channel_weight = None if limit is None else weigh_channels(vae, limit)

    def enter_phase(self, phase: int) -> None:
        """Take the source of a phase."""
        self.phase = phase

    def load_batch(self, draw: Draw) -> Stage1Batch | Stage1Latents:
        """Clips of a micro-batch."""
        return self.sources[self.phase].load(draw)

    def loss(self, batch: Stage1Batch | Stage1Latents, draw: Draw) -> Tensor:
        """``[b]`` flow loss."""
        latents = self.encode(batch)
        still = latents[:, :, :1].expand_as(latents)
        weight = self.channel_weight
        predict = self.predictor(batch, latents)
        displacements: list[Tensor] = []
        with torch.no_grad():
            photo = self.pipeline.decode(latents[:, :, :1])
        course = self._course(batch)

        def model(noisy: Tensor, sigma: Tensor) -> Tensor:
            output = predict(noisy, sigma)
            if self.stage1.motion == "latents":
                return output
            displacements.append(self.pipeline.read_displacement(output, course))
            return self.pipeline.add_to_moved(output, displacements[0], photo, still)

        loss = flow_loss(
            model,
            latents,
            still,
            self.draw_sigma(draw).to(latents.device),
            draw.noise_like(latents),
            parameterization=self.stage1.sampling.parameterization,
            error_of=self.objective.error_of,
            channel_weight=None if weight is None else weight.to(latents.device),
        )
        for displacement in displacements:
            loss = loss + self.objective.displacement_weight * self._motion_loss(
                displacement, batch, photo, latents
            )
        return loss

    def _motion_loss(
        self,
        displacement: Tensor,
        batch: Stage1Batch | Stage1Latents,
        photo: Tensor,
        latents: Tensor,
    ) -> Tensor:
        """``[b]`` error of the displacement, or of the photo moved by it where no truth is known."""
        if isinstance(batch, Stage1Batch) and batch.displacement is not None:
            return displacement_loss(displacement, batch.displacement.to(latents.device))
        with torch.no_grad():
            video = self.pipeline.decode(latents)
        moved = move_photo(photo, enlarge(displacement, *photo.shape[-2:]))
        return photometric_loss(moved, video)

    def _course(self, batch: Stage1Batch | Stage1Latents) -> Course:
        """Of the clips of a batch; one that nobody knows runs evenly."""
        if isinstance(batch, Stage1Batch):
            return batch.course
        return even_course(self.pipeline.scale.time * (batch.latents.shape[2] - 1) + 1)

    def validate(self, directory: Path) -> Mapping[str, float]:
        """See ``Task``."""
        return {} if self._validate is None else self._validate(directory)

    def predictor(
        self, batch: Stage1Batch | Stage1Latents, latents: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The transformer with photo and prompts of a batch bound.

        Args:
            batch: Clips.
            latents: Of them; the photo's are taken.
        """
        condition = self.prepare_condition(batch, latents)
        embeds = self.encode_prompts(batch.prompts)
        image_embeds = self.embed_photos(batch)

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

    @torch.no_grad()
    def encode(self, batch: Stage1Batch | Stage1Latents) -> Tensor:
        """Latents ``[b, C, k, h, w]`` of the frames that a batch covers."""
        if isinstance(batch, Stage1Latents):
            return batch.latents.to(self.model.device)
        return encode_clips(self.vae, batch.video)

    @torch.no_grad()
    def prepare_condition(self, batch: Stage1Batch | Stage1Latents, latents: Tensor) -> Tensor:
        """Mask and image latents ``[b, 4 + C, k, h, w]`` of the frames that a batch covers."""
        if isinstance(batch, Stage1Latents):
            return batch.condition.to(latents.device)
        photos = batch.video[:, :, :1].to(latents.device)
        after = self.pipeline.continue_image(photos, batch.course, self.stage1)
        return each_clip(
            self.vae,
            lambda video: self.pipeline.prepare_condition(video[:, :, :1], video[:, :, 1:]),
            torch.cat([photos, after], dim=2),
        )

    def embed_photos(self, batch: Stage1Batch | Stage1Latents) -> Tensor | None:
        """``[b, L, D]`` of CLIP, for models that take them."""
        if isinstance(batch, Stage1Latents):
            embeds = batch.image_embeds
            return None if embeds is None else embeds.to(self.model.device)
        if self.encode_photos is None:
            return None
        return self.encode_photos(batch.video[:, :, :1].to(self.vae.device))

    def draw_sigma(self, draw: Draw) -> Tensor:
        """``[b]`` noise levels of a micro-batch."""
        return draw_step_sigmas(self.objective.noise, draw)
