"""Settings of the training of Stage I and Stage II."""

from dataclasses import field
from typing import Any, ClassVar

from swifti2v.config import settings
from swifti2v.training.adapters import AdapterConfig
from swifti2v.training.data.phases import ClipsPhase
from swifti2v.training.engine.run_config import RunConfig
from swifti2v.training.stages.stage1 import Stage1Objective
from swifti2v.training.stages.stage2 import Stage2Objective
from swifti2v.training.stages.validation import ValidationConfig
from swifti2v.training.windows import WindowConfig


@settings
class CacheConfig:
    """Cache that is read instead of computing; ``swifti2v data cache`` makes it."""

    directory: str
    """Directory of embeddings, latents, facts about the clips, and procedural clips if used."""
    latents: bool = True
    """Read latents instead of frames; otherwise only the prompts' embeddings."""


@settings
class FineTuningConfig:
    """Settings that the trainings of both stages have."""

    model: str = "nano"
    """Model from which training starts, see ``SwiftI2VPipeline.from_pretrained``."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Changes to the model's settings: sizes, and the open points of Stage II."""
    num_procedural_clips: int = 7
    """Clips of each bucket, where no manifest is given."""
    cache: CacheConfig | None = None
    """None runs the frozen encoders in each step."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Measurements to make every ``run.validation_steps``."""
    run: RunConfig = field(default_factory=RunConfig)
    """Batch, precision, checkpoints."""
    phases: tuple[ClipsPhase, ...] = (ClipsPhase(steps=1000),)
    """The curriculum."""


@settings
class Stage1FineTuning(FineTuningConfig):
    """Settings of ``swifti2v train stage1``."""

    crop: ClassVar[int | None] = None
    windows: ClassVar[WindowConfig | None] = None
    adapter: AdapterConfig | None = field(default_factory=AdapterConfig)
    """A LoRA on the frozen transformer; none trains all weights."""
    objective: Stage1Objective = field(default_factory=Stage1Objective)
    """Noise levels and error."""


@settings
class Stage2FineTuning(FineTuningConfig):
    """Settings of ``swifti2v train stage2``."""

    adapter: ClassVar[AdapterConfig | None] = None
    crop: int | None = None
    """Side of a random square to train on instead of whole frames."""
    objective: Stage2Objective = field(default_factory=Stage2Objective)
    """Windows, noise levels and error."""

    @property
    def windows(self) -> WindowConfig:
        """Segments to train on."""
        return self.objective.windows
