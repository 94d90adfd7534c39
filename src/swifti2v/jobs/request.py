"""What someone asks for, in plain fields; importing it takes no PyTorch."""

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
"""What makes a clip: from a photo, from a small clip and a photo, or from a clip alone."""
RANDOM = -1
"""Seed that asks for a random one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRequest:
    """One clip; what is None is taken from ``like``, from the run to resume or from the model."""

    command: Command
    """What makes the clip."""
    output: Path
    """Video to write."""
    image: Path | None = None
    """The photo."""
    motion: Path | None = None
    """The user's own clip, for ``refine`` and ``upscale``."""
    prompt: str | None = None
    """What happens in the video."""
    model: str | None = None
    """See ``SwiftI2VPipeline.from_pretrained``; by default nano."""
    seed: int | None = None
    """Seed of the initial noise; ``RANDOM`` draws one, as does None for a new clip."""
    layers: tuple[Layer, ...] = ()
    """Changed fields of ``GenerationConfig``; a later layer wins."""
    fit: Literal["crop", "pad"] | None = None
    """How a photo of another aspect is fitted."""
    background: str | None = None
    """Colour behind a see-through photo or clip, as CSS writes it."""
    loras: tuple[LoraSource, ...] = ()
    """LoRAs to merge after the model's own."""
    truncate_prompt: bool = False
    """Cut a prompt that is over the limit."""
    like: Path | None = None
    """Video whose settings are repeated."""
    codec: "CodecName | None" = None
    """Video codec."""
    crf: int | None = None
    """Compression."""
    ten_bit: bool = False
    """Store 10 bits a colour."""
    contact_sheet: Path | None = None
    """PNG to write with frames of the clip."""
    stores_settings: bool = True
    """Store the settings in the video; ``like`` needs them."""
    device: str | None = None
    """``cpu``, ``cuda``, ``cuda:1``; by default the first GPU, else the CPU."""
    dtype: str | None = None
    """Number type of the weights; ``auto`` measures a CPU once."""
    placement: Placement | None = None
    """Where the weights live."""
    memory: str | None = None
    """Device memory to use, ``auto`` or GB: chooses placement and VAE tiles that are left open."""
    preview_decoder: Path | None = None
    """Light decoder in place of the model's VAE."""
    work_dir: Path | None = None
    """Where finished segments are kept."""
    resume: bool = False
    """Continue what is in the work dir."""


def draw_seed() -> int:
    """A random seed of at most ten digits."""
    return secrets.randbelow(2**32)
