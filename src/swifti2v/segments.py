"""Clips in parts, as integers: segments of Stage II (latent frames), pieces of Stage I (frames)."""

from collections.abc import Sequence
from dataclasses import dataclass

from swifti2v.errors import ShapeError


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One step of the segment-wise loop; every number is a 0-based latent frame index."""

    index: int
    """Place of this segment in the clip, from 0."""
    context: tuple[int, ...]
    """Finished frames right before the target; the anchor only where it is not shown anyway."""
    target: tuple[int, ...]
    """The frames this segment generates, in temporal order; the anchor may be the first."""
    shows_anchor: bool = True
    """Whether the window begins with the anchor, however far away it is."""

    @property
    def anchor(self) -> int:
        """The frame that holds the encoded input image: always 0."""
        return 0

    @property
    def given(self) -> tuple[int, ...]:
        """Anchor and context; nothing where the segment generates the anchor itself."""
        if self.target[0] == self.anchor or not self.shows_anchor:
            return self.context
        return (self.anchor, *self.context)

    @property
    def window(self) -> tuple[int, ...]:
        """Given frames and target in temporal order: all that the transformer sees."""
        return (*self.given, *self.target)

    @property
    def latent_range(self) -> tuple[int, int]:
        """The target as a half-open range ``(start, stop)``."""
        return self.target[0], self.target[-1] + 1


def plan_segments(
    num_latent_frames: int,
    segment_size: int | None = 3,
    context_size: int = 1,
    *,
    generates_anchor: bool = False,
    shows_anchor: bool = True,
) -> list[Segment]:
    """Cut latent frames ``1 .. F-1`` into consecutive segments.

    Args:
        num_latent_frames: F, the anchor included; at least 1. F = 1 gives no segment.
        segment_size: M, frames a segment generates; the last segment takes the rest. None
            makes one segment of all frames.
        context_size: N, finished frames it sees besides the anchor; fewer at the start.
        generates_anchor: The first segment generates frame 0 as well.
        shows_anchor: Every window begins with frame 0; without, it is a frame like others, which
            the first segments have as context.

    Returns:
        The segments in the order in which they are generated. Their targets partition
        ``1 .. F-1`` (``0 .. F-1`` with the anchor); a window holds at most ``1 + N + M`` frames.

    Raises:
        ShapeError: F or M below 1, or N below 0.

    Source:
        SwiftI2V, arXiv:2605.06356, section 3.2; M = 3 and N = 1 from the project page.
    """
    if num_latent_frames < 1:
        raise ShapeError(f"num_latent_frames is {num_latent_frames}; it must be at least 1")
    if segment_size is None:
        segment_size = max(1, num_latent_frames - 1)
    if segment_size < 1:
        raise ShapeError(f"segment_size is {segment_size}; it must be at least 1")
    if context_size < 0:
        raise ShapeError(f"context_size is {context_size}; it must be at least 0")
    starts = range(1, num_latent_frames, segment_size)
    segments = [
        Segment(
            index=index,
            context=tuple(range(max(int(shows_anchor), start - context_size), start)),
            target=tuple(range(start, min(start + segment_size, num_latent_frames))),
            shows_anchor=shows_anchor,
        )
        for index, start in enumerate(starts)
    ]
    if generates_anchor:
        first = segments[0].target if segments else ()
        segments[:1] = [Segment(index=0, context=(), target=(0, *first), shows_anchor=shows_anchor)]
    return segments


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a clip that Stage I makes at a time; every number is a 0-based pixel frame index."""

    start: int
    """First frame that the model sees."""
    stop: int
    """The frame behind the last one."""
    num_given: int
    """Frames at the start that the piece before has made; 0 in the first piece."""

    @property
    def num_frames(self) -> int:
        """Frames that the model sees."""
        return self.stop - self.start


def plan_pieces(
    num_frames: int,
    piece_frames: int | None = None,
    piece_overlap: int = 1,
    starts: Sequence[int] = (),
) -> list[Piece]:
    """Cut the frames of a clip into pieces, each of which goes on from the one before.

    Args:
        num_frames: T = 4k + 1.
        piece_frames: Frames that the model makes at a time, 4k + 1; None has no limit.
        piece_overlap: Frames that a later piece is given, 4k + 1 and below ``piece_frames``; fewer
            where the clip has only begun.
        starts: Frames, 4k + 1 and rising, at which a piece has to begin anew.
    """
    pieces: list[Piece] = []
    done = 0
    for stop in (*starts, num_frames):
        while done < stop:
            num_given = min(piece_overlap, done)
            start = done - num_given
            done = stop if piece_frames is None else min(stop, start + piece_frames)
            pieces.append(Piece(start, done, num_given))
    return pieces
