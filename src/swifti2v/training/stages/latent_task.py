"""Parts that all trainings of a transformer on latents share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.training.channel_weights import weigh_channels
from swifti2v.training.engine.draws import Draw
from swifti2v.training.stages.batches import EncodePrompts, FrameSource
from swifti2v.training.stages.noise_levels import NoiseLevelConfig, draw_step_sigmas

Validate = Callable[[Path], Mapping[str, float]]
"""See ``Task.validate``."""
SourceT = TypeVar("SourceT", bound=FrameSource[Any])


class LatentObjective(Protocol):
    """Settings that all losses on latents share."""

    @property
    def noise(self) -> NoiseLevelConfig:
        """Noise levels of the samples."""

    @property
    def channel_weight_limit(self) -> float | None:
        """Weigh a channel by its share of a pixel error, at most this; None weighs all alike."""


class LatentTask(Generic[SourceT]):
    """A ``Task`` without its model and its loss: frozen encoders, and samples of each phase.

    The VAE's statistics weigh the channels.
    """

    def __init__(
        self,
        vae: VideoVAE,
        sources: tuple[SourceT, ...],
        objective: LatentObjective,
        encode_prompts: EncodePrompts,
        validate: Validate | None = None,
    ) -> None:
        self.sources, self.phase, self.noise = sources, 0, objective.noise
        self.encode_prompts, self._validate = encode_prompts, validate
        limit = objective.channel_weight_limit
        self.channel_weight = None if limit is None else weigh_channels(vae, limit)

    @property
    def source(self) -> SourceT:
        """Samples of the phase."""
        return self.sources[self.phase]

    def enter_phase(self, phase: int) -> None:
        """Take the source of a phase."""
        self.phase = phase

    def load_batch(self, draw: Draw) -> Any:
        """Samples of a micro-batch, as the source of the phase gives them."""
        return self.source.load(draw)

    def draw_sigma(self, draw: Draw) -> Tensor:
        """``[b]`` noise levels of a micro-batch."""
        return draw_step_sigmas(self.noise, draw)

    def weigh(self, latents: Tensor) -> Tensor | None:
        """``[C]`` weights of the channels of latents, on their device; None weighs all alike."""
        return None if self.channel_weight is None else self.channel_weight.to(latents.device)

    def validate(self, directory: Path) -> Mapping[str, float]:
        """See ``Task``."""
        return {} if self._validate is None else self._validate(directory)
