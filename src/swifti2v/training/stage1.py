"""Training of the nano model's Stage I: camera motions over still pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from swifti2v.models.codec import BlockCodec
from swifti2v.models.text import encode_prompt
from swifti2v.pipelines.stage1 import draw_chart
from swifti2v.sampling import plan_sigmas
from swifti2v.training.camera_motion import CAMERA_MOTIONS, draw_prompt, draw_view, render_motion
from swifti2v.training.data import Frames, pixel_frames
from swifti2v.training.initialization import initialize_stage1
from swifti2v.training.nano_codec import encode_window, weigh_channels
from swifti2v.training.nano_config import NanoConfig, TransformerSize
from swifti2v.training.optimization import OnStep, Randomness, has_checkpoint, optimize
from swifti2v.training.text_encoder import make_tokenizer


class Stage1Objective:
    """Draws a batch of camera motions and gives the transformer's loss on it.

    Args:
        transformer: To train.
        codec: With statistics.
        text_encoder: Frozen.
        stills: ``[H, W, 3]`` uint8 pictures.
        config: Settings.
        randomness: Source of all draws.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        codec: BlockCodec,
        text_encoder: UMT5EncoderModel,
        stills: Sequence[Frames],
        config: NanoConfig,
        randomness: Randomness,
    ) -> None:
        self.transformer: Any = transformer
        self.codec, self.text_encoder, self.stills = codec, text_encoder, stills
        self.config, self.randomness = config, randomness
        self.tokenizer = make_tokenizer()
        self.device = transformer.device
        self.size = (config.height // config.downscale, config.width // config.downscale)
        self.sigmas = torch.tensor(plan_sigmas(config.num_inference_steps)[:-1], device=self.device)
        limit = config.stage1.channel_weight_limit
        self.channel_weight = weigh_channels(codec, limit).to(self.device)
        self.chart = self._encode_chart()

    def __call__(self) -> Tensor:
        """Mean loss of a batch drawn anew."""
        frames, batch_size = self.draw_frames()
        rng = self.randomness.numpy
        motions = [CAMERA_MOTIONS[i] for i in rng.integers(len(CAMERA_MOTIONS), size=batch_size)]
        pixels = [p for frame in (0, *frames) for p in pixel_frames(frame)]
        times = [p / (self.config.num_frames - 1) for p in pixels]
        video = torch.stack(
            [
                render_motion(self._draw_still(), m, times, draw_view(rng), self.size)
                for m in motions
            ]
        )
        latents = encode_window(self.codec, video)
        embeds = encode_prompt(
            self.text_encoder,
            self.tokenizer,
            [draw_prompt(motion, rng) for motion in motions],
            self.config.max_text_length,
            truncate=True,
        )
        sigma = self.randomness.choose(self.sigmas, batch_size)
        noise = self.randomness.normal_like(latents)

        def predict(noisy: Tensor, sigma: Tensor) -> Tensor:
            condition = self.prepare_condition(latents[:, :, :1], frames)
            inputs = torch.cat([noisy, condition], dim=1)
            output: Tensor = self.transformer(inputs, sigma * 1000, embeds, return_dict=False)[0]
            return output

        return clip_residual_loss(predict, latents, sigma, noise, self.channel_weight).mean()

    def draw_frames(self) -> tuple[tuple[int, ...], int]:
        """Latent frames to train on besides the photo's, in order, and how many clips fit a step."""
        config, rng = self.config.stage1, self.randomness.numpy
        later = range(1, self.config.num_latent_frames)
        if rng.random() >= config.drawn_share:
            return tuple(later), config.whole_batch_size
        drawn = rng.permutation(later)[: config.num_drawn_frames]
        return tuple(sorted(drawn.tolist())), config.batch_size

    def prepare_condition(self, photo: Tensor, frames: Sequence[int]) -> Tensor:
        """Mask, photo and chart, as ``Stage1Pipeline.prepare_condition`` lays out a whole clip.

        Args:
            photo: ``[B, C, 1, h, w]`` latents.
            frames: Latent frames after the photo.

        Returns:
            ``[B, 4 + C, 1 + len(frames), h, w]``.
        """
        chart = self.chart[:, :, [frame - 1 for frame in frames]]
        condition = torch.cat([photo, chart.expand(len(photo), -1, -1, -1, -1)], dim=2)
        mask = torch.zeros_like(condition[:, :4])
        mask[:, :, 0] = 1
        return torch.cat([mask, condition], dim=1)

    def _draw_still(self) -> Tensor:
        rng = self.randomness.numpy
        still = torch.tensor(self.stills[int(rng.integers(len(self.stills)))], device=self.device)
        picture = still.permute(2, 0, 1).float() / 127.5 - 1
        return picture.flip(-1) if rng.random() < 0.5 else picture

    def _encode_chart(self) -> Tensor:
        """Latents ``[1, C, F - 1, h, w]`` of what follows the photo."""
        blank = torch.zeros(1, 3, 1, *self.size, device=self.device)
        last = self.config.num_latent_frames - 1
        charts = [draw_chart(blank, frame / last) for frame in range(1, last + 1)]
        video = torch.cat([blank, *(c.expand(-1, -1, 4, -1, -1) for c in charts)], dim=2)
        return encode_window(self.codec, video)[:, :, 1:]


def clip_residual_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    sigma: Tensor,
    noise: Tensor,
    channel_weight: Tensor,
) -> Tensor:
    """Error of the clean latents that a clip's model makes of the photo and its output.

    All noise levels count alike: unlike a velocity's, this error is not divided by sigma squared.

    Args:
        model: ``(noisy [B, C, F, h, w], sigma [B]) -> output``, the difference to a still clip.
        latents: ``[B, C, F, h, w]`` ground truth; frame 0 is the photo's.
        sigma: ``[B]`` noise levels.
        noise: ``[B, C, F, h, w]`` standard normal.
        channel_weight: ``[C]``.

    Returns:
        ``[B]``.
    """
    level = sigma[:, None, None, None, None]
    noisy = (1 - level) * latents + level * noise
    error = (latents[:, :, :1] + model(noisy, sigma) - latents).float().square()
    return (error * channel_weight[:, None, None, None]).flatten(1).mean(dim=1)


def make_stage1_transformer(size: TransformerSize, text_dim: int) -> WanTransformer3DModel:
    """A randomly initialised Stage I transformer: 384 latent, 4 mask, 384 condition channels."""
    kind: Any = WanTransformer3DModel
    model: WanTransformer3DModel = kind(**transformer_config(size, text_dim), in_channels=772)
    return model


def transformer_config(size: TransformerSize, text_dim: int) -> dict[str, Any]:
    """What both stages' transformers have in common."""
    return {
        "num_attention_heads": size.num_heads,
        "attention_head_dim": 64,
        "out_channels": 384,
        "text_dim": text_dim,
        "freq_dim": 64,
        "ffn_dim": 4 * 64 * size.num_heads,
        "num_layers": size.num_layers,
    }


def train_stage1(
    config: NanoConfig,
    stills: Sequence[Frames],
    codec: BlockCodec,
    text_encoder: UMT5EncoderModel,
    directory: Path,
    on_step: OnStep | None = None,
) -> WanTransformer3DModel:
    """Train Stage I, on the device of ``text_encoder``.

    Args:
        config: Settings.
        stills: ``[H, W, 3]`` uint8 pictures of the output's size.
        codec: With statistics.
        text_encoder: Frozen; not changed.
        directory: For checkpoint and metrics, see ``optimize``; a checkpoint is continued.
        on_step: Called after each step.

    Returns:
        The transformer with averaged weights, in eval mode.
    """
    own = config.stage1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(own.seed)
        transformer = make_stage1_transformer(own.size, config.text.width)
        if not has_checkpoint(directory):
            initialize_stage1(transformer, torch.tensor(codec.config["latents_std"]))
    nn.Module.to(transformer, text_encoder.device)
    randomness = Randomness(own.seed)
    objective = Stage1Objective(transformer, codec, text_encoder, stills, config, randomness)
    optimize(transformer, objective, own.optimization, randomness, directory, on_step)
    return transformer
