"""All that decides a clip, as it is stored in the video and in the work dir."""

import json
import re
from pathlib import Path
from typing import Any, Literal

from PIL import ImageColor

from swifti2v.config import GenerationConfig, parse_config, settings, to_dict
from swifti2v.errors import InputError
from swifti2v.jobs.request import Command
from swifti2v.media import read_metadata
from swifti2v.media.encoder import CodecName
from swifti2v.models.loading.sources import INDEX_NAME, WHOLE, LoraSource, split_variant
from swifti2v.storage import encode_text, hash_file


@settings
class FileRecord:
    """An input file."""

    path: str
    """Path as the user gave it."""
    sha256: str
    """SHA-256 of its bytes."""

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Record the file as it is now."""
        return cls(path=str(path), sha256=hash_file(path))


@settings
class VideoSettings:
    """Compression of the frames."""

    codec: CodecName = "h264"
    """Video codec."""
    crf: int | None = None
    """Quality; None takes the codec's usual one."""
    ten_bit: bool = False
    """10 bits a colour instead of 8."""
    no_audio: bool = False
    """No sound, even if the user's own clip has some."""


@settings
class RunSettings:
    """A whole run: repeated with the same software, it gives the same frames."""

    version: str
    """Version of this package."""
    sampling_version: int = 1
    """See ``swifti2v.sampling.SAMPLING_VERSION``; 1 for files that do not state it."""
    command: Command
    """Command that made the clip: from a photo, a small clip and a photo, or a clip alone."""
    model: str
    """See ``SwiftI2VPipeline.from_pretrained``."""
    prompt: str
    """Text that says what happens in the video."""
    seed: int
    """Seed of the initial noise."""
    image: FileRecord
    """The photo; for ``upscale`` the clip, whose first frame takes its place."""
    motion: FileRecord | None
    """The user's own motion reference, for ``refine`` and ``upscale``."""
    fit: Literal["crop", "pad"]
    """Way in which the photo was fitted to the size."""
    background: str | None
    """``#rrggbb`` behind a see-through photo."""
    loras: tuple[LoraSource, ...]
    """LoRAs in the order of their merge."""
    truncate_prompt: bool
    """Whether a prompt over the limit was cut."""
    device: str
    """``cpu`` or ``cuda``."""
    dtype: str
    """Number type of the weights, such as ``float32``."""
    video: VideoSettings
    """Compression of the frames."""
    config: GenerationConfig
    """All other settings."""
    model_sha256: str | None = None
    """SHA-256 of the preset or the index, where the model is a file or a folder of the user."""
    preview_decoder: FileRecord | None = None
    """Light decoder that made the frames; None if the model's VAE did."""

    @property
    def prompts(self) -> list[str]:
        """The prompt, and those that take over from it."""
        return [self.prompt, *(text for _, text in self.config.later_prompts)]

    def plan(self) -> dict[str, Any]:
        """Return all that decides the latents: not file names, decoder and compression."""
        plan = to_dict(self)
        del plan["video"], plan["preview_decoder"]
        for record in (plan["image"], plan["motion"], *plan["loras"]):
            if record is not None:
                del record["path"]
        if self.model_sha256 is not None:
            variant = split_variant(plan.pop("model"))[1]
            plan |= {} if variant == WHOLE else {"variant": variant}
        return plan

    def to_json(self) -> str:
        """Return the settings as text for the comment of a video."""
        return encode_text(json.dumps(to_dict(self), ensure_ascii=False)).decode()


def read_settings(path: Path) -> RunSettings:
    """Read the settings a video was made with.

    Raises:
        MediaError: The file is missing or not a video.
        InputError: It carries no settings.
        ConfigError: The settings are those of another version, with other keys.
    """
    comment = read_metadata(path).get("comment", "")
    try:
        values = json.loads(comment)
    except ValueError:
        values = None
    if not isinstance(values, dict) or "command" not in values:
        raise InputError(
            f"{path} carries no settings: it was not made by swifti2v, or with --no-metadata"
        )
    return parse_config(RunSettings, values, str(path))


def hash_model(path: Path) -> str | None:
    """SHA-256 of the preset or the index of a model of the user's; None for any other name."""
    file = path / INDEX_NAME if path.is_dir() else path
    return hash_file(file) if file.is_file() else None


def parse_color(text: str) -> tuple[int, int, int]:
    """A colour as CSS writes it to red, green and blue, 0 to 255.

    Args:
        text: A name such as ``white``, or three or six hexadecimal digits, with or without ``#``.

    Raises:
        InputError: It is no colour, or a see-through one.
    """
    is_bare = re.fullmatch(r"[0-9A-Fa-f]{3}|[0-9A-Fa-f]{6}", text) is not None
    try:
        red, green, blue, *alpha = ImageColor.getrgb(f"#{text}" if is_bare else text.strip())
    except ValueError:
        alpha = [0]
    if alpha:
        raise InputError(
            f"--background {text!r} is not an opaque colour; give a CSS name or digits: white, "
            "#fff or #ffffff"
        )
    return red, green, blue


def format_color(color: tuple[int, int, int]) -> str:
    """``#rrggbb``; ``parse_color`` reads it back."""
    return f"#{bytes(color).hex()}"
