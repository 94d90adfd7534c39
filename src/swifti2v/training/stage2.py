"""Training of the nano model's Stage II: segments of clips from their small versions."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from swifti2v.models.codec import BlockCodec
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.sampling import plan_sigmas
from swifti2v.segments import Segment
from swifti2v.training.data import Frames, degrade, draw_crops, draw_segment
from swifti2v.training.initialization import FitSample, fit_output_layer, initialize_stage2
from swifti2v.training.nano_codec import encode_window, measure_residual, weigh_channels
from swifti2v.training.nano_config import NanoConfig
from swifti2v.training.objectives import segment_flow_loss
from swifti2v.training.optimization import OnStep, Randomness, has_checkpoint, optimize
from swifti2v.training.stage1 import transformer_config


class Stage2Objective:
    """Draws a batch of windows and gives the transformer's loss on their targets.

    Args:
        transformer: To train.
        codec: With statistics.
        clips: ``[T, H, W, 3]`` uint8 each.
        config: Settings.
        randomness: Source of all draws.
    """

    def __init__(
        self,
        transformer: SegmentTransformer3DModel,
        codec: BlockCodec,
        clips: Sequence[Frames],
        config: NanoConfig,
        randomness: Randomness,
    ) -> None:
        self.transformer, self.codec, self.clips = transformer, codec, clips
        self.config, self.randomness = config, randomness
        self.device = transformer.device
        self.sigmas = torch.tensor(plan_sigmas(config.num_inference_steps)[:-1], device=self.device)
        limit = config.stage2.channel_weight_limit
        self.channel_weight = weigh_channels(codec, limit).to(self.device)
        self.text = torch.zeros(1, 1, config.text.width, device=self.device)

    def __call__(self) -> Tensor:
        """Mean loss of a batch drawn anew."""
        latents, reference, segment = self.draw_batch()
        sigma = self.randomness.choose(self.sigmas, len(latents))
        noise = self.randomness.normal_like(latents)
        return segment_flow_loss(
            self.predict,
            latents,
            reference,
            segment,
            sigma,
            noise,
            parameterization="reference_residual",
            channel_weight=self.channel_weight,
        ).mean()

    def predict(self, hidden_states: Tensor, sigma: Tensor) -> Tensor:
        """The transformer without a prompt."""
        text = self.text.expand(len(hidden_states), -1, -1)
        output: Tensor = self.transformer(hidden_states, sigma, text)
        return output

    def draw_batch(self) -> tuple[Tensor, Tensor, Segment]:
        """Latents and reference ``[B, C, N, h, w]`` of one window, and its segment from 0."""
        own, rng = self.config.stage2, self.randomness.numpy
        lengths = [self.config.num_latent_frames, (own.long_num_frames - 1) // 4 + 1]
        is_long_there = max(len(clip) for clip in self.clips) >= own.long_num_frames
        share = own.long_share if is_long_there else 0.0
        segment, num_latent_frames = draw_segment(lengths, (1 - share, share), rng)
        num_frames = 4 * (num_latent_frames - 1) + 1
        video = draw_crops(self.clips, segment, num_frames, own.crop, own.batch_size, rng)
        video = video.to(self.device)
        reference = degrade(video, self.config.downscale)
        num_given = len(segment.window) - len(segment.target)
        local = replace(
            segment,
            context=tuple(range(1, num_given)),
            target=tuple(range(num_given, len(segment.window))),
        )
        return encode_window(self.codec, video), encode_window(self.codec, reference), local

    @torch.no_grad()
    def draw_fit_sample(self) -> FitSample:
        """A batch for the ridge regression of the output layer, unweighted."""
        latents, reference, segment = self.draw_batch()
        sigma = self.randomness.choose(self.sigmas, len(latents))
        noise = self.randomness.normal_like(latents)
        target = list(segment.target)
        sigma_per_frame = torch.zeros(latents.shape[0], latents.shape[2], device=self.device)
        sigma_per_frame[:, target] = sigma[:, None]
        level = sigma_per_frame[:, None, :, None, None]
        noisy = (1 - level) * latents + level * noise
        residual = (latents - reference)[:, :, target]
        inputs = torch.cat([noisy, reference], dim=1)
        return FitSample(lambda: self.predict(inputs, sigma_per_frame), residual)


def make_stage2_transformer(config: NanoConfig) -> SegmentTransformer3DModel:
    """A randomly initialised Stage II transformer: 384 latent and 384 reference channels."""
    common = transformer_config(config.stage2.size, config.text.width)
    model: SegmentTransformer3DModel = SegmentTransformer3DModel(**common, in_channels=768)
    return model


def train_stage2(
    config: NanoConfig,
    clips: Sequence[Frames],
    codec: BlockCodec,
    directory: Path,
    device: torch.device,
    on_step: OnStep | None = None,
) -> SegmentTransformer3DModel:
    """Train Stage II.

    Args:
        config: Settings.
        clips: ``[T, H, W, 3]`` uint8 each, of the output's size.
        codec: With statistics.
        directory: For checkpoint and metrics, see ``optimize``; a checkpoint is continued.
        device: Where to train.
        on_step: Called after each step.

    Returns:
        The transformer with averaged weights, in eval mode.
    """
    own = config.stage2
    randomness = Randomness(own.seed)
    is_new = not has_checkpoint(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(own.seed)
        transformer = make_stage2_transformer(config)
        if is_new:
            sigmas = torch.tensor(plan_sigmas(config.num_inference_steps)[:-1])
            initialize_stage2(transformer, measure_residual(clips, config.downscale), sigmas)
    nn.Module.to(transformer, device)
    objective = Stage2Objective(transformer, codec, clips, config, randomness)
    if is_new:
        samples = (objective.draw_fit_sample() for _ in range(own.num_fit_batches))
        fit_output_layer(transformer, samples)
    optimize(transformer, objective, own.optimization, randomness, directory, on_step)
    return transformer
