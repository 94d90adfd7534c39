"""Settings of the nano model's training: a part for each network, run one after the other."""

from dataclasses import field

from swifti2v.config import GenerationConfig, SamplingConfig, Stage1Config, Stage2Config, settings
from swifti2v.errors import ConfigError
from swifti2v.shapes import FrameSize, PixelShape, size_of_aspect
from swifti2v.training.engine.optimizers import OptimizerConfig
from swifti2v.training.engine.run_config import PhaseConfig, RunConfig
from swifti2v.training.nano.material_source import MixConfig
from swifti2v.training.nano.models import STAGE1_SCALE, STAGE2_SCALE, NanoSize
from swifti2v.training.stages.noise_levels import NoiseLevelConfig
from swifti2v.training.stages.stage1 import Stage1Objective
from swifti2v.training.stages.stage2 import Stage2Objective

INFERENCE_LEVELS = NoiseLevelConfig(distribution="inference", num_inference_steps=1)
"""Nano is trained at the noise level that it samples at, and nowhere else."""
_BETAS = (0.9, 0.97)


@settings
class TextEncoderConfig:
    """The byte-level text encoder, trained to tell camera motions apart."""

    width: int = 128
    """Features of a token; a multiple of 32."""
    num_layers: int = 3
    """Blocks."""
    max_tokens: int = 100
    """Bytes of a prompt in training, the end token included."""
    run: RunConfig = field(
        default_factory=lambda: RunConfig(batch_size=32, precision="float32", ema_decay=None)
    )
    """Seed, batch and checkpoints."""
    phases: tuple[PhaseConfig, ...] = (
        PhaseConfig(
            steps=3000,
            optimizer=OptimizerConfig(
                learning_rate=1.5e-3, decay="linear", betas=(0.9, 0.999), warmup_steps=50
            ),
        ),
    )
    """Length and learning rate of the training."""

    def __post_init__(self) -> None:
        if self.width < 32 or self.width % 32:
            raise ConfigError(f"text.width is {self.width}; it must be a multiple of 32")


@settings
class Stage1Phase(PhaseConfig):
    """A part of Stage I's curriculum."""

    scale: float = 1.0
    """Sides of the clips relative to those that Stage I is made for, at most 1. What a prompt asks for
    is learnt from small clips in a fraction of the time."""

    def __post_init__(self) -> None:
        PhaseConfig.__post_init__(self)
        if not 0.1 <= self.scale <= 1:
            raise ConfigError(f"phase {self.name}: scale is {self.scale}; it must be in [0.1, 1]")


@settings
class Stage1TrainingConfig:
    """Stage I: camera moves over pictures, from a prompt."""

    size: NanoSize = field(default_factory=NanoSize)
    objective: Stage1Objective = field(
        default_factory=lambda: Stage1Objective(
            noise=INFERENCE_LEVELS, error_of="clean", channel_weight_limit=8.0
        )
    )
    aspects: dict[float, float] = field(
        default_factory=lambda: {1.6667: 0.5, 1.3333: 0.14, 1.0: 0.08, 0.75: 0.14, 0.6: 0.14}
    )
    """Widths of the clips over their heights, with the part of the steps that take each; their area
    is about that of the model's default size."""
    num_frames: dict[int, float] = field(default_factory=lambda: {33: 0.7, 81: 0.2, 321: 0.1})
    """Frames of the clips, 4k + 1, with the part of the steps that take each."""
    num_drawn_frames: dict[int, float] = field(default_factory=lambda: {1: 0.7, 3: 0.25, 8: 0.05})
    """Latent frames drawn from a clip besides the photo's, with the part of the steps that draw so
    many; the chart tells their time. Short clips give all they have."""
    run: RunConfig = field(default_factory=lambda: RunConfig(seed=1, batch_size=64, ema_decay=0.99))
    """Seed, batch and checkpoints."""
    phases: tuple[Stage1Phase, ...] = (
        Stage1Phase(
            name="prompts",
            minutes=90,
            scale=0.25,
            optimizer=OptimizerConfig(
                learning_rate=1e-3,
                decay="cosine_tail",
                betas=_BETAS,
                warmup_steps=30,
                weight_decay=0.0,
            ),
        ),
        Stage1Phase(
            name="frames",
            minutes=60,
            optimizer=OptimizerConfig(
                learning_rate=3e-4, decay="cosine", betas=_BETAS, warmup_steps=10, weight_decay=0.0
            ),
        ),
    )
    """Length and learning rate of the training."""

    def __post_init__(self) -> None:
        if not self.num_drawn_frames or min(self.num_drawn_frames) < 1:
            raise ConfigError(
                f"stage1.num_drawn_frames is {self.num_drawn_frames}; draw at least one frame"
            )
        if not self.aspects or not all(0.1 <= aspect <= 10 for aspect in self.aspects):
            raise ConfigError(
                f"stage1.aspects is {self.aspects}; widths over heights must be in [0.1, 10]"
            )
        _require_lengths("stage1", self.num_frames)


def _require_lengths(where: str, num_frames: dict[int, float]) -> None:
    if not num_frames or any(n % 4 != 1 or n < 5 for n in num_frames):
        raise ConfigError(f"{where}: num_frames is {num_frames}; lengths must be 4k + 1, from 5")


@settings
class Stage2Phase(PhaseConfig):
    """A part of Stage II's curriculum."""

    mix: MixConfig = field(default_factory=MixConfig)
    """Shares of the kinds of samples."""
    num_frames: dict[int, float] = field(default_factory=lambda: {33: 0.85, 81: 0.15})
    """Frames of the clips whose segments are trained, 4k + 1, with the part of the steps."""

    def __post_init__(self) -> None:
        PhaseConfig.__post_init__(self)
        _require_lengths(f"phase {self.name}", self.num_frames)


@settings
class RedrawConfig:
    """Stage-transition samples made for Stage II: motions over pictures, redrawn by Stage I."""

    num_clips: int = 84
    """Clips; the moves of ``camera_motion.MOVES`` in turn."""
    sigma: tuple[float, float] = (0.6, 1.0)
    """Least and greatest noise level that Stage I starts from."""
    seed: int = 2
    """Seed of pictures, views and noise."""


@settings
class Stage2TrainingConfig:
    """Stage II: segments of clips from their small versions."""

    size: NanoSize = field(default_factory=lambda: NanoSize(num_heads=6))
    objective: Stage2Objective = field(
        default_factory=lambda: Stage2Objective(
            noise=INFERENCE_LEVELS, channel_weight_limit=2.0, error="root"
        )
    )
    crop: int = 128
    """Side of a crop in pixels, a multiple of 16."""
    redraw: RedrawConfig = field(default_factory=RedrawConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(batch_size=4, ema_decay=0.998))
    """Seed, batch and checkpoints."""
    phases: tuple[Stage2Phase, ...] = (
        Stage2Phase(
            name="clips",
            minutes=240,
            mix=MixConfig(clips=0.5, pictures=0.5, uncarried=0.5),
            optimizer=OptimizerConfig(
                learning_rate=5e-4, decay="cosine_tail", betas=_BETAS, warmup_steps=30
            ),
        ),
    )
    """Length, learning rate and data of the phases."""

    def __post_init__(self) -> None:
        if self.crop < 16 or self.crop % 16:
            raise ConfigError(f"stage2.crop is {self.crop}; it must be a multiple of 16")


@settings
class NanoConfig:
    """Everything that decides how the nano model is trained, apart from the data folder."""

    num_frames: int = 33
    """Frames of a clip, 4k + 1."""
    height: int = 384
    """Pixels of a clip and of the output."""
    width: int = 640
    """Pixels."""
    fps: int = 16
    """Frames a second."""
    downscale: int = 4
    """Output size divided by Stage I's."""
    max_text_length: int = 128
    """Tokens the transformers see."""
    num_inference_steps: int = 1
    """Denoising steps of the trained model."""
    held_out: tuple[str, ...] = ()
    """File names without suffix that are not trained on."""
    max_clip_frames: int | None = None
    """Most frames read of a clip; None reads all."""
    num_procedural_clips: int = 7
    """Clips made where there is no data folder."""
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    stage1: Stage1TrainingConfig = field(default_factory=Stage1TrainingConfig)
    stage2: Stage2TrainingConfig = field(default_factory=Stage2TrainingConfig)

    def __post_init__(self) -> None:
        # Whole tokens of either stage; Stage I's cover more of the output.
        low = STAGE1_SCALE._replace(space=STAGE1_SCALE.space * self.downscale)
        pixels = PixelShape(self.num_frames, self.height, self.width)
        pixels.require_fit(low)
        pixels.require_fit(STAGE2_SCALE)
        if self.stage2.crop > min(self.height, self.width):
            raise ConfigError(
                f"stage2.crop {self.stage2.crop} is larger than the clips, "
                f"{self.width}x{self.height}"
            )

    def low_sizes(self, scale: float = 1.0) -> dict[FrameSize, float]:
        """Sizes of Stage I's clips in pixels, with the part of the steps that take each."""
        token = STAGE1_SCALE.space * STAGE1_SCALE.patch
        area = round(self.height * self.width / self.downscale**2 * scale**2)
        sizes: dict[FrameSize, float] = {}
        for aspect, share in self.stage1.aspects.items():
            shape = FrameSize(1000, round(1000 * aspect))
            size = size_of_aspect(shape, token, area)
            sizes[size] = sizes.get(size, 0.0) + share
        return sizes

    def to_generation_config(self) -> GenerationConfig:
        """Default settings of the trained model."""
        sampling = SamplingConfig(
            num_inference_steps=self.num_inference_steps, parameterization="reference_residual"
        )
        return GenerationConfig(
            num_frames=self.num_frames,
            height=self.height,
            width=self.width,
            fps=self.fps,
            stage1=Stage1Config(
                downscale=self.downscale,
                condition="chart",
                motion="displacement",
                sampling=sampling,
            ),
            stage2=Stage2Config(reference_detail="carried", sampling=sampling),
        )
