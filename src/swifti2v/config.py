"""Settings of a run as frozen dataclasses, read strictly from YAML and from dotted overrides."""

import dataclasses
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, dataclass_transform

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from swifti2v.errors import ConfigError
from swifti2v.schedules import plan_sigmas, select_sigmas
from swifti2v.segments import Piece, Segment, plan_pieces, plan_segments
from swifti2v.shapes import TIME_FACTOR
from swifti2v.shipped import find_config

Config = TypeVar("Config")
StageName = Literal["stage1", "stage2"]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def settings(kind: type[Config]) -> type[Config]:
    """Make a class a frozen dataclass of keywords that ``parse_config`` reads strictly.

    Slots need a new class, which ``super()`` without arguments does not find: a ``__post_init__``
    calls its base's by name, ``PhaseConfig.__post_init__(self)``.
    """
    kind.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True, slots=True)(kind)


def _require(name: str, value: float, *, low: float, high: float = float("inf")) -> None:
    if not low <= value <= high:
        limits = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise ConfigError(f"{name} is {value:g}; it must be {limits}")


def _require_whole(name: str, frame: int) -> None:
    """Refuse a number of frames, or of a frame, that does not lie at the end of a latent frame."""
    if frame < 1 or (frame - 1) % TIME_FACTOR:
        below = max(0, (frame - 1) // TIME_FACTOR) * TIME_FACTOR + 1
        raise ConfigError(
            f"{name} has {frame}, which is not {TIME_FACTOR}k + 1; the nearest are {below} and "
            f"{below + TIME_FACTOR}"
        )


@settings
class SamplingConfig:
    """Settings of the denoising in one stage."""

    num_inference_steps: int = 4
    """Model calls (in Stage II of each segment), also with a ``strength`` below 1; with ``sigmas``
    the number of these."""
    sigmas: tuple[float, ...] | None = None
    """Noise levels of the steps, falling, where weights were distilled for levels of their own;
    None plans them from the number of steps and ``shift``."""
    rule: Literal["euler", "renoise"] = "euler"
    """Way to the next noise level: ``euler`` follows the velocity; ``renoise`` takes the clean
    latents it points at and noises them anew, for weights distilled so."""
    shift: float = 5.0
    """Flow shift of the noise schedule; 1 means none."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 means none, as step-distilled weights need."""
    strength: float = 1.0
    """Part of the schedule over which the steps are spread, in (0, 1]; below 1 the run starts from
    the noised reference. With ``sigmas`` the highest of them that runs."""
    parameterization: Literal["velocity", "reference_residual"] = "velocity"
    """Quantity that the weights predict, see ``swifti2v.sampling.to_velocity``."""

    def __post_init__(self) -> None:
        _require("num_inference_steps", self.num_inference_steps, low=1, high=1000)
        _require("shift", self.shift, low=0.01)
        _require("guidance_scale", self.guidance_scale, low=0, high=1000)
        if not 0 < self.strength <= 1:
            raise ConfigError(f"strength is {self.strength:g}; it must be above 0 and at most 1")
        if self.sigmas is not None:
            self.plan_sigmas()
            if len(self.sigmas) != self.num_inference_steps:
                raise ConfigError(
                    f"num_inference_steps is {self.num_inference_steps}, but sigmas lists "
                    f"{len(self.sigmas)} noise levels: give {len(self.sigmas)} steps, or change "
                    "sigmas as well (null plans the levels from the number of steps)"
                )

    def plan_sigmas(self) -> list[float]:
        """Noise levels of a run, falling from the one that the start is noised to, to 0."""
        if self.sigmas is not None:
            return select_sigmas(self.sigmas, self.strength)
        return plan_sigmas(self.num_inference_steps, self.shift, self.strength)

    @property
    def num_calls(self) -> int:
        """Model calls of a run (in Stage II of each segment), guidance counted once."""
        return len(self.plan_sigmas()) - 1


@settings
class SpeedConfig:
    """Speed settings of a stage's transformer; each works alone, see ``bench speed``."""

    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = "auto"
    """Kernel of scaled dot-product attention that is tried first; auto is cuDNN's on Hopper and
    flash elsewhere."""
    compile: bool = False
    """Compile the blocks with ``torch.compile``, once for each shape; later runs reuse them."""
    linear: Literal["plain", "float8", "int8"] = "plain"
    """Matrix products of the blocks. ``plain`` computes in the type of the weights; ``float8`` has
    both sides in 8-bit floating point with a scale for each row (not in the first and the last
    block); ``int8`` only stores the weights in 8 bits."""
    residual: Literal["model", "float32"] = "model"
    """Number type of the tokens to which all blocks add. ``model`` is that of the weights, rounded
    after every addition, as in diffusers; ``float32`` is that of Wan's own code."""
    skips_given: bool = True
    """Skip given frames after the last attention of Stage II, where nothing reads them."""


@settings
class Stage1Config:
    """Stage I: the low-resolution motion reference."""

    downscale: int = 4
    """Output size divided by Stage I size: 2560x1408 gives 640x352."""
    condition: Literal["zeros", "chart"] = "zeros"
    """Frames after the image in the condition video. ``zeros`` are grey (Wan2.1); ``chart`` shows
    place, time and the random course of the motion in colours, see
    ``swifti2v.pipelines.course``."""
    motion: Literal["latents", "displacement"] = "latents"
    """Output of the transformer. ``displacement`` is the place of each point of each frame in the
    image, which is moved by it, and a residual to add, see ``swifti2v.pipelines.displacement``."""
    piece_frames: int | None = None
    """Frames, 4k + 1, that the model makes at a time: a longer clip is made in pieces, each of which
    goes on from the one before. None makes any length at once."""
    piece_overlap: int = 1
    """Frames, 4k + 1, of the piece before that a later piece is given; 1 with ``displacement``."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    """Speed settings of its transformer."""

    def __post_init__(self) -> None:
        _require("stage1.downscale", self.downscale, low=1, high=16)
        if self.motion == "displacement" and self.sampling.parameterization != "reference_residual":
            raise ConfigError(
                "stage1.motion is displacement, with which stage1.sampling.parameterization is "
                f"reference_residual, not {self.sampling.parameterization}"
            )
        _require_whole("stage1.piece_overlap", self.piece_overlap)
        if self.motion == "displacement" and self.piece_overlap != 1:
            raise ConfigError(
                f"stage1.piece_overlap is {self.piece_overlap}, but stage1.motion displacement goes "
                "on from one frame: leave out stage1.piece_overlap"
            )
        if self.piece_frames is not None:
            _require_whole("stage1.piece_frames", self.piece_frames)
            if self.piece_frames <= self.piece_overlap:
                raise ConfigError(
                    f"stage1.piece_frames is {self.piece_frames}; it must be above "
                    f"stage1.piece_overlap, {self.piece_overlap}"
                )


@settings
class AttentionConfig:
    """Attention between the tokens of a window; in time all frames attend to each other.

    Source:
        ViBe, arXiv:2603.23326 (global coarse, local fine attention).
    """

    kind: Literal["full", "gclf"] = "full"
    """``full`` attends to all tokens; ``gclf`` to nearby ones at full resolution and to the whole
    frame as coarse means."""
    window: tuple[int, int] = (22, 40)
    """Rows and columns of tokens that ``gclf`` sees at full resolution: the training size of the
    base model, 704x1280 pixels for Wan2.2-TI2V-5B. Moved inwards at the borders, never cut."""
    pool: int | None = 2
    """Side in tokens of the squares whose means are the coarse keys and values; 4 for larger
    targets. None leaves out coarse keys."""
    pooled_keys: Literal["after_rope", "before_rope"] = "after_rope"
    """Coarse key: mean of the rotated keys, or mean of the plain keys rotated to the middle of the
    square."""
    context: Literal["bidirectional", "read_only"] = "bidirectional"
    """Whether Stage II's given frames attend to the target as well, or to each other alone, as in
    models that read a cache of the past."""

    def __post_init__(self) -> None:
        if self.context == "read_only" and self.kind != "full":
            raise ConfigError(
                f"stage2.attention.context is read_only with kind {self.kind}; it goes with full"
            )
        for name, side in zip(("rows", "columns"), self.window, strict=True):
            _require(f"stage2.attention.window, {name}", side, low=1)
        if self.pool is not None:
            _require("stage2.attention.pool", self.pool, low=2, high=6)


@settings
class Stage2Config:
    """Stage II: segment-wise synthesis at the output size. The open points are fields here."""

    segment_size: int | None = 3
    """M, latent frames that a segment generates. None makes the whole clip in one segment."""
    context_size: int = 1
    """N, finished latent frames that a segment sees besides the anchor."""
    anchor: Literal["given", "generated"] = "given"
    """Origin of the first frame. ``given`` is the photo itself; ``generated`` makes it with the
    first segment, from a photo that is no sharper than the motion reference."""
    shows_anchor: bool = True
    """Begin every window with the first frame; otherwise only the windows that have it as context
    see it."""
    reference_start: Literal["photo", "motion"] = "photo"
    """First frame of the reference: the photo in full, or that of the motion reference."""
    reference_detail: Literal["none", "carried"] = "none"
    """Fine detail of the reference's other frames. ``carried`` moves the photo's detail along the
    motion of the motion reference, where that motion can be trusted."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Attention between the tokens of a window."""
    temporal_positions: Literal["renumbered", "absolute"] = "renumbered"
    """Rotary positions of a window: 0..len-1, or the frames' places in the clip."""
    context_reference: Literal["reference", "finished"] = "reference"
    """Reference channels of a context frame: the encoded reference, or the finished latents."""
    clean_sigma: Literal["zero", "target"] = "zero"
    """Noise level told to the model for anchor and context: 0, or that of the target."""
    upsampling: Literal["lanczos", "bicubic", "bilinear"] = "lanczos"
    """Kernel that brings the motion reference to the output size."""
    vae_tile: int | None = None
    """Longest side of a spatial VAE tile in latent cells, to save memory. None takes whole frames.
    Tiles change frames by rounding only."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    """Speed settings of its transformer."""

    def __post_init__(self) -> None:
        if self.segment_size is not None:
            _require("stage2.segment_size", self.segment_size, low=1)
        _require("stage2.context_size", self.context_size, low=0)
        if self.reference_detail == "carried":
            self._require_photo()
        if self.vae_tile is not None:
            _require("stage2.vae_tile", self.vae_tile, low=8)

    def plan(self, num_latent_frames: int) -> list[Segment]:
        """Segments of a clip of ``num_latent_frames``, the first frame included."""
        return plan_segments(
            num_latent_frames,
            self.segment_size,
            self.context_size,
            generates_anchor=self.anchor == "generated",
            shows_anchor=self.shows_anchor,
        )

    def _require_photo(self) -> None:
        for name, value, wanted in (
            ("reference_start", self.reference_start, "photo"),
            ("anchor", self.anchor, "given"),
        ):
            if value != wanted:
                raise ConfigError(
                    f"stage2.reference_detail is carried and stage2.{name} is {value}: there is no "
                    "photo whose detail could be carried; set stage2.reference_detail=none"
                )


@settings
class GenerationConfig:
    """Settings that decide the result of a run, apart from image, prompt, seed and weights."""

    num_frames: int = 81
    """Pixel frames T = 4k + 1, at least 5."""
    height: int = 1408
    """Output height in pixels."""
    width: int = 2560
    """Output width in pixels."""
    fps: int | float = 16
    """Frames a second of the output; 30000/1001 and its like are exact as 29.97002997."""
    negative_prompt: str = ""
    """Used only where ``guidance_scale`` is above 1."""
    later_prompts: tuple[tuple[int, str], ...] = ()
    """Prompts that take over from the first one, each with the frame, 4k + 1, from which it does."""
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config = field(default_factory=Stage2Config)

    def __post_init__(self) -> None:
        _require("num_frames", self.num_frames, low=5)
        _require("height", self.height, low=1)
        _require("width", self.width, low=1)
        _require("fps", self.fps, low=1, high=240)
        before = 0
        for frame, _ in self.later_prompts:
            _require_whole("later_prompts", frame)
            if frame <= before:
                raise ConfigError(f"later_prompts has frame {frame} after {before}; let them rise")
            if frame >= self.num_frames:
                raise ConfigError(
                    f"later_prompts has frame {frame}, but the last of {self.num_frames} frames is "
                    f"{self.num_frames - 1}; name an earlier one, or make the clip longer"
                )
            before = frame

    def plan_pieces(self) -> list[Piece]:
        """Pieces in which Stage I makes the clip: one, but for long clips and later prompts."""
        starts = [frame for frame, _ in self.later_prompts]
        own = self.stage1
        return plan_pieces(self.num_frames, own.piece_frames, own.piece_overlap, starts)


PROBLEMS = {
    "unexpected_keyword_argument": "there is no such setting",
    "missing": "it is missing",
    "dataclass_type": "it holds other settings; name one of them, such as a.b",
}
"""Words for some of pydantic's errors, for people who know settings, not classes."""


def parse_config(kind: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Build a config dataclass from nested mappings; every key must be known.

    Args:
        kind: The dataclass.
        values: Nested mappings, as read from YAML or JSON.
        source: Named in errors, such as a file's path.

    Raises:
        ConfigError: An unknown or missing key, a wrong type or a value out of range; the message
            names the source and the key.
    """
    try:
        config: Config = _reader(cast(Hashable, kind)).validate_python(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'])}: "
            f"{PROBLEMS.get(item['type'], item['msg'])}"
            for item in error.errors()
        )
        raise ConfigError(f"{source}: {problems}") from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return config


@cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    """The reader of a dataclass; to build it takes longer than to use it."""
    return TypeAdapter(kind)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a config dataclass; ``parse_config`` reads them back."""
    return dataclasses.asdict(config)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        ConfigError: The file is missing, not YAML or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a YAML file that exists") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, not {type(values).__name__}")
    return values


def read_config(path: Path) -> dict[str, Any]:
    """Read what ``--config`` names: a YAML file, or a configuration that ships.

    Raises:
        ConfigError: Neither, or see ``read_yaml``.
    """
    return read_yaml(find_config(path))


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings with those of ``changes`` on top; neither input is changed."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """Turn ``a.b=c`` into nested mappings; the value is read as YAML.

    Raises:
        ConfigError: No equals sign or an empty key.
    """
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {text!r} is not of the form a.b=c")
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {text!r}: the value is not YAML") from None
    return nest(key.strip(), nested)


def nest(path: str, value: Any) -> dict[str, Any]:
    """``a.b`` and a value to nested mappings."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


SHORTHANDS = {
    "num_inference_steps": (
        "stage1.sampling.num_inference_steps",
        "stage2.sampling.num_inference_steps",
    ),
    "guidance_scale": ("stage1.sampling.guidance_scale", "stage2.sampling.guidance_scale"),
    "segment_size": ("stage2.segment_size",),
    "context_size": ("stage2.context_size",),
    "strength": ("stage2.sampling.strength",),
}
"""Settings that a short name changes in a call and on the command line."""


def expand_shorthands(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Short names, fields and paths to nested mappings; a value of None is left out."""
    nested: dict[str, Any] = {}
    for name, value in changes.items():
        for path in SHORTHANDS.get(name, (name,)) if value is not None else ():
            nested = merge(nested, nest(path, value))
    return nested
