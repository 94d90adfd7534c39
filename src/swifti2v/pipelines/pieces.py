"""Stage I in pieces: clips longer than its model, and prompts that change over time."""

from bisect import bisect_right

import numpy as np
from torch import Tensor

from swifti2v.config import GenerationConfig
from swifti2v.pipelines.progress import OnProgress, Progress, Stopwatch, report_piece
from swifti2v.pipelines.stage1 import Conditions, Stage1Pipeline
from swifti2v.pipelines.store import SegmentStore
from swifti2v.pipelines.transition import MotionReference
from swifti2v.segments import Piece


class PieceMaker:
    """Makes Stage I's clip piece by piece, as far as it is needed.

    See ``GenerationConfig.plan_pieces``. A piece goes on from frames as they are stored, so a run that
    was stopped makes the same clip.

    Args:
        stage1: Makes a piece.
        image: ``[1, 3, 1, H, W]`` in [-1, 1], the photo at Stage I's size.
        conditions: Embeddings; a piece has the prompt that holds at its first new frame.
        seed: Seed of the noise.
        config: Settings.
        on_progress: Called after each step.
        store: Gets every piece of several, and the whole clip when it is made; pieces that it holds
            are not made again.
        stopwatch: Takes the seconds of Stage I.
    """

    def __init__(
        self,
        stage1: Stage1Pipeline,
        image: Tensor,
        conditions: Conditions,
        seed: int,
        config: GenerationConfig,
        on_progress: OnProgress | None = None,
        store: SegmentStore | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.pieces = config.plan_pieces()
        self.num_made = 0
        """Frames that are there."""
        self._stage1, self._image, self._conditions = stage1, image, conditions
        self._seed, self._config = seed, config
        self._on_progress, self._store = on_progress, store
        self._stopwatch = stopwatch or Stopwatch()
        self._clip: MotionReference | None = None

    def begin(self) -> MotionReference:
        """Make the first piece.

        Returns:
            The whole clip, whose later frames are made by ``make_through``.

        Raises:
            ShapeError: The size does not fit the model.
            NumericalError: The model returned NaN or infinity.
        """
        first = self._take(0)
        num_frames = self._config.num_frames
        frames = np.zeros((num_frames, *first.frames.shape[1:]), np.uint8)
        displacement = None
        if first.displacement is not None:
            displacement = first.displacement.new_zeros(num_frames, *first.displacement.shape[1:])
        self._clip = MotionReference(frames, displacement, growth=self)
        self._add(first)
        return self._clip

    def make_through(self, num_frames: int) -> None:
        """Make so many frames of the clip, or more.

        Raises:
            NumericalError: The model returned NaN or infinity.
        """
        while self.num_made < num_frames:
            self._add(self._take(self._next))

    @property
    def _next(self) -> int:
        stops = [piece.stop for piece in self.pieces]
        return bisect_right(stops, self.num_made)

    def _take(self, number: int) -> MotionReference:
        """Return the new frames of a piece: those that are stored, or else made now."""
        several = len(self.pieces) > 1
        kept = self._store if several else None
        report = report_piece(self._on_progress, number, len(self.pieces))
        part = kept.load_piece(number) if kept is not None else None
        if part is not None:
            num_steps = self._config.stage1.sampling.num_calls
            if report is not None:
                report(Progress(stage="stage1", step=num_steps, num_steps=num_steps))
            return part
        with self._stopwatch.measure("stage1"):
            part = self._make(self.pieces[number], report)
        if kept is not None:
            kept.save_piece(number, part)
        return part

    def _make(self, piece: Piece, report: OnProgress | None) -> MotionReference:
        own = self._conditions.at(piece.start + piece.num_given)
        config, seed = self._config.stage1, self._seed
        if self._clip is None:
            clip = self._stage1(self._image, own, piece.num_frames, seed, config, report)
        else:
            clip = self._stage1.go_on(self._image, self._clip, piece, own, seed, config, report)
        return clip.to_motion_reference()

    def _add(self, part: MotionReference) -> None:
        clip = self._clip
        assert clip is not None
        new = slice(self.num_made, self.num_made + len(part.frames))
        clip.frames[new] = part.frames
        if clip.displacement is not None and part.displacement is not None:
            clip.displacement[new] = part.displacement
        self.num_made = new.stop
        if self.num_made == len(clip.frames) and self._store is not None:
            self._store.save_motion_reference(clip)
