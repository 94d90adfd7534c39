"""The first part of the nano model's Stage I: block 0 learns the motion's phases, supervised."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from swifti2v.training.camera_motion import CAMERA_MOTIONS
from swifti2v.training.data import pixel_frames
from swifti2v.training.draws import Draw
from swifti2v.training.motion_phases import FeatureLayout, make_phases
from swifti2v.training.nano_models import STAGE1_SCALE
from swifti2v.training.stage1 import Stage1Task
from swifti2v.training.stage1_sources import NUM_MOTIONS, Stage1Batch


class PhasesTask:
    """Teaches block 0 to turn prompt, place and time into the phases of the camera's motion.

    Args:
        transformer: A single block with the structured start, and the embeddings before it.
        layout: Tells the features that hold the phases.
        stage1: Camera motions over pictures, and how they are conditioned.
    """

    def __init__(
        self, transformer: WanTransformer3DModel, layout: FeatureLayout, stage1: Stage1Task
    ) -> None:
        self.model, self.layout, self.stage1 = transformer, layout, stage1
        transformer.requires_grad_(False)
        block: Any = transformer.blocks[0]
        for part in (block, transformer.condition_embedder.text_embedder):
            part.requires_grad_(True)

    def enter_phase(self, phase: int) -> None:
        """There is one."""

    def load_batch(self, draw: Draw) -> Stage1Batch:
        """Clips of a micro-batch."""
        batch = self.stage1.load_batch(draw)
        assert isinstance(batch, Stage1Batch)  # motions over pictures are never cached
        return batch

    def loss(self, batch: Stage1Batch, draw: Draw) -> Tensor:
        """``[b]`` mean squared error of the phases; the latents are pure noise."""
        latents = self.stage1.encode(batch)
        sigma = self.stage1.draw_sigma(draw).to(latents.device)
        tokens: list[Tensor] = []
        block: Any = self.model.blocks[0]
        hook = block.register_forward_hook(lambda _, __, output: tokens.append(output))
        try:
            self.stage1.predictor(batch, latents)(draw.noise_like(latents), sigma[:, None])
        finally:
            hook.remove()
        error = tokens[0][..., self.layout.phases].float() - self._phases(batch, draw)
        return error.square().flatten(1).mean(dim=1)

    def validate(self, directory: Path) -> Mapping[str, float]:  # noqa: ARG002 - as in Task
        """The loss tells all."""
        return {}

    def _phases(self, batch: Stage1Batch, draw: Draw) -> Tensor:
        """``[b, L, 12]``."""
        last = pixel_frames(batch.num_latent_frames - 1)[-1]
        held = [pixel_frames(frame) for frame in batch.latent_frames]
        times = [sum(pixels) / len(pixels) / last for pixels in held]
        grid = (
            batch.video.shape[3] // STAGE1_SCALE.space,
            batch.video.shape[4] // STAGE1_SCALE.space,
        )
        motions = [CAMERA_MOTIONS[index % NUM_MOTIONS] for index in draw.indices]
        return torch.stack([make_phases(motion, times, grid) for motion in motions]).to(
            self.model.device
        )
