"""Where a pipeline keeps what is finished of a clip, so that a stopped one can be continued."""

from typing import Protocol

from torch import Tensor

from swifti2v.pipelines.transition import MotionReference


class SegmentStore(Protocol):
    """Motion reference and segments of one clip."""

    def load_motion_reference(self) -> MotionReference | None:
        """What Stage I made, or None if it is not there."""

    def save_motion_reference(self, motion: MotionReference) -> None:
        """Keep what Stage I made."""

    def load_segment(self, index: int) -> Tensor | None:
        """Latents ``[1, C, F, h, w]`` of a segment, or None if they are not there."""

    def save_segment(self, index: int, latents: Tensor) -> None:
        """Keep the latents of a segment; called as soon as they are finished."""
