"""Stage II: high-resolution latents, one segment at a time, from the photo and a reference."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

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
from swifti2v.pipelines.decoding import SegmentLatents
from swifti2v.pipelines.progress import OnProgress, Stopwatch, report_steps
from swifti2v.pipelines.stage1 import Conditions
from swifti2v.pipelines.store import SegmentStore
from swifti2v.pipelines.transition import HybridReference
from swifti2v.sampling import (
    Velocity,
    add_noise,
    denoise,
    draw_noise,
    guide,
    to_velocity,
)
from swifti2v.segments import Segment
from swifti2v.shapes import ScaleFactors, pixel_frames


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
            conditions: Text embeddings; a segment has the prompt that holds at its first new frame.
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
        sigmas = config.sampling.plan_sigmas()
        with stopwatch.measure("reference"):
            anchor = reference.anchor()
        clean: dict[int, Tensor] = {0: anchor}
        for segment in config.plan(reference.num_latent_frames):
            reference.wait_for(segment.window)
            with stopwatch.measure("reference"):
                condition = reference.latents(segment.window)
            target = store.load_segment(segment.index) if store is not None else None
            if target is not None:
                target = target.to(anchor)
                self._require_shape(target, segment, anchor)
            else:
                first_frame = pixel_frames(segment.target[0], self.scale.time).start
                with stopwatch.measure("stage2"):
                    given = _gather(clean, segment.given, condition)
                    draw = _noise_source(anchor, segment, seed)
                    start = condition[:, :, len(segment.given) :]
                    start = draw() if sigmas[0] >= 1 else add_noise(start, draw(), sigmas[0])
                    condition = prepare_window_reference(given, condition, config)
                    window = denoise(
                        self.velocity(segment, condition, conditions.at(first_frame), config),
                        torch.cat([given, start], dim=2),
                        len(segment.given),
                        sigmas,
                        report_steps(on_progress, "stage2", len(sigmas) - 1, segment.index),
                        where=f"Stage II, segment {segment.index}",
                        renoise=draw if config.sampling.rule == "renoise" else None,
                    )
                    target = window[:, :, len(segment.given) :]
                if store is not None:
                    store.save_segment(segment.index, target)
            clean.update(zip(segment.target, torch.split(target, 1, dim=2), strict=True))
            yield SegmentLatents(segment, target)
            first_needed = segment.target[-1] + 1 - config.context_size
            clean = {i: frame for i, frame in clean.items() if i == 0 or i >= first_needed}
            reference.forget_before(first_needed)

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

        def predict(embeds: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
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


def _gather(clean: Mapping[int, Tensor], frames: Sequence[int], like: Tensor) -> Tensor:
    """Clean latents ``[1, C, G, h, w]`` of some frames, none where the segment makes its anchor."""
    return torch.cat([like[:, :, :0], *(clean[frame] for frame in frames)], dim=2)


def _noise_source(like: Tensor, segment: Segment, seed: int) -> Callable[..., Tensor]:
    """``step -> noise`` of a segment's target frames."""
    _, channels, _, height, width = like.shape
    size = (channels, height, width)
    return partial(draw_noise, size, segment.target, seed, like.device, stage="stage2")
