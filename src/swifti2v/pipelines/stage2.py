"""Stage II: high-resolution latents, one segment at a time, from the photo and a reference."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from swifti2v.config import Stage2Config
from swifti2v.errors import ShapeError
from swifti2v.models.attention import use_attention
from swifti2v.models.runtime.speed import attention_order
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.streaming import scale_factors
from swifti2v.pipelines.progress import OnProgress, Progress, Stopwatch
from swifti2v.pipelines.stage1 import Conditions
from swifti2v.pipelines.store import SegmentStore
from swifti2v.pipelines.transition import HybridReference
from swifti2v.sampling import (
    Velocity,
    add_noise,
    denoise,
    draw_noise,
    guide,
    plan_sigmas,
    to_velocity,
)
from swifti2v.segments import Segment
from swifti2v.shapes import ScaleFactors


def predict_window(
    transformer: SegmentTransformer3DModel,
    segment: Segment,
    hidden_states: Tensor,
    sigma: Tensor,
    prompt_embeds: Tensor,
    config: Stage2Config,
    num_skipped: int = 0,
) -> Tensor:
    """Run the transformer on one window; sampling and training both do it here.

    Args:
        transformer: The segment transformer.
        segment: Its window gives the absolute temporal positions.
        hidden_states: ``[B, 2C, N, h, w]``, latents of the window and of its reference; a
            transformer of C channels is not shown the second half.
        sigma: ``[B, N]`` noise levels, 0 where the frame is given.
        prompt_embeds: ``[B, L, D]``.
        config: Says which positions and noise levels the transformer is told, and which of its
            tokens attend to each other.
        num_skipped: Frames at the start whose prediction is not needed.

    Returns:
        ``[B, C, N - num_skipped, h, w]`` float32, the weights' prediction for the other frames.
    """
    dtype = transformer.dtype
    _, rows, columns = transformer.config["patch_size"]
    height, width = hidden_states.shape[-2:]
    num_given = len(segment.given)
    use_attention(transformer, config.attention, height // rows, width // columns, num_given)
    absolute = config.temporal_positions == "absolute"
    told = sigma.amax(dim=1, keepdim=True).expand_as(sigma)
    output: Tensor = transformer(
        hidden_states[:, : transformer.config["in_channels"]].to(dtype),
        sigma if config.clean_sigma == "zero" else told,
        prompt_embeds.to(dtype),
        temporal_positions=segment.window if absolute else range(len(segment.window)),
        num_given=num_skipped,
    )
    return output.float()


def prepare_window_reference(given: Tensor, reference: Tensor, config: Stage2Config) -> Tensor:
    """Reference latents of a window as the transformer is shown them.

    Args:
        given: ``[B, C, G, h, w]`` clean latents of anchor and context.
        reference: ``[B, C, N, h, w]`` encoded reference of the window.
        config: Says what stands beside the given frames.

    Returns:
        ``[B, C, N, h, w]``.
    """
    if config.context_reference == "reference":
        return reference
    return torch.cat([given, reference[:, :, given.shape[2] :]], dim=2)


@dataclass(frozen=True, slots=True)
class SegmentLatents:
    """A finished segment."""

    segment: Segment
    latents: Tensor
    """``[1, C, len(target), h, w]`` float32."""


class Stage2Pipeline:
    """Conditional Segment-wise Generation.

    Args:
        transformer: The segment transformer.
        vae: Video VAE of the output.
    """

    def __init__(
        self, transformer: SegmentTransformer3DModel, vae: AutoencoderKLWan | BlockCodec
    ) -> None:
        self.transformer = transformer
        self.vae = vae

    @property
    def scale(self) -> ScaleFactors:
        """Pixels a latent cell and a token stand for."""
        return scale_factors(self.vae, patch=self.transformer.config["patch_size"][1])

    @property
    def takes_reference(self) -> bool:
        """Whether the transformer is shown the reference beside the latents."""
        config = self.transformer.config
        return bool(config["in_channels"] > config["out_channels"])

    def stream(
        self,
        reference: HybridReference,
        conditions: Conditions,
        seed: int,
        config: Stage2Config,
        store: SegmentStore | None = None,
        on_progress: OnProgress | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> Iterator[SegmentLatents]:
        """Denoise the clip segment by segment.

        Args:
            reference: The hybrid reference; its first latent frame is the anchor.
            conditions: Text embeddings.
            seed: Seed of the noise, drawn for each latent frame by itself.
            config: Settings.
            store: Gets the latents of each segment; those it holds are yielded as they are.
            on_progress: Called after each step.
            stopwatch: Takes the seconds of ``reference`` and ``stage2``.

        Yields:
            The segments in order.

        Raises:
            NumericalError: The model returned NaN or infinity; segments yielded before are good.
            ShapeError: Latents of the store are not of their segment's shape.

        Source:
            SwiftI2V, arXiv:2605.06356, section 3.2.
        """
        stopwatch = stopwatch or Stopwatch()
        segments = config.plan(reference.num_latent_frames)
        with stopwatch.measure("reference"):
            anchor = reference.anchor()
        clean: dict[int, Tensor] = {0: anchor}
        for segment in segments:
            with stopwatch.measure("reference"):
                condition = reference.latents(segment.window)
            kept = store.load_segment(segment.index) if store is not None else None
            if kept is not None:
                target = kept.to(anchor)
                self._require_shape(target, segment, anchor)
            else:
                with stopwatch.measure("stage2"):
                    target = self._denoise_segment(
                        segment,
                        clean,
                        condition,
                        conditions,
                        seed,
                        config,
                        on_progress,
                    )
                if store is not None:
                    store.save_segment(segment.index, target)
            clean.update(zip(segment.target, torch.split(target, 1, dim=2), strict=True))
            yield SegmentLatents(segment, target)
            first_needed = segment.target[-1] + 1 - config.context_size
            clean = {i: frame for i, frame in clean.items() if i == 0 or i >= first_needed}
            reference.forget_before(first_needed)

    def _denoise_segment(
        self,
        segment: Segment,
        clean: Mapping[int, Tensor],
        condition: Tensor,
        conditions: Conditions,
        seed: int,
        config: Stage2Config,
        on_progress: OnProgress | None,
    ) -> Tensor:
        """Clean latents ``[1, C, len(target), h, w]`` of one segment.

        Args:
            segment: Latent frames to read and to write.
            clean: Anchor and context latents ``[1, C, 1, h, w]`` by frame.
            condition: ``[1, C, N, h, w]`` reference latents of the window.
            conditions: Text embeddings.
            seed: Seed of the noise.
            config: Settings.
            on_progress: Called after each step.
        """
        sampling = config.sampling
        sigmas = plan_sigmas(sampling.num_inference_steps, sampling.shift, sampling.strength)
        num_given = len(segment.given)
        empty = condition[:, :, :0]  # what is given where the segment generates the anchor
        given = torch.cat([empty, *(clean[frame] for frame in segment.given)], dim=2)
        _, channels, _, height, width = condition.shape
        size = (channels, height, width)
        noise = draw_noise(size, segment.target, seed, condition.device, stage="stage2")
        start = noise
        if sigmas[0] < 1:
            start = add_noise(condition[:, :, num_given:], noise, sigmas[0])
        condition = prepare_window_reference(given, condition, config)

        def on_step(step: int, _: Tensor) -> None:
            if on_progress is not None:
                on_progress(
                    Progress(
                        stage="stage2",
                        step=step + 1,
                        num_steps=len(sigmas) - 1,
                        segment=segment.index,
                    )
                )

        window = denoise(
            self.velocity(segment, condition, conditions, config),
            torch.cat([given, start], dim=2),
            num_given,
            sigmas,
            on_step,
            where=f"Stage II, segment {segment.index}",
        )
        return window[:, :, num_given:]

    def velocity(
        self, segment: Segment, condition: Tensor, conditions: Conditions, config: Stage2Config
    ) -> Velocity:
        """Bind everything but latents and noise level; guidance is mixed in here.

        Args:
            segment: Its window gives the absolute temporal positions.
            condition: ``[1, C, N, h, w]`` reference latents of the window.
            conditions: Text embeddings.
            config: Settings.
        """
        num_skipped = len(segment.given) if config.speed.skips_given else 0
        # The reference is the same at every step: only the latents are copied anew.
        inputs = torch.cat([condition, condition], dim=1).to(self.transformer.dtype)

        def predict(latents: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
            inputs[:, : latents.shape[1]] = latents
            with attention_order(config.speed.attention, inputs.device):
                output = predict_window(
                    self.transformer, segment, inputs, sigma, embeds, config, num_skipped
                )
            return to_velocity(output, latents, condition, sigma, config.sampling.parameterization)

        return guide(
            predict,
            conditions.prompt_embeds,
            conditions.negative_prompt_embeds,
            config.sampling.guidance_scale,
        )

    @staticmethod
    def _require_shape(latents: Tensor, segment: Segment, anchor: Tensor) -> None:
        expected = (*anchor.shape[:2], len(segment.target), *anchor.shape[3:])
        if tuple(latents.shape) != expected:
            raise ShapeError(
                f"finished latents of segment {segment.index} are {list(latents.shape)}; "
                f"this run needs {list(expected)}"
            )
