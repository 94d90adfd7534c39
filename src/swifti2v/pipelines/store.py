"""Store for the finished parts of a clip, so that a stopped run can be continued."""

from typing import Protocol

from torch import Tensor

from swifti2v.pipelines.stage1 import Conditions
from swifti2v.pipelines.transition import MotionReference


class SegmentStore(Protocol):
    """Embeddings, motion reference and segments of one clip."""

    def load_conditions(self) -> Conditions | None:
        """Return the embeddings of prompt and photo, or None if the store has none."""

    def save_conditions(self, conditions: Conditions) -> None:
        """Keep the embeddings."""

    def load_piece(self, index: int) -> MotionReference | None:
        """Return what Stage I made in a piece of several, or None if the store has none."""

    def save_piece(self, index: int, motion: MotionReference) -> None:
        """Keep the new frames of a piece; called as soon as they are finished."""

    def load_motion_reference(self) -> MotionReference | None:
        """Return Stage I's output, or None if the store has none."""

    def save_motion_reference(self, motion: MotionReference) -> None:
        """Keep Stage I's output."""

    def load_segment(self, index: int) -> Tensor | None:
        """Return the latents ``[1, C, F, h, w]`` of a segment, or None if the store has none."""

    def save_segment(self, index: int, latents: Tensor) -> None:
        """Keep the latents of a segment; called as soon as they are finished."""


class ReadOnlyStore:
    """A store that nothing is added to: of a process that shares a clip with the one that writes.

    Args:
        store: What is kept already.
    """

    def __init__(self, store: SegmentStore) -> None:
        self.load_conditions = store.load_conditions
        self.load_piece = store.load_piece
        self.load_motion_reference = store.load_motion_reference
        self.load_segment = store.load_segment

    def save_conditions(self, conditions: Conditions) -> None:
        """Keep nothing."""

    def save_piece(self, index: int, motion: MotionReference) -> None:
        """Keep nothing."""

    def save_motion_reference(self, motion: MotionReference) -> None:
        """Keep nothing."""

    def save_segment(self, index: int, latents: Tensor) -> None:
        """Keep nothing."""
