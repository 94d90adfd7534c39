"""Training of the nano model's Stage I: camera motions over still pictures."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from swifti2v.models.codec import BlockCodec
from swifti2v.training.data import Frames
from swifti2v.training.initialization import FitSample, fit_output_layer
from swifti2v.training.motion_phases import FeatureLayout, initialize_stage1
from swifti2v.training.nano_codec import weigh_channels
from swifti2v.training.nano_config import STAGE1_PATCH, NanoConfig, TransformerSize
from swifti2v.training.optimization import OnStep, Randomness, has_checkpoint, optimize
from swifti2v.training.stage1_batches import Stage1Batch, Stage1Batches


class PhasesObjective:
    """Draws a batch and gives the error of the phases that a transformer's block 0 writes.

    Args:
        transformer: To train; what follows block 0 does not count.
        layout: Tells the features that hold the phases.
        batches: What to draw from.
    """

    def __init__(
        self, transformer: WanTransformer3DModel, layout: FeatureLayout, batches: Stage1Batches
    ) -> None:
        self.transformer, self.layout, self.batches = transformer, layout, batches

    def __call__(self) -> Tensor:
        """Mean squared error of a batch drawn anew; its latents are pure noise."""
        batch = self.batches.draw(self.batches.draw_frames())
        tokens: list[Tensor] = []
        block: Any = self.transformer.blocks[0]
        hook = block.register_forward_hook(lambda _, __, output: tokens.append(output))
        try:
            predict(self.transformer, batch.noise, batch)
        finally:
            hook.remove()
        error = tokens[0][..., self.layout.phases] - self.batches.phases(batch.frames)
        return error.float().square().mean()


class Stage1Objective:
    """Draws a batch of camera motions and gives the transformer's loss on it.

    Args:
        transformer: To train.
        batches: What to draw from.
    """

    def __init__(self, transformer: WanTransformer3DModel, batches: Stage1Batches) -> None:
        self.transformer, self.batches = transformer, batches
        limit = batches.config.stage1.channel_weight_limit
        self.channel_weight = weigh_channels(batches.codec, limit).to(batches.device)

    def __call__(self) -> Tensor:
        """Mean loss of a batch drawn anew.

        It is that of the clean latents, so unlike a velocity's it is not divided by sigma squared:
        all noise levels count alike.
        """
        batches = self.batches
        is_drawn = batches.randomness.numpy.random() < batches.config.stage1.drawn_share
        batch = batches.draw(batches.draw_frames() if is_drawn else batches.all_frames())
        output = predict(self.transformer, batch.noisy_latents, batch)
        error = (output - _residual(batch)).float().square()
        return (error * self.channel_weight[:, None, None, None]).mean()

    def draw_fit_sample(self) -> FitSample:
        """Whole clips for the ridge regression of the output layer, unweighted."""
        batch = self.batches.draw(self.batches.all_frames())
        return FitSample(
            forward=lambda: predict(self.transformer, batch.noisy_latents, batch),
            residual=_residual(batch),
        )


def predict(transformer: WanTransformer3DModel, latents: Tensor, batch: Stage1Batch) -> Tensor:
    """Run a Stage I transformer.

    Args:
        transformer: Whose output is the difference of a clip to its photo.
        latents: ``[7, C, 1 + k, h, w]`` at the noise levels of ``batch``.
        batch: Condition, prompts and noise levels.

    Returns:
        ``[7, C, 1 + k, h, w]``.
    """
    run: Callable[..., tuple[Tensor]] = transformer
    inputs = torch.cat([latents, batch.condition], dim=1)
    return run(inputs, batch.sigma * 1000, batch.prompt_embeds, return_dict=False)[0]


def make_stage1_transformer(size: TransformerSize, text_dim: int) -> WanTransformer3DModel:
    """A randomly initialised Stage I transformer: 384 latent, 4 mask, 384 condition channels."""
    kind: Any = WanTransformer3DModel
    model: WanTransformer3DModel = kind(
        **transformer_config(size, text_dim),
        in_channels=772,
        patch_size=(1, STAGE1_PATCH, STAGE1_PATCH),
    )
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
    on_phases_step: OnStep | None = None,
    on_step: OnStep | None = None,
) -> WanTransformer3DModel:
    """Train Stage I, on the device of ``text_encoder``.

    Block 0 learns the phases first, a ridge regression then sets the output layer, and last all
    weights are trained.

    Args:
        config: Settings.
        stills: ``[H, W, 3]`` uint8 pictures of the output's size.
        codec: With statistics.
        text_encoder: Frozen; not changed.
        directory: For checkpoint and metrics, see ``optimize``, with those of the phases in
            ``phases/``; checkpoints are continued.
        on_phases_step: Called after each step of the phases.
        on_step: Called after each step of the whole.

    Returns:
        The transformer with averaged weights, in eval mode.
    """
    own = config.stage1
    randomness = Randomness(own.seed)
    batches = Stage1Batches(codec, text_encoder, stills, config, randomness)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(own.seed)
        transformer = make_stage1_transformer(own.size, config.text.width)
        layout = initialize_stage1(transformer)
    nn.Module.to(transformer, text_encoder.device)
    objective = Stage1Objective(transformer, batches)
    if not has_checkpoint(directory):
        train_phases(transformer, layout, batches, directory / "phases", on_phases_step)
        fit_output_layer(
            transformer, (objective.draw_fit_sample() for _ in range(own.num_fit_batches))
        )
    optimize(transformer, objective, own.optimization, randomness, directory, on_step)
    return transformer


def train_phases(
    transformer: WanTransformer3DModel,
    layout: FeatureLayout,
    batches: Stage1Batches,
    directory: Path,
    on_step: OnStep | None = None,
) -> None:
    """Teach block 0 to turn prompt, place and time into the phases of the camera's motion.

    Args:
        transformer: With the structured start; only its block 0 and text embedding are changed.
        layout: Of its features.
        batches: What to draw from.
        directory: For checkpoint and metrics, see ``optimize``; a checkpoint is continued.
        on_step: Called after each step.
    """
    config = batches.config
    # A transformer of this block alone spares the others' work.
    with torch.random.fork_rng(devices=[]):
        first = make_stage1_transformer(
            replace(config.stage1.size, num_layers=1), config.text.width
        )
    nn.Module.to(first, batches.device)
    state = transformer.state_dict()
    first.load_state_dict({name: state[name] for name in first.state_dict()})
    first.requires_grad_(False)
    for part in (first.blocks[0], first.condition_embedder.text_embedder):
        part.requires_grad_(True)
    objective = PhasesObjective(first, layout, batches)
    optimize(first, objective, config.stage1.phases, batches.randomness, directory, on_step)
    transformer.load_state_dict(first.state_dict(), strict=False)


def _residual(batch: Stage1Batch) -> Tensor:
    """What the transformer should return: the difference of the clip to its photo."""
    return batch.latents - batch.latents[:, :, :1]
