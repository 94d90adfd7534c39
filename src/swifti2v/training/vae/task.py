"""Training of a video VAE: reconstruction and a little Kullback-Leibler divergence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from swifti2v.config import settings
from swifti2v.errors import InputError
from swifti2v.training.data.clips import ManifestClips
from swifti2v.training.engine.draws import Draw
from swifti2v.training.objectives import reconstruction_loss
from swifti2v.training.stages.batches import VideoBatch
from swifti2v.training.stages.clip_sources import ClipCrops
from swifti2v.training.stages.validation import measure_round_trip


@settings
class VaeObjective:
    """Loss of a step."""

    error: Literal["squared", "absolute"] = "squared"
    """Error of a pixel."""
    kl_weight: float = 1e-6
    """Weight of the divergence from a standard normal, per latent value."""
    gradient_weight: float = 0.0
    """Weight of the error of differences between neighbouring pixels; sharpens late in training."""
    lpips_weight: float = 0.0
    """Weight of the perceptual distance LPIPS (needs ``lpips``)."""
    samples_latents: bool = True
    """Decode a draw from the posterior; its mean otherwise, which learns faster at first."""


class VaeTask:
    """A video VAE as the trainer sees it, on whole frames or random squares of clips.

    Raises:
        InputError: LPIPS is wanted and not installed.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        clips: tuple[ManifestClips, ...],
        crop: int | None,
        objective: VaeObjective,
    ) -> None:
        self.model, self.clips, self.crop, self.objective = vae, clips, crop, objective
        self.phase = 0
        self.lpips = _load_lpips() if objective.lpips_weight > 0 else None

    def enter_phase(self, phase: int) -> None:
        """Take the clips of a phase."""
        self.phase = phase

    def load_batch(self, draw: Draw) -> VideoBatch:
        """Crops of a micro-batch."""
        return ClipCrops(self.clips[self.phase], self.crop).load(draw)

    def loss(self, batch: VideoBatch, draw: Draw) -> Tensor:
        """``[b]``."""
        video = batch.video.to(self.model.device)
        posterior = self.model.encode(video).latent_dist
        latents = posterior.mean
        if self.objective.samples_latents:
            latents = latents + posterior.std * draw.noise_like(latents)
        decoded: Any = self.model.decode(latents)
        own = self.objective
        loss = reconstruction_loss(
            decoded.sample,
            video,
            posterior,
            error=own.error,
            kl_weight=own.kl_weight,
            gradient_weight=own.gradient_weight,
        )
        if self.lpips is not None:
            loss = loss + own.lpips_weight * self._perceptual(decoded.sample, video)
        return loss

    def validate(self, directory: Path) -> Mapping[str, float]:
        """PSNR of a round trip (dB) and a grid: truth above, decoded below."""
        return measure_round_trip(self.model, self.clips[0].examples(2), self.crop, directory)

    def _perceptual(self, decoded: Tensor, video: Tensor) -> Tensor:
        """``[b]`` mean over frames."""
        assert self.lpips is not None
        batch, _, num_frames, _, _ = video.shape
        pairs = (x.transpose(1, 2).flatten(0, 1) for x in (decoded, video))
        distance: Tensor = self.lpips.to(video.device)(*pairs)
        return distance.reshape(batch, num_frames).mean(dim=1)


def _load_lpips() -> Any:
    try:
        import lpips
    except ImportError:
        raise InputError(
            "lpips_weight is above 0, but lpips is not installed; pip install lpips"
        ) from None
    return lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)
