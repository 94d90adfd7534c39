"""Settings of a server, which its processes hand on to each other as JSON."""

from pathlib import Path

from pydantic import TypeAdapter

from swifti2v.config import settings
from swifti2v.models.runtime.roles import Placement


@settings
class Limits:
    """Limits of a request, of the queue and of what is kept."""

    queue_size: int = 64
    """Jobs that may wait."""
    jobs_per_key: int = 16
    """Jobs of one API key that may wait or run."""
    upload_bytes: int = 64 * 1024**2
    """Bytes of a request."""
    photo_pixels: int = 64_000_000
    """Pixels of an uploaded photo, read from its header."""
    clip_frames: int = 1025
    """Frames of an uploaded clip."""
    video_pixels: int = 2560 * 1600
    """Pixels of a frame that is asked for."""
    video_frames: int = 1025
    """Frames that are asked for."""
    steps: int = 100
    """Denoising steps that are asked for."""
    check_seconds: int = 30
    """Processor time to check one request."""
    check_bytes: int = 4 * 1024**3
    """Memory to check one request."""
    keep_seconds: int = 24 * 3600
    """Seconds that a job is kept after its end."""
    sync_seconds: int = 3600
    """Seconds that ``/v1/videos/sync`` waits."""


@settings
class ServerSettings:
    """Everything that ``swifti2v serve`` decides."""

    data_dir: Path
    """Folder of the jobs."""
    models: tuple[str, ...] = ("nano",)
    """Models that may be asked for, see ``SwiftI2VPipeline.from_pretrained``; the first is the default."""
    lora_dir: Path | None = None
    """Folder whose ``.safetensors`` files may be asked for by name."""
    device: str | None = None
    """See ``ClipRequest.device``."""
    dtype: str | None = None
    """See ``ClipRequest.dtype``."""
    placement: Placement | None = None
    """See ``ClipRequest.placement``."""
    memory_bytes: int | None = None
    """Memory for the weights of loaded models; None takes half of the device's."""
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]", "::1")
    """Names by which the server may be called, without ports."""
    url_hosts: tuple[str, ...] = ()
    """Hosts whose http(s) URLs ``input_reference`` may name; none allows no URL."""
    logs_prompts: bool = False
    """Write prompts to the log."""
    limits: Limits = Limits()

    @property
    def model_names(self) -> dict[str, str]:
        """Models by the name that a request gives: the last part of a path, without its suffix."""
        return {Path(name).name.removesuffix(".yaml"): name for name in self.models}

    @property
    def loras(self) -> dict[str, Path]:
        """LoRA files by name."""
        files = sorted(self.lora_dir.glob("*.safetensors")) if self.lora_dir else []
        return {file.stem: file for file in files}

    def to_json(self) -> str:
        """For the command line of another process."""
        return _ADAPTER.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "ServerSettings":
        """Read what ``to_json`` wrote."""
        return _ADAPTER.validate_json(text)


_ADAPTER = TypeAdapter(ServerSettings)
