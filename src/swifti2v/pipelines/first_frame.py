"""Stage I from a model that takes the photo as its first frame, as Wan2.2-TI2V does."""

from typing import Any

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

    num_given = 1

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
        """The photo's latents at every frame.

        Args:
            image: ``[B, 3, 1, H, W]`` in [-1, 1].
            after: ``[B, 3, T - 1, H, W]``; only T is read.

        Returns:
            ``[B, C, F, h, w]``.
        """
        first = StreamingEncoder(self.vae).encode(image)
        num_latent_frames = 1 + after.shape[2] // self.scale.time
        return first.expand(-1, -1, num_latent_frames, -1, -1)

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
            transformer, clip, latents, sigma, prompt_embeds, Stage2Config(), self.num_given
        )
