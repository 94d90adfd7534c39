"""Stage I from a model that takes the photo as its first frame, as Wan2.2-TI2V does."""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from swifti2v.config import Stage1Config, Stage2Config
from swifti2v.errors import ConfigError
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.streaming import StreamingEncoder
from swifti2v.pipelines.stage1 import Stage1Pipeline
from swifti2v.pipelines.stage2 import predict_window
from swifti2v.segments import plan_segments


def make_stage1(
    transformer: WanTransformer3DModel, vae: AutoencoderKLWan | BlockCodec
) -> Stage1Pipeline:
    """Make the pipeline of Stage I: one of segments takes the photo as its first frame."""
    takes_first_frame = isinstance(transformer, SegmentTransformer3DModel)
    return (FirstFramePipeline if takes_first_frame else Stage1Pipeline)(transformer, vae)


class FirstFramePipeline(Stage1Pipeline):
    """Image-to-video with the photo as clean first latent frame, all others denoised with it.

    The transformer is the one of Stage II without a reference, and the clip one window. Where both
    stages are the same model, they can share it.

    Source:
        Wan2.2's ``textimage2video``: the first frame is given at timestep 0.
    """

    shows_given = True

    def require_motion(self, config: Stage1Config) -> None:
        """Refuse settings of models that see the photo in channels of their own.

        Raises:
            ConfigError: Displacement or a chart is asked for.
        """
        super().require_motion(config)
        if config.condition != "zeros":
            raise ConfigError(
                f"stage1.condition is {config.condition}, but this Stage I takes the photo as its "
                "first frame and sees no condition: leave out stage1.condition"
            )

    def prepare_condition(self, image: Tensor, after: Tensor) -> Tensor:
        """Latents of the given frames, the last of them at every frame after.

        Args:
            image: ``[B, 3, k, H, W]`` in [-1, 1].
            after: ``[B, 3, T - k, H, W]``; only T is read.

        Returns:
            ``[B, C, F, h, w]``.
        """
        given = StreamingEncoder(self.vae).encode(image)
        num_after = after.shape[2] // self.scale.time
        return torch.cat([given, given[:, :, -1:].expand(-1, -1, num_after, -1, -1)], dim=2)

    def _still(self, condition: Tensor) -> Tensor:
        return condition

    def predict(
        self,
        latents: Tensor,
        condition: Tensor,  # noqa: ARG002 - the photo is in the latents
        sigma: Tensor,
        prompt_embeds: Tensor,
        image_embeds: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        """See ``Stage1Pipeline.predict``; of the first frame nothing is predicted."""
        transformer: Any = self.transformer
        (clip,) = plan_segments(latents.shape[2], None, 0)
        return predict_window(
            transformer, clip, latents, sigma, prompt_embeds, Stage2Config(), num_skipped=1
        )
