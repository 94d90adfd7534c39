"""Stage I: a low-resolution video of the photo, the motion reference of Stage II."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from swifti2v.config import SamplingConfig, Stage1Config
from swifti2v.errors import ConfigError
from swifti2v.media import frames_to_video, video_to_frames
from swifti2v.models.runtime.speed import attention_order
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.streaming import StreamingDecoder, StreamingEncoder, scale_factors
from swifti2v.pipelines.course import Course, draw_chart, draw_course
from swifti2v.pipelines.displacement import (
    enlarge,
    go_on_from,
    leave_out_faint,
    move_photo,
    read_displacement,
)
from swifti2v.pipelines.progress import OnProgress, report_steps
from swifti2v.pipelines.transition import MotionReference
from swifti2v.sampling import (
    Velocity,
    add_noise,
    denoise,
    draw_noise,
    guide,
    to_velocity,
)
from swifti2v.segments import Piece
from swifti2v.shapes import NUM_WAYS, LatentShape, PixelShape, ScaleFactors, latent_frames


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """Output of text and image encoders, for the prompt and the negative prompt."""

    prompt_embeds: Tensor
    """``[1, L, D]``."""
    negative_prompt_embeds: Tensor | None = None
    """``[1, L, D]``; needed only where guidance is above 1."""
    image_embeds: Tensor | None = None
    """``[1, L', D']`` of the CLIP image encoder, for models that take them."""
    later_starts: Tensor | None = None
    """``[P]`` integers, the frames from which later prompts hold; None without any."""
    later_prompt_embeds: Tensor | None = None
    """``[P, L, D]`` of these prompts."""

    def at(self, frame: int) -> "Conditions":
        """Conditions with the one prompt that holds at a pixel frame."""
        if self.later_starts is None or self.later_prompt_embeds is None:
            return self
        number = int((self.later_starts <= frame).sum())
        later = self.later_prompt_embeds[number - 1 : number]
        own = later if number else self.prompt_embeds
        return replace(self, prompt_embeds=own, later_starts=None, later_prompt_embeds=None)

    def to(self, device: torch.device) -> "Conditions":
        """Copy on a device."""
        found = {name: getattr(self, name) for name in Conditions.__slots__}
        moved: dict[str, Any] = {k: None if v is None else v.to(device) for k, v in found.items()}
        return Conditions(**moved)


@dataclass(frozen=True, slots=True)
class Stage1Clip:
    """Output of Stage I."""

    video: Tensor
    """``[1, 3, T, H, W]`` float32 in [-1, 1]."""
    displacement: Tensor | None
    """``[1, 2, T, h, w]`` float32 columns and rows in pixels, where each cell's centre was in the
    photo; None for a model that generates pixels alone."""

    def after(self, num_frames: int) -> "Stage1Clip":
        """The clip without its first frames."""
        displacement = self.displacement
        return Stage1Clip(
            self.video[:, :, num_frames:],
            None if displacement is None else displacement[:, :, num_frames:],
        )

    def to_motion_reference(self) -> MotionReference:
        """The clip as Stage II reads it."""
        displacement = self.displacement
        if displacement is not None:
            displacement = displacement[0].transpose(0, 1).cpu()
        return MotionReference(video_to_frames(self.video), displacement)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Start:
    """Frames from which a piece goes on."""

    given: Tensor
    """``[1, 3, k, H, W]``, the frames before it; of a first piece the photo."""
    frame: int = 0
    """Place of the first of them in the clip."""
    displacement: Tensor | None = None
    """``[1, 2, h, w]`` of that frame; None where it is the photo itself."""


class Stage1Pipeline:
    """Image-to-video with the input layout of Wan2.1-I2V: noise, mask, image latents.

    Args:
        transformer: ``WanTransformer3DModel`` with 2C + 4 input channels.
        vae: Video VAE with C latent channels.
    """

    shows_given = False
    """Whether given frames are clean latents among those that are denoised."""

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
    ) -> Stage1Clip:
        """Generate the motion reference.

        Args:
            image: ``[1, 3, 1, H, W]`` in [-1, 1], the photo at Stage I's size.
            conditions: Text and image embeddings.
            num_frames: T, pixel frames.
            seed: Seed of the noise.
            config: Settings.
            on_progress: Called after each step.

        Raises:
            ShapeError: The size or the frame count does not fit the model.
            NumericalError: The model returned NaN or infinity.
        """
        self._require_fit(PixelShape(num_frames, image.shape[3], image.shape[4]))
        sigmas = config.sampling.plan_sigmas()
        start = _Start(given=image)
        return self._sample(image, start, num_frames, conditions, seed, config, sigmas, on_progress)

    def go_on(
        self,
        image: Tensor,
        before: MotionReference,
        piece: Piece,
        conditions: Conditions,
        seed: int,
        config: Stage1Config,
        on_progress: OnProgress | None = None,
    ) -> Stage1Clip:
        """Generate the frames that follow those made so far.

        The model sees the last frames as given ones. A displacement goes on from theirs, so the
        photo itself is moved however long the clip is.

        Args:
            image: See ``__call__``.
            before: Frames of the clip up to the piece's given ones.
            piece: Its place in the clip.
            conditions: See ``__call__``; the prompt is the one that holds at this piece.
            seed: See ``__call__``.
            config: See ``__call__``.
            on_progress: See ``__call__``.

        Returns:
            The new frames alone.
        """
        self._require_fit(PixelShape(piece.num_frames, image.shape[3], image.shape[4]))
        known = slice(piece.start, piece.start + piece.num_given)
        displacement = before.displacement
        start = _Start(
            given=frames_to_video(before.frames[known]).to(image),
            frame=piece.start,
            displacement=None if displacement is None else displacement[known][:1].to(image),
        )
        clip = self._sample(
            image,
            start,
            piece.num_frames,
            conditions,
            seed,
            config,
            config.sampling.plan_sigmas(),
            on_progress,
        )
        return clip.after(piece.num_given)

    def redraw(
        self,
        video: Tensor,
        conditions: Conditions,
        seed: int,
        config: Stage1Config,
        sigma: float,
        on_progress: OnProgress | None = None,
    ) -> Stage1Clip:
        """Noise a clip to a level and denoise it again: its motion, seen through this model.

        At ``sigma`` 1 nothing but the first frame is left of the clip, so the result is that of a
        call with this frame; near 0 it is the clip after encoding and decoding.

        Args:
            video: ``[1, 3, T, H, W]`` in [-1, 1] at Stage I's size; its first frame is the photo.
            conditions: Text and image embeddings.
            seed: Seed of the noise.
            config: Settings; ``sigma`` takes the place of ``sampling.strength``.
            sigma: Noise level to start from, in (0, 1].
            on_progress: Called after each step.

        Raises:
            ShapeError: The size or the frame count does not fit the model.
            ConfigError: ``sigma`` is out of range.
            NumericalError: The model returned NaN or infinity.

        Source:
            SwiftI2V, arXiv:2605.06356 (stage-transition samples).
        """
        sigmas = plan_redraw_sigmas(config.sampling, sigma)
        self._require_fit(PixelShape(*video.shape[2:]))
        image, num_frames = video[:, :, :1], video.shape[2]
        start, clean = _Start(given=image), StreamingEncoder(self.vae).encode(video)
        return self._sample(
            image, start, num_frames, conditions, seed, config, sigmas, on_progress, clean
        )

    def _sample(  # noqa: PLR0913 - the one place where everything meets
        self,
        photo: Tensor,
        start: _Start,
        num_frames: int,
        conditions: Conditions,
        seed: int,
        config: Stage1Config,
        sigmas: Sequence[float],
        on_progress: OnProgress | None,
        clean: Tensor | None = None,
    ) -> Stage1Clip:
        """Noise ``clean``, or the first frame at rest, to the first level; denoise and decode it."""
        course = draw_course(num_frames, seed + start.frame)
        after = self.continue_image(start.given, course, config)
        condition = self.prepare_condition(start.given, after)
        clean = self._still(condition) if clean is None else clean
        _, channels, num_latent_frames, height, width = clean.shape
        size = (channels, height, width)
        time = self.scale.time
        given = latent_frames(start.given.shape[2], time) if self.shows_given else 0
        # A frame's noise is its own, whatever piece it is made in.
        frames = range(start.frame // time + given, start.frame // time + num_latent_frames)
        draw = partial(draw_noise, size, frames, seed, clean.device, stage="stage1")
        noisy = draw() if sigmas[0] >= 1 else add_noise(clean[:, :, given:], draw(), sigmas[0])
        latents = torch.cat([clean[:, :, :given], noisy], dim=2)
        on_step = report_steps(on_progress, "stage1", len(sigmas) - 1)
        displacements: list[Tensor] = []
        velocity = self.velocity(
            condition, conditions, config, photo, course, displacements.append, start.displacement
        )
        renoise = draw if config.sampling.rule == "renoise" else None
        latents = denoise(velocity, latents, given, sigmas, on_step, "Stage I", renoise)
        video = self.decode(latents)
        if not displacements:
            return Stage1Clip(video, None)
        return Stage1Clip(leave_out_faint(video, photo, displacements[-1]), displacements[-1])

    def require_motion(self, config: Stage1Config) -> None:
        """Refuse a kind of motion that the transformer was not made for.

        Raises:
            ConfigError: Its channels are those of the other kind.
        """
        num_channels = int(self.transformer.config["out_channels"])
        extra = NUM_WAYS if config.motion == "displacement" else 0
        if num_channels != int(self.vae.config["z_dim"]) + extra:
            raise ConfigError(
                f"stage1.motion is {config.motion}, but this Stage I generates the other kind: "
                "leave out stage1.motion"
            )

    def _require_fit(self, pixels: PixelShape) -> None:
        LatentShape.from_pixel_shape(pixels, self.scale, int(self.vae.config["z_dim"]))

    def _still(self, condition: Tensor) -> Tensor:
        """The image's latents ``[1, C, F, h, w]`` at every frame."""
        num_mask_channels = self.scale.time
        first = condition[:, num_mask_channels:, :1]
        return first.expand(-1, -1, condition.shape[2], -1, -1)

    def continue_image(self, image: Tensor, course: Course, config: Stage1Config) -> Tensor:
        """Make the frames that follow the image in the condition video.

        Args:
            image: ``[B, 3, k, H, W]``, one frame or several that are given.
            course: Course of the T frames, the given ones included, of one clip or of B; the chart
                shows it.
            config: Says whether the frames are grey or a chart.

        Returns:
            ``[B, 3, T - k, H, W]``.
        """
        num_given, height, width = image.shape[-3:]
        num_frames = course.clock.shape[-1]
        if config.condition == "zeros":
            grey = torch.zeros_like(image[:, :, :1])
            return grey.expand(-1, -1, num_frames - num_given, -1, -1)
        chart = draw_chart(course, height, width)[..., num_given:, :, :]
        return chart.to(image).expand(len(image), -1, -1, -1, -1)

    def prepare_condition(self, image: Tensor, after: Tensor) -> Tensor:
        """Mask and image latents, as Wan2.1-I2V lays them out.

        Args:
            image: ``[B, 3, k, H, W]`` in [-1, 1], one frame or several that are given.
            after: ``[B, 3, T - k, H, W]``, what follows in the condition video.

        Returns:
            ``[B, 4 + C, F, h, w]``: four mask channels, 1 where the frame is given.
        """
        encoder = StreamingEncoder(self.vae)
        given = encoder.encode(image)
        latents = torch.cat([given, encoder.encode(after)], dim=2)
        mask = torch.zeros_like(latents[:, :1]).expand(-1, self.scale.time, -1, -1, -1).clone()
        mask[:, :, : given.shape[2]] = 1
        return torch.cat([mask, latents], dim=1)

    def velocity(
        self,
        condition: Tensor,
        conditions: Conditions,
        config: Stage1Config,
        photo: Tensor,
        course: Course,
        on_displacement: Callable[[Tensor], None],
        before: Tensor | None = None,
    ) -> Velocity:
        """Bind everything but latents and noise level; guidance is mixed in here.

        Args:
            condition: ``[1, 4 + C, F, h, w]`` from ``prepare_condition``.
            conditions: Text and image embeddings.
            config: Settings.
            photo: ``[1, 3, 1, H, W]``, the photo that a displacement moves.
            course: Course of the clip.
            on_displacement: Called with each displacement that the model tells, see
                ``read_displacement``.
            before: ``[1, 2, h, w]`` displacement of the first frame, from which the clip goes on.
        """
        still, image_embeds = self._still(condition), conditions.image_embeds

        def predict(embeds: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
            with attention_order(config.speed.attention, latents.device):
                return self.predict(latents, condition, sigma, embeds, image_embeds)

        guided = guide(
            predict,
            conditions.prompt_embeds,
            conditions.negative_prompt_embeds,
            config.sampling.guidance_scale,
        )

        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            output = guided(latents, sigma)
            if config.motion == "displacement":
                displacement = self.read_displacement(output, course)
                if before is not None:
                    displacement = go_on_from(before, displacement, self.scale.space)
                on_displacement(displacement)
                output = self.add_to_moved(output, displacement, photo, still)
            return to_velocity(output, latents, still, sigma, config.sampling.parameterization)

        return velocity

    def predict(
        self,
        latents: Tensor,
        condition: Tensor,
        sigma: Tensor,
        prompt_embeds: Tensor,
        image_embeds: Tensor | None,
    ) -> Tensor:
        """Run the transformer once.

        Args:
            latents: ``[1, C, F, h, w]``.
            condition: From ``prepare_condition``.
            sigma: ``[1, F]`` noise levels, 0 where the frame is given.
            prompt_embeds: ``[1, L, D]``.
            image_embeds: ``[1, L', D']``, for models that take them.

        Returns:
            ``[1, C', F', h, w]`` float32, the prediction of the last F' frames.
        """
        dtype = self.transformer.dtype
        output: Tensor = self.transformer(
            hidden_states=torch.cat([latents, condition], dim=1).to(dtype),
            timestep=sigma[:, 0] * 1000,
            encoder_hidden_states=prompt_embeds.to(dtype),
            encoder_hidden_states_image=None if image_embeds is None else image_embeds.to(dtype),
            return_dict=False,
        )[0]
        return output.float()

    def read_displacement(self, output: Tensor, course: Course) -> Tensor:
        """Read the place of each cell in the photo.

        Args:
            output: ``[B, 5 + C, F, h, w]`` of the transformer, see ``displacement.read_displacement``;
                the image's frame and groups of four frames, not necessarily all of a clip.
            course: Course of their T pixel frames.

        Returns:
            ``[B, 2, T, h, w]`` in pixels.
        """
        return read_displacement(output, course, self.scale.time, self.scale.space)

    @torch.no_grad()
    def _encode_moved(self, photo: Tensor, displacement: Tensor) -> Tensor:
        moved = move_photo(photo, enlarge(displacement, *photo.shape[-2:]))
        return StreamingEncoder(self.vae).encode(moved)

    def add_to_moved(
        self, output: Tensor, displacement: Tensor, photo: Tensor, still: Tensor
    ) -> Tensor:
        """The transformer's addition to the moved photo, as a residual to the image's latents.

        No gradient reaches the displacement.

        Args:
            output: ``[B, 5 + C, F, h, w]`` of the transformer.
            displacement: ``[B, 2, T, h, w]``, from ``read_displacement``.
            photo: ``[B, 3, 1, H, W]`` in [-1, 1].
            still: ``[B, C, F, h, w]``, the image's latents at every frame.

        Returns:
            ``[B, C, F, h, w]``.
        """
        added = output[:, NUM_WAYS:]
        return self._encode_moved(photo, displacement) - still + added

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels ``[1, 3, T, H, W]`` of latents ``[1, C, F, h, w]``, one latent frame at a time."""
        decoder = StreamingDecoder(self.vae)
        return torch.cat([decoder.decode(frame) for frame in torch.split(latents, 1, dim=2)], dim=2)


def plan_redraw_sigmas(sampling: SamplingConfig, sigma: float) -> list[float]:
    """Noise levels of ``Stage1Pipeline.redraw``: the plain schedule, cut at the level it starts from.

    Few-step weights know the levels of their own schedule best, so those below ``sigma`` are kept
    as they are: with 4 steps and shift 5, 0.9 gives 0.9, 0.8333, 0.625, 0, and 0.4 gives 0.4, 0.

    Args:
        sampling: Its levels without a strength.
        sigma: Level to start from, in (0, 1].

    Raises:
        ConfigError: ``sigma`` is out of range.
    """
    if not 0 < sigma <= 1:
        raise ConfigError(f"sigma is {sigma:g}; it must be above 0 and at most 1")
    whole = replace(sampling, strength=1.0).plan_sigmas()
    return [sigma, *(level for level in whole if level < sigma)]
