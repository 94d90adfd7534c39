"""Settings of the nano model's training."""

from dataclasses import dataclass, field

from pydantic import ConfigDict

from swifti2v.config import GenerationConfig, SamplingConfig, Stage1Config, Stage2Config
from swifti2v.errors import ConfigError
from swifti2v.shapes import PixelShape, ScaleFactors
from swifti2v.training.optimization import OptimizationConfig

NANO_SCALE = ScaleFactors(time=4, space=8, patch=2)
"""Of ``BlockCodec`` and Stage II's patches."""
STAGE1_PATCH = 1
"""Side of Stage I's patches: its tokens are single latent cells."""


def _phases_optimization() -> OptimizationConfig:
    return OptimizationConfig(
        steps=400,
        learning_rate=2e-3,
        warmup_steps=30,
        decay="cosine",
        weight_decay=0.0,
        ema_decay=None,
    )


def _stage1_optimization() -> OptimizationConfig:
    return OptimizationConfig(minutes=24, learning_rate=5e-4, ema_decay=0.99)


def _stage2_optimization() -> OptimizationConfig:
    return OptimizationConfig(minutes=66, learning_rate=5e-4)


def _text_optimization() -> OptimizationConfig:
    return OptimizationConfig(
        steps=800, learning_rate=1.5e-3, decay="linear", betas=(0.9, 0.999), ema_decay=None
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSize:
    """Size of a transformer."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    num_heads: int = 4
    """Heads of 64 features; at least 2."""
    num_layers: int = 4
    """Blocks."""

    def __post_init__(self) -> None:
        if self.num_heads < 2 or self.num_layers < 1:
            raise ConfigError(
                f"a transformer of {self.num_heads} heads and {self.num_layers} layers is too small; "
                "give at least 2 and 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig:
    """The byte-level text encoder, trained to tell camera motions apart."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    width: int = 128
    """Features of a token; a multiple of 32."""
    num_layers: int = 3
    """Blocks."""
    batch_size: int = 32
    """Prompts a step."""
    max_tokens: int = 80
    """Bytes of a prompt in training, the end token included."""
    seed: int = 0
    """Of weights and prompts."""
    optimization: OptimizationConfig = field(default_factory=_text_optimization)

    def __post_init__(self) -> None:
        if self.width < 32 or self.width % 32:
            raise ConfigError(f"text.width is {self.width}; it must be a multiple of 32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage1TrainingConfig:
    """Stage I: camera motions over still pictures, from a prompt.

    A step takes one view of a picture and all seven motions over it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    size: TransformerSize = field(default_factory=TransformerSize)
    num_drawn_frames: int = 2
    """Latent frames drawn from a clip, besides the photo's; the chart tells their time."""
    drawn_share: float = 0.95
    """Part of the steps that draw frames; the others take whole clips."""
    channel_weight_limit: float = 8.0
    """Most that a channel counts, see ``swifti2v.training.nano_codec.weigh_channels``."""
    num_fit_batches: int = 10
    """Batches for the ridge regression of the output layer before training."""
    seed: int = 1
    """Of weights and batches."""
    phases: OptimizationConfig = field(default_factory=_phases_optimization)
    """Block 0 learns the phases of the camera's motion, before the rest."""
    optimization: OptimizationConfig = field(default_factory=_stage1_optimization)

    def __post_init__(self) -> None:
        if self.size.num_layers < 2:
            raise ConfigError(
                f"stage1.size.num_layers is {self.size.num_layers}; the motion's phases need at "
                "least 2"
            )
        if not 0 <= self.drawn_share <= 1 or self.num_fit_batches < 1:
            raise ConfigError(
                f"stage1.drawn_share {self.drawn_share} must be in [0, 1] and num_fit_batches "
                f"{self.num_fit_batches} at least 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage2TrainingConfig:
    """Stage II: segments of real clips from their small versions."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    size: TransformerSize = field(default_factory=TransformerSize)
    batch_size: int = 8
    """Crops a step, all of one segment."""
    crop: int = 128
    """Side of a crop in pixels, a multiple of 16."""
    long_num_frames: int = 81
    """A longer clip whose later segments are trained on too, 4k + 1."""
    long_share: float = 0.15
    """Part of the steps that take it."""
    num_fit_batches: int = 16
    """Batches for the ridge regression of the output layer before training."""
    channel_weight_limit: float = 2.0
    """Most that a channel counts."""
    seed: int = 0
    """Of weights and batches."""
    optimization: OptimizationConfig = field(default_factory=_stage2_optimization)

    def __post_init__(self) -> None:
        if self.crop < 16 or self.crop % 16:
            raise ConfigError(f"stage2.crop is {self.crop}; it must be a multiple of 16")
        if not 0 <= self.long_share <= 1 or self.long_num_frames % 4 != 1:
            raise ConfigError(
                f"stage2.long_share {self.long_share} must be in [0, 1] and long_num_frames "
                f"{self.long_num_frames} must be 4k + 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class NanoConfig:
    """Everything that decides how the nano model is trained, apart from the data folder."""

    __pydantic_config__ = ConfigDict(extra="forbid")

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
    num_inference_steps: int = 4
    """Training is on the noise levels of a run of so many steps only."""
    held_out: tuple[str, ...] = ()
    """File names without suffix that are not trained on."""
    max_clip_frames: int | None = None
    """Most frames read of a clip; none reads all."""
    num_procedural_clips: int = 7
    """Clips made where there is no data folder."""
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    stage1: Stage1TrainingConfig = field(default_factory=Stage1TrainingConfig)
    stage2: Stage2TrainingConfig = field(default_factory=Stage2TrainingConfig)

    def __post_init__(self) -> None:
        # Whole tokens of either stage; Stage I's cover more of the output.
        low = NANO_SCALE._replace(space=NANO_SCALE.space * self.downscale, patch=STAGE1_PATCH)
        pixels = PixelShape(self.num_frames, self.height, self.width)
        pixels.require_fit(low)
        pixels.require_fit(NANO_SCALE)
        if self.num_latent_frames <= self.stage1.num_drawn_frames:
            raise ConfigError(
                f"stage1.num_drawn_frames {self.stage1.num_drawn_frames} must be below the "
                f"{self.num_latent_frames} latent frames of a clip"
            )
        if self.stage2.crop > min(self.height, self.width):
            raise ConfigError(
                f"stage2.crop {self.stage2.crop} is larger than the clips, "
                f"{self.width}x{self.height}"
            )

    @property
    def num_latent_frames(self) -> int:
        """F of a clip."""
        return (self.num_frames - 1) // NANO_SCALE.time + 1

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
            stage1=Stage1Config(downscale=self.downscale, condition="chart", sampling=sampling),
            stage2=Stage2Config(sampling=sampling),
        )
