"""A job: what it is to make, and how far it is."""

import secrets
from dataclasses import dataclass
from typing import Literal

from swifti2v.serving.clip_order import ClipOrder

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NewJob:
    """A checked request, as it is queued."""

    id: str
    owner: str
    """Name of the API key; only its jobs are shown to it."""
    idempotency_key: str | None
    body_sha256: str
    """Hash of the whole request: tells a repeated one from another one with the same key."""
    model: str
    prompt: str
    order_json: str
    image_sha256: str
    motion_sha256: str | None
    width: int
    height: int
    num_frames: int
    fps: int | float
    seed: int
    seconds: str
    """Length as the client asked for it, or as it follows from the frames."""
    notes: str
    """JSON list."""
    segments_total: int
    stage1_steps: int
    """Model calls of Stage I."""
    segment_steps: int
    """Model calls of each segment."""

    @property
    def steps_total(self) -> int:
        """Model calls of the whole video."""
        return self.stage1_steps + self.segments_total * self.segment_steps

    @property
    def work(self) -> float:
        """Size of the job, to which its seconds are roughly proportional."""
        return float(self.width * self.height * self.num_frames * max(1, self.segment_steps))

    @property
    def order(self) -> ClipOrder:
        """All that makes the video."""
        return ClipOrder.from_json(self.order_json)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(NewJob):
    """A job as it stands."""

    number: int
    """Place in the order of arrival."""
    status: Status
    created_at: float
    started_at: float | None
    """Time of the last begin or continuation."""
    ended_at: float | None
    stage: str | None
    steps_done: int
    segments_done: int
    stage_seconds: str
    """JSON object."""
    peak_memory_bytes: int | None
    runs: int
    """Number of times it was begun or continued."""
    crashes: int
    """Deaths of the worker since its last finished segment."""
    error_code: str | None
    error_message: str | None

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status not in ("queued", "in_progress")


def new_id() -> str:
    """An id that cannot be guessed."""
    return f"video_{secrets.token_hex(16)}"
