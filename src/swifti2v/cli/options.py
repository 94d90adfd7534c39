"""Options declared once, as dataclasses: those of ``generate`` and ``refine``."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, get_type_hints

import typer

from swifti2v.cli.flags import COMMAND_LINE
from swifti2v.cli.loras import LORA_HELP, STAGED_LORA_FORM, parse_lora
from swifti2v.cli.models_dir import ModelsDir
from swifti2v.cli.processes import parse_processes
from swifti2v.cli.seeds import require_seed
from swifti2v.config import StageName, expand_shorthands, parse_override, read_config
from swifti2v.jobs.input_files import InputFiles
from swifti2v.jobs.layers import Layer
from swifti2v.jobs.paths import require_utf8
from swifti2v.jobs.request import ClipRequest, Command

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Fit(StrEnum):
    """Way to fit a photo of another aspect."""

    CROP = "crop"
    PAD = "pad"


class Codec(StrEnum):
    """Video codecs of ``swifti2v.media``."""

    H264 = "h264"
    H265 = "h265"
    AV1 = "av1"
    FFV1 = "ffv1"
    PNG = "png"


class Dtype(StrEnum):
    """Number type of the weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class RunDtype(StrEnum):
    """Number type in which a run computes; auto takes the faster one of bfloat16 and float32."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Placement(StrEnum):
    """Placement of the weights, see ``swifti2v.models.runtime.placement``."""

    RESIDENT = "resident"
    STREAMED = "streamed"
    OFFLOADED = "offloaded"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipOptions:
    """Options of all commands that make a clip."""

    command: ClassVar[Command]
    """Name of the command."""

    output: Annotated[
        Path, typer.Option("-o", "--output", help="Video to write; its suffix sets the container.")
    ]
    prompt: Annotated[
        str | None,
        typer.Option(
            "-p",
            "--prompt",
            help="Text that says what happens in the video. Needed without --like.",
        ),
    ] = None
    prompt_at: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FRAME:PROMPT",
            help="Prompt that takes over at a frame (4k + 1): 81:'zoom in'. May be given more than "
            "once.",
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            help="Model: nano, paper, a YAML preset, a directory or a Hub id (default nano); "
            "paper:fp8 takes smaller files."
        ),
    ] = None
    models_dir: ModelsDir = None
    num_frames: Annotated[
        int | None, typer.Option(help="Frames of the video: 4k + 1, such as 33 or 81.")
    ] = None
    height: Annotated[int | None, typer.Option(help="Output height in pixels.")] = None
    width: Annotated[int | None, typer.Option(help="Output width in pixels.")] = None
    seed: Annotated[
        int | None, typer.Option(help="Seed of the initial noise; -1, the default, draws one.")
    ] = None
    steps: Annotated[int | None, typer.Option(help="Denoising steps of each stage.")] = None
    segment_size: Annotated[
        int | None, typer.Option(help="Latent frames (4 video frames) of a segment.")
    ] = None
    context_size: Annotated[
        int | None, typer.Option(help="Finished latent frames that a segment sees.")
    ] = None
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance of both stages; 1 turns it off.")
    ] = None
    negative_prompt: Annotated[
        str | None,
        typer.Option(help="Text that says what to avoid; used where guidance is above 1."),
    ] = None
    fps: Annotated[
        float | None,
        typer.Option(help="Frames a second of the video; an input clip is resampled to them."),
    ] = None
    fit: Annotated[
        Fit | None, typer.Option(help="Way to fit a photo of another aspect (default crop).")
    ] = None
    background: Annotated[
        str | None,
        typer.Option(
            metavar="COLOUR",
            help="Colour behind a see-through photo or clip: white, #fff or #ffffff.",
        ),
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar=STAGED_LORA_FORM, help=f"LoRA to merge, by default into Stage I; {LORA_HELP}"
        ),
    ] = None
    config: Annotated[
        Path | None, typer.Option(help="YAML file with settings, or a name of 'configs list'.")
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="A.B=C", help="Setting by its path. May be given more than once."
        ),
    ] = None
    like: Annotated[
        Path | None, typer.Option(help="Video made by this program whose settings are repeated.")
    ] = None
    codec: Annotated[
        Codec | None,
        typer.Option(
            help="Codec of the video (default h264); ffv1 is lossless, for .mkv; png writes a folder."
        ),
    ] = None
    crf: Annotated[
        int | None,
        typer.Option(
            help="Quality of the compression; lower looks better and makes a larger file."
        ),
    ] = None
    ten_bit: Annotated[bool, typer.Option("--ten-bit", help="Store 10 bits a colour.")] = False
    truncate_prompt: Annotated[
        bool, typer.Option("--truncate-prompt", help="Cut a prompt that is over the limit.")
    ] = False
    contact_sheet: Annotated[
        Path | None, typer.Option(help="PNG to write with frames of the clip.")
    ] = None
    device: Annotated[str | None, typer.Option(help="Device: cpu, cuda, cuda:1, ...")] = None
    dtype: Annotated[
        RunDtype | None,
        typer.Option(
            help="Number type of the weights (default bfloat16 on a GPU, float32 on a CPU); auto "
            "measures a CPU once and takes bfloat16 where that is faster."
        ),
    ] = None
    placement: Annotated[
        Placement | None,
        typer.Option(
            help="Placement: streamed keeps the weights in host memory, offloaded also the VAE's "
            "history: less GPU memory, slower (default resident)."
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="auto|GB",
            help="Device memory to use: choose the fastest placement and VAE tiles that fit, or "
            "refuse before loading. Keeps --placement and stage2.vae_tile if they are given.",
        ),
    ] = None
    context_parallel: Annotated[
        str | None,
        typer.Option(
            metavar="ulysses:N",
            help="Share every model call between N processes, each with a GPU of its own; this command "
            "starts them.",
        ),
    ] = None
    preview_decoder: Annotated[
        Path | None,
        typer.Option(
            help="Light decoder (TAEHV or LightVAE file) instead of the model's VAE: a fast look "
            "with less detail. With --work-dir, --resume without it decodes the same latents fully."
        ),
    ] = None
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Directory that keeps finished segments, to continue after a stop."),
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the work dir.")] = (
        False
    )
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the inputs, print the settings and stop.")
    ] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")
    ] = False
    no_metadata: Annotated[
        bool,
        typer.Option(
            "--no-metadata", help="Do not store the settings in the video (--like needs them)."
        ),
    ] = False
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show tracebacks.")] = False

    def to_request(self, image: Path | None, motion: Path | None = None) -> ClipRequest:
        """Make the request from the options and the inputs of the command.

        Raises:
            typer.BadParameter: An option is missing, or two contradict each other.
            SwiftI2VError: A file name, a LoRA or a setting that cannot be read.
        """
        self._require_inputs(image, motion)
        require_seed(self.seed)
        for flag, path in (
            ("--model", self.model),
            ("--preview-decoder", self.preview_decoder),
            ("--work-dir", self.work_dir),
            *(("--lora", text) for text in self.lora or []),
        ):
            if path is not None:
                require_utf8(path, flag)
        default: StageName = "stage2" if self.command == "upscale" else "stage1"
        return ClipRequest(
            command=self.command,
            output=self.output,
            image=image,
            motion=motion,
            prompt=self.prompt,
            model=self.model,
            seed=self.seed,
            layers=tuple(self.layers()),
            fit=self.fit.value if self.fit else None,
            background=self.background,
            loras=tuple(parse_lora(text, default) for text in self.lora or []),
            truncate_prompt=self.truncate_prompt,
            like=self.like,
            codec=self.codec.value if self.codec else None,
            crf=self.crf,
            ten_bit=self.ten_bit,
            contact_sheet=self.contact_sheet,
            stores_settings=not self.no_metadata,
            device=self.device,
            dtype=self.dtype.value if self.dtype else None,
            placement=self.placement.value if self.placement else None,
            memory=self.memory,
            num_processes=parse_processes(self.context_parallel),
            preview_decoder=self.preview_decoder,
            work_dir=self.work_dir,
            resume=self.resume,
        )

    def layers(self) -> list[Layer]:
        """Return the requested settings, weakest first.

        Raises:
            ConfigError: The config file cannot be read, or a ``--set`` is not ``a.b=c``.
        """
        config = self.config
        if config is not None and self.resume:
            config = InputFiles(self.like, self.work_dir).settings_file(config)
        flags = {
            "num_frames": self.num_frames,
            "height": self.height,
            "width": self.width,
            "fps": self.fps,
            "negative_prompt": self.negative_prompt,
            "later_prompts": [parse_later_prompt(text) for text in self.prompt_at or []] or None,
            "segment_size": self.segment_size,
            "context_size": self.context_size,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
        }
        return [*read_layers(config, self.set_), (COMMAND_LINE, expand_shorthands(flags))]

    def _require_inputs(self, image: Path | None, motion: Path | None) -> None:
        if self.resume and self.work_dir is None:
            raise typer.BadParameter("--resume needs --work-dir", param_hint="--resume")
        if self.like is not None:
            return
        if motion is None and self.command != "generate":
            raise typer.BadParameter("give a clip, or --like", param_hint="CLIP")
        if self.command != "upscale":
            if image is None:
                raise typer.BadParameter("give a photo, or --like", param_hint="IMAGE")
            if self.prompt is None:
                raise typer.BadParameter("give a prompt, or --like", param_hint="--prompt")


def parse_later_prompt(text: str) -> tuple[int, str]:
    """Read the frame and the prompt of ``FRAME:PROMPT``.

    Raises:
        BadParameter: There is no frame.
    """
    frame, colon, prompt = text.partition(":")
    if not colon or not frame.strip().isdecimal():
        raise typer.BadParameter(
            f"{text!r} is not FRAME:PROMPT, such as 81:'zoom in'", param_hint="--prompt-at"
        )
    return int(frame), prompt.strip()


def read_layers(config: Path | None, overrides: Sequence[str] | None) -> list[Layer]:
    """Read the settings of ``--config`` and of each ``--set``.

    Raises:
        ConfigError: The file cannot be read, or a text is not ``a.b=c``.
    """
    layers: list[Layer] = [(str(config), read_config(config))] if config else []
    return [*layers, *((f"--set {text}", parse_override(text)) for text in overrides or [])]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions(ClipOptions):
    """Options of ``generate``."""

    command: ClassVar[Command] = "generate"

    images: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[IMAGE]...",
            help="The photo. Needed without --like. Of several, each gives a video of its name, and "
            "--output is a folder.",
            show_default=False,
        ),
    ] = None


NoAudio = Annotated[bool, typer.Option(help="Leave out the clip's sound, which is copied else.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class RefineOptions(ClipOptions):
    """Options of ``refine``."""

    command: ClassVar[Command] = "refine"

    motion: Annotated[
        Path | None,
        typer.Argument(
            help="Low-resolution clip; every frame is used. Needed without --like.",
            show_default=False,
        ),
    ] = None
    image: Annotated[
        Path | None,
        typer.Option(
            help="Photo of the clip's first frame in full detail. Needed without  --like."
        ),
    ] = None
    no_audio: NoAudio = False


Options = TypeVar("Options", bound="DataclassInstance")


def takes_options(
    kind: type[Options],
) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Make a function of one options dataclass into a typer command with its fields."""

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            function(kind(**values))

        hints = get_type_hints(kind, include_extras=True)
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(
                    item.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if item.default is MISSING else item.default,
                    annotation=hints[item.name],
                )
                for item in fields(kind)
            ]
        )
        command.__annotations__ = {item.name: hints[item.name] for item in fields(kind)}
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate
