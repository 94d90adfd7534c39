"""Orders: the stored form of an accepted request, and the files of its job."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from swifti2v.config import settings
from swifti2v.jobs.request import ClipRequest
from swifti2v.models.loading.sources import LoraSource
from swifti2v.serving.settings import ServerSettings

SOURCE = "request"
"""Names the settings of a request in errors."""


@settings
class ClipOrder:
    """One video that is asked for, in plain values."""

    model: str
    """Name in ``ServerSettings.model_names``."""
    prompt: str
    seed: int
    changes: dict[str, Any]
    """Nested fields of ``GenerationConfig`` that are asked for."""
    fit: str | None = None
    background: str | None = None
    loras: tuple[LoraSource, ...] = ()
    truncate_prompt: bool = False
    has_motion: bool = False
    """Whether the user's own clip takes the place of Stage I."""

    def to_request(self, folder: "JobFolder", server: ServerSettings) -> ClipRequest:
        """The request that ``swifti2v.jobs.resolve`` takes."""
        return ClipRequest(
            command="refine" if self.has_motion else "generate",
            output=folder.video,
            image=folder.photo,
            motion=folder.motion if self.has_motion else None,
            prompt=self.prompt,
            model=server.model_names[self.model],
            seed=self.seed,
            layers=((SOURCE, self.changes),),
            fit=self.fit,  # type: ignore[arg-type] # checked by the schema
            background=self.background,
            loras=self.loras,
            truncate_prompt=self.truncate_prompt,
            contact_sheet=folder.spritesheet,
            device=server.device,
            dtype=server.dtype,
            placement=server.placement,
            work_dir=folder.work,
            resume=True,
        )

    def to_json(self) -> str:
        """For the database."""
        return _ADAPTER.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "ClipOrder":
        """Read what ``to_json`` wrote."""
        return _ADAPTER.validate_json(text)


_ADAPTER = TypeAdapter(ClipOrder)


class JobFolder:
    """The files of one job.

    Args:
        path: The folder; its files need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uploaded_photo = path / "input_reference"
        """Photo as the client sent it; deleted once it is checked."""
        self.uploaded_motion = path / "motion_reference"
        self.photo = path / "photo.png"
        """The upload's pixels without anything else that its file held."""
        self.motion = path / "motion.mkv"
        self.work = path / "work"
        self.video = path / "video.mp4"
        """The result; while it is made, another name of ``stream``."""
        self.stream = path / "stream.mp4"
        """Fragmented MP4, which grows by a fragment with each segment."""
        self.spritesheet = path / "spritesheet.png"
        self.stage1_preview = path / "stage1.jpg"

    def segment_preview(self, index: int) -> Path:
        """JPEG of a segment's last frame, of the first one's first frame."""
        return self.path / f"segment_{index:04d}.jpg"

    @property
    def thumbnail(self) -> Path:
        """JPEG of the first frame."""
        return self.segment_preview(0)
