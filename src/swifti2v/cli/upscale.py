"""``swifti2v upscale``: a clip to a larger one, with Stage II alone and without a photo."""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from swifti2v.cli.failures import exit_codes
from swifti2v.cli.flags import COMMAND_LINE
from swifti2v.cli.options import ClipOptions, Fit, NoAudio, takes_options
from swifti2v.cli.weights import require_weights
from swifti2v.jobs.layers import Layer
from swifti2v.jobs.request import Command


class Attention(StrEnum):
    """Kinds of ``swifti2v.config.AttentionConfig``."""

    FULL = "full"
    GCLF = "gclf"


class Windows(StrEnum):
    """Frames that are denoised at a time."""

    CSG = "csg"
    NONE = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class UpscaleOptions(ClipOptions):
    """Options of ``upscale``."""

    command: ClassVar[Command] = "upscale"

    video: Annotated[
        Path | None,
        typer.Argument(
            help="Clip to make larger; every frame is used. Needed without --like.",
            show_default=False,
        ),
    ] = None
    prompt: Annotated[
        str | None,
        typer.Option("-p", "--prompt", help="Text that says what the clip shows (default empty)."),
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:STRENGTH]",
            help="LoRA for high resolution to merge. May be given more than once.",
        ),
    ] = None
    fit: Annotated[Fit | None, typer.Option(hidden=True)] = None
    background: Annotated[
        str | None,
        typer.Option(
            metavar="COLOUR", help="Colour behind a see-through clip: white, #fff or #ffffff."
        ),
    ] = None
    strength: Annotated[
        float | None,
        typer.Option(help="Part of the schedule for all steps, in (0, 1]; higher invents more."),
    ] = None
    attention: Annotated[
        Attention | None,
        typer.Option(
            help="Attention: gclf is fine nearby, coarse everywhere, for sizes beyond the model's."
        ),
    ] = None
    no_audio: NoAudio = False
    windows: Annotated[
        Windows,
        typer.Option(help="Windows: csg streams segments, none denoises the whole clip at once."),
    ] = Windows.CSG

    def layers(self) -> list[Layer]:
        """Return the layers of ``ClipOptions`` and those of this command."""
        stage2: dict[str, Any] = {}
        if self.strength is not None:
            stage2["sampling"] = {"strength": self.strength}
        if self.attention is not None:
            stage2["attention"] = {"kind": self.attention.value}
        if self.windows == Windows.NONE:
            stage2["segment_size"] = None
        # Not super(): a dataclass with slots is another class than the one this was written in.
        return [*ClipOptions.layers(self), (COMMAND_LINE, {"stage2": stage2})]


@takes_options(UpscaleOptions)
def upscale(options: UpscaleOptions) -> None:
    """Make a clip larger with Stage II: resize it, noise it to a strength and denoise it.

    By default 4 times larger (the model's Stage I factor); a clip of another aspect than
    --height and --width is cropped. With a photo of the first frame in full detail use refine.
    """
    with exit_codes(debug=options.debug):
        if options.fit is not None:
            raise typer.BadParameter(
                "only photos are padded; a clip of another aspect is cropped",
                param_hint="--fit",
            )
        if options.windows == Windows.NONE and options.segment_size is not None:
            raise typer.BadParameter(
                "without windows there are no segments; leave one of the two out",
                param_hint="--segment-size",
            )
        request = replace(options.to_request(None, options.video), no_audio=options.no_audio)
        require_weights(options)
        from swifti2v.cli.run import run_command  # torch and diffusers take seconds to import

        run_command(request, dry_run=options.dry_run, as_json=options.as_json)
