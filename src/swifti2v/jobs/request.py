"""The request for a clip, in plain fields; importing this does not import PyTorch."""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from swifti2v.jobs.layers import Layer
from swifti2v.models.loading.sources import LoraSource
from swifti2v.models.runtime.roles import Placement

if TYPE_CHECKING:
    from swifti2v.media.encoder import CodecName

Command = Literal["generate", "refine", "upscale"]
"""Command that makes a clip: from a photo, from a small clip and a photo, or from a clip alone."""
RANDOM = -1
"""Seed that asks for a random one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRequest:
    """Request for one clip; None takes the value of ``like``, the resumed run or the model."""

    command: Command
    """Command that makes the clip."""
    output: Path
    """Video to write."""
    image: Path | None = None
    """The photo."""
    motion: Path | None = None
    """The user's own clip, for ``refine`` and ``upscale``."""
    prompt: str | None = None
    """Text that says what happens in the video."""
    model: str | None = None
    """See ``SwiftI2VPipeline.from_pretrained``; by default nano."""
    seed: int | None = None
    """Seed of the initial noise; ``RANDOM`` draws one, and None draws one for a new clip."""
    layers: tuple[Layer, ...] = ()
    """Changed fields of ``GenerationConfig``; a later layer wins."""
    fit: Literal["crop", "pad"] | None = None
    """Way to fit a photo of another aspect."""
    background: str | None = None
    """Colour behind a see-through photo or clip, in CSS notation."""
    loras: tuple[LoraSource, ...] = ()
    """LoRAs to merge after the model's own."""
    truncate_prompt: bool = False
    """Whether to cut a prompt that is over the limit."""
    like: Path | None = None
    """Video whose settings are repeated."""
    codec: "CodecName | None" = None
    """Video codec."""
    crf: int | None = None
    """Quality of the compression; lower is better and larger."""
    ten_bit: bool = False
    """Whether to store 10 bits a colour."""
    no_audio: bool = False
    """Whether to leave out the sound of the user's own clip."""
    contact_sheet: Path | None = None
    """PNG to write with frames of the clip."""
    stores_settings: bool = True
    """Whether to store the settings in the video; ``like`` needs them."""
    device: str | None = None
    """``cpu``, ``cuda``, ``cuda:1``; by default the first GPU, else the CPU."""
    dtype: str | None = None
    """Number type of the weights; ``auto`` measures a CPU once."""
    placement: Placement | None = None
    """Placement of the weights."""
    memory: str | None = None
    """Device memory to use, ``auto`` or GB: a plan chooses placement and VAE tiles that are left
    open."""
    num_processes: int = 1
    """Processes, each with a GPU of its own, that share every model call of this clip."""
    preview_decoder: Path | None = None
    """Light decoder in place of the model's VAE."""
    work_dir: Path | None = None
    """Directory that keeps finished segments."""
    resume: bool = False
    """Whether to continue the run in the work dir."""


def draw_seed() -> int:
    """Draw a random seed of at most ten digits."""
    return secrets.randbelow(2**32)
