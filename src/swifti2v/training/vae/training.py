"""Training of a video VAE on its own, from settings to files."""

from dataclasses import field
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn

from swifti2v.config import settings
from swifti2v.errors import ConfigError
from swifti2v.models.loading.architectures import Architecture, find_architecture
from swifti2v.models.loading.sources import ComponentSource
from swifti2v.training.costs.plan import SamplePlan, TrainingPlan, crop_shape
from swifti2v.training.data.buckets import format_bucket
from swifti2v.training.data.phases import ClipsPhase, find_clips
from swifti2v.training.data.record import require_same_clips
from swifti2v.training.engine.memory import count_parameters
from swifti2v.training.engine.run_config import RunConfig
from swifti2v.training.engine.session import Session, save_trained, train_task
from swifti2v.training.vae.task import VaeObjective, VaeTask

NANO_VAE = {
    "base_dim": 32,
    "z_dim": 32,
    "dim_mult": [1, 2, 3],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "is_residual": False,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
"""A small one of the Wan2.2 kind: patchified, causal, 8 pixels a latent cell."""


@settings
class VaeTrainingConfig:
    """Settings of ``swifti2v train vae``."""

    vae: dict[str, Any] = field(default_factory=lambda: dict(NANO_VAE))
    """Configuration of diffusers' ``AutoencoderKLWan``."""
    model: str | None = None
    """Directory of a VAE to go on from, in diffusers' layout; none starts from random weights."""
    crop: int | None = 128
    """Side of a random square to train on."""
    num_procedural_clips: int = 7
    """Clips of each bucket, where no manifest is given."""
    objective: VaeObjective = field(default_factory=VaeObjective)
    """The loss."""
    run: RunConfig = field(default_factory=RunConfig)
    """Batch, precision, checkpoints."""
    phases: tuple[ClipsPhase, ...] = (ClipsPhase(steps=1000),)
    """The curriculum."""


def train_vae(config: VaeTrainingConfig, session: Session) -> Path:
    """Train a VAE and write the averaged weights; returns its directory, in diffusers' layout.

    Raises:
        ConfigError: The VAE's configuration is invalid.
    """
    torch.manual_seed(config.run.seed)
    vae = make_vae(config).requires_grad_(True)
    nn.Module.to(vae, session.ranks.device)
    clips = find_clips(
        config.phases, config.num_procedural_clips, config.run, session.directory, session.ranks
    )
    require_same_clips(clips, session)
    task = VaeTask(vae, clips, config.crop, config.objective)
    train_task(task, config.run, config.phases, session)
    return save_trained(AutoencoderKLWan, vae, "vae", session)


def make_vae(config: VaeTrainingConfig) -> AutoencoderKLWan:
    """Make the VAE from which training starts.

    Raises:
        ConfigError: The configuration is invalid, or there is no such model.
    """
    kind: Any = AutoencoderKLWan
    try:
        vae = kind(**config.vae) if config.model is None else kind.from_pretrained(config.model)
    except (TypeError, ValueError, OSError) as error:
        raise ConfigError(f"vae: {error}; see diffusers' AutoencoderKLWan") from None
    made: AutoencoderKLWan = vae
    return made


def plan_vae(config: VaeTrainingConfig) -> TrainingPlan:
    """Predict the training of a VAE, without its activations.

    Raises:
        LoadingError: There is no such model.
    """
    architecture = Architecture(AutoencoderKLWan, config.vae)
    if config.model is not None:
        architecture = find_architecture("vae", ComponentSource(source=config.model), Path())
    vae = architecture.make_empty("vae").requires_grad_(True)
    samples = []
    for phase in config.phases:
        shapes = [crop_shape(shape, config.crop) for shape in phase.data.rules.shapes]
        largest = max(shapes, key=prod)
        samples.append(SamplePlan(phase=phase.name, what=format_bucket(largest), tokens=0))
    return TrainingPlan(
        part="vae",
        parameters=count_parameters(vae),
        run=config.run,
        optimizers=[phase.optimizer for phase in config.phases],
        samples=samples,
    )
