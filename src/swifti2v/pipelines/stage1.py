"""Stage I: a low-resolution video of the photo, the motion reference of Stage II."""

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from swifti2v.config import Stage1Config
from swifti2v.models.codec import BlockCodec
from swifti2v.models.vae import StreamingDecoder, StreamingEncoder, scale_factors
from swifti2v.pipelines.progress import OnProgress, Progress
from swifti2v.sampling import (
    Velocity,
    add_noise,
    denoise,
    draw_noise,
    guide,
    plan_sigmas,
    to_velocity,
)
from swifti2v.shapes import LatentShape, PixelShape, ScaleFactors


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """What text and image encoders say, for the prompt and for the negative prompt."""

    prompt_embeds: Tensor
    """``[1, L, D]``."""
    negative_prompt_embeds: Tensor | None = None
    """``[1, L, D]``; needed only where guidance is above 1."""
    image_embeds: Tensor | None = None
    """``[1, L', D']`` of the CLIP image encoder, for models that take them."""


class Stage1Pipeline:
    """Image-to-video with the input layout of Wan2.1-I2V: noise, mask, image latents.

    Args:
        transformer: ``WanTransformer3DModel`` with 2C + 4 input channels.
        vae: Video VAE with C latent channels.
    """

    def __init__(
        self, transformer: WanTransformer3DModel, vae: AutoencoderKLWan | BlockCodec
    ) -> None:
        self.transformer = transformer
        self.vae = vae

    @property
    def scale(self) -> ScaleFactors:
        """Pixels a latent cell and a token stand for."""
        return scale_factors(self.vae, patch=self.transformer.config["patch_size"][1])

    def __call__(
        self,
        image: Tensor,
        conditions: Conditions,
        num_frames: int,
        seed: int,
        config: Stage1Config,
        on_progress: OnProgress | None = None,
    ) -> Tensor:
        """Generate the motion reference.

        Args:
            image: ``[1, 3, 1, H, W]`` in [-1, 1], the photo at Stage I's size.
            conditions: Text and image embeddings.
            num_frames: T, pixel frames.
            seed: Of the noise.
            config: Settings.
            on_progress: Called after each step.

        Returns:
            ``[1, 3, T, H, W]`` float32 in [-1, 1].

        Raises:
            ShapeError: The size or the frame count does not fit the model.
            NumericalError: The model returned NaN or infinity.
        """
        pixels = PixelShape(num_frames, image.shape[3], image.shape[4])
        channels = int(self.vae.config["z_dim"])
        shape = LatentShape.from_pixel_shape(pixels, self.scale, channels)
        condition = self.prepare_condition(image, shape, config)
        sigmas = plan_sigmas(
            config.sampling.num_inference_steps, config.sampling.shift, config.sampling.strength
        )
        noise = draw_noise(
            (channels, shape.height, shape.width), range(shape.num_frames), seed, image.device
        )
        still = condition[:, 4:, :1].expand(-1, -1, shape.num_frames, -1, -1)
        latents = noise if sigmas[0] >= 1 else add_noise(still, noise, sigmas[0])

        def on_step(step: int, _: Tensor) -> None:
            if on_progress is not None:
                on_progress(Progress(stage="stage1", step=step + 1, num_steps=len(sigmas) - 1))

        latents = denoise(
            self.velocity(condition, still, conditions, config),
            latents,
            [True] * shape.num_frames,
            sigmas,
            on_step,
            where="Stage I",
        )
        return self.decode(latents)

    def prepare_condition(self, image: Tensor, shape: LatentShape, config: Stage1Config) -> Tensor:
        """Mask and image latents, as Wan2.1-I2V lays them out.

        Args:
            image: ``[1, 3, 1, H, W]`` in [-1, 1].
            shape: Of the clip's latents.
            config: Says what follows the image in the condition video.

        Returns:
            ``[1, 4 + C, F, h, w]``: four mask channels, 1 where the frame is given.
        """
        encoder = StreamingEncoder(self.vae)
        pieces = [encoder.encode(image)]
        time = self.scale.time
        for frame in range(1, shape.num_frames):
            after = torch.zeros_like(image)
            if config.condition == "chart":
                after = draw_chart(image, frame / (shape.num_frames - 1))
            pieces.append(encoder.encode(after.expand(-1, -1, time, -1, -1)))
        latents = torch.cat(pieces, dim=2)
        mask = torch.zeros_like(latents[:, :1]).expand(-1, time, -1, -1, -1).clone()
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], dim=1)

    def velocity(
        self, condition: Tensor, still: Tensor, conditions: Conditions, config: Stage1Config
    ) -> Velocity:
        """Bind everything but latents and noise level; guidance is mixed in here.

        Args:
            condition: ``[1, 4 + C, F, h, w]`` from ``prepare_condition``.
            still: ``[1, C, F, h, w]``, the image's latents at every frame: what the residual
                parameterization adds to.
            conditions: Text and image embeddings.
            config: Settings.
        """
        dtype = self.transformer.dtype

        def predict(latents: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
            image_embeds = conditions.image_embeds
            output = self.transformer(
                hidden_states=torch.cat([latents, condition], dim=1).to(dtype),
                timestep=sigma[:, 0] * 1000,
                encoder_hidden_states=embeds.to(dtype),
                encoder_hidden_states_image=None
                if image_embeds is None
                else image_embeds.to(dtype),
                return_dict=False,
            )[0]
            return to_velocity(
                output.float(), latents, still, sigma, config.sampling.parameterization
            )

        return guide(
            predict,
            conditions.prompt_embeds,
            conditions.negative_prompt_embeds,
            config.sampling.guidance_scale,
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels ``[1, 3, T, H, W]`` of latents ``[1, C, F, h, w]``, one latent frame at a time."""
        decoder = StreamingDecoder(self.vae)
        return torch.cat([decoder.decode(frame) for frame in torch.split(latents, 1, dim=2)], dim=2)


def draw_chart(image: Tensor, time: float) -> Tensor:
    """Frame whose red tells the column, green the row and blue the time, each from -1 to 1.

    Args:
        image: ``[1, 3, 1, H, W]``, gives size, device and dtype.
        time: Part of the clip that has passed, in [0, 1].

    Returns:
        ``[1, 3, 1, H, W]``.
    """
    height, width = image.shape[-2:]
    chart = torch.empty_like(image)
    chart[:, 0] = (torch.arange(width, device=image.device) + 0.5) / width * 2 - 1
    chart[:, 1] = ((torch.arange(height, device=image.device) + 0.5) / height * 2 - 1)[:, None]
    chart[:, 2] = 2 * time - 1
    return chart
