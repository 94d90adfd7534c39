"""Stage I in pieces: clips longer than its model, and prompts that change over time."""

from torch import Tensor

from swifti2v.config import GenerationConfig
from swifti2v.pipelines.progress import OnProgress, report_piece
from swifti2v.pipelines.stage1 import Conditions, Stage1Pipeline
from swifti2v.pipelines.store import SegmentStore
from swifti2v.pipelines.transition import MotionReference


def make_pieces(
    stage1: Stage1Pipeline,
    image: Tensor,
    conditions: Conditions,
    seed: int,
    config: GenerationConfig,
    on_progress: OnProgress | None = None,
    store: SegmentStore | None = None,
) -> MotionReference:
    """Make Stage I's clip piece by piece, see ``GenerationConfig.plan_pieces``.

    A piece goes on from frames as they are stored, so a run that was stopped makes the same clip.

    Args:
        stage1: Makes a piece.
        image: ``[1, 3, 1, H, W]`` in [-1, 1], the photo at Stage I's size.
        conditions: Embeddings; a piece has the prompt that holds at its first new frame.
        seed: Seed of the noise.
        config: Settings.
        on_progress: Called after each step.
        store: Gets every piece of several; those it holds are not made again.

    Raises:
        ShapeError: The size does not fit the model.
        NumericalError: The model returned NaN or infinity.
    """
    pieces = config.plan_pieces()
    kept = store if len(pieces) > 1 else None
    made: MotionReference | None = None
    for number, piece in enumerate(pieces):
        part = kept.load_piece(number) if kept is not None else None
        if part is None:
            own = conditions.at(piece.start + piece.num_given)
            report = report_piece(on_progress, number, len(pieces))
            if made is None:
                clip = stage1(image, own, piece.num_frames, seed, config.stage1, report)
            else:
                clip = stage1.go_on(image, made, piece, own, seed, config.stage1, report)
            part = clip.to_motion_reference()
            if kept is not None:
                kept.save_piece(number, part)
        made = part if made is None else made.followed_by(part)
    assert made is not None, "a clip has a piece"
    return made
