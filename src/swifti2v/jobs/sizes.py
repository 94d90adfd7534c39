"""Output size of a run for which the user names no size, or only one side."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from swifti2v.errors import ShapeError
from swifti2v.jobs.settings import RunSettings
from swifti2v.models.loading.architectures import find_scale
from swifti2v.models.loading.sources import find_model
from swifti2v.pipelines.sizes import side_multiple
from swifti2v.shapes import FrameSize, exact_size, size_of_aspect

MAX_ASPECT = 10
"""Longer side over the shorter one of a photo that a clip may follow: the widest panoramas."""


def choose_size(
    settings: RunSettings, given: Mapping[str, Any], source: FrameSize
) -> tuple[RunSettings, list[str]]:
    """Settings with an output size that follows the photo or the user's own clip, and a note on it.

    Sizes among the ``given`` settings are kept.

    Raises:
        ShapeError: The size given for ``refine`` differs from the clip's aspect, or a photo is far
            too long to follow.
    """
    height, width = given.get("height"), given.get("width")
    if height is None or width is None:
        _require_usual(source)
    name = "photo" if settings.motion is None else "clip"
    notes = []
    if height is not None and width is not None:
        size = FrameSize(height, width)
    elif height is None and width is None:
        size, note = _follow(settings, source)
        notes = [note] if note else []
    else:
        size = size_of_aspect(source, _multiple(settings), 0, height=height, width=width)
        other, kept = ("width", "height") if width is None else ("height", "width")
        notes.append(
            f"{other} {getattr(size, other)} follows from {kept} {getattr(size, kept)} and the "
            f"{name}'s aspect"
        )
    if settings.command == "refine" and source.height * size.width != source.width * size.height:
        assert settings.motion is not None
        raise ShapeError(
            f"clip {settings.motion.path} is {source.width}x{source.height}, the output "
            f"{size.width}x{size.height}: the aspects differ; crop the clip, or choose a size of "
            "its aspect"
        )
    config = replace(settings.config, height=size.height, width=size.width)
    return replace(settings, config=config), notes


def _require_usual(source: FrameSize) -> None:
    longer, shorter = max(source), min(source)
    if longer > MAX_ASPECT * shorter:
        raise ShapeError(
            f"{source.width}x{source.height} is over {MAX_ASPECT} times as long as it is wide or "
            "high: crop it, or give --width and --height"
        )


def _follow(settings: RunSettings, source: FrameSize) -> tuple[FrameSize, str | None]:
    """A photo's aspect within the pixels of the model's default size; a clip made larger.

    ``refine`` shows the clip's aspect exactly, so that the photo lies on it: the model's Stage I
    factor larger, or less where that is more pixels than the default.
    """
    config = settings.config
    usual = FrameSize(config.height, config.width)
    if settings.command == "generate":
        size = size_of_aspect(source, _multiple(settings), usual.num_pixels)
    else:
        factor = config.stage1.downscale
        usual, limit = FrameSize(source.height * factor, source.width * factor), usual.num_pixels
        is_too_large = settings.command == "refine" and usual.num_pixels > limit
        size = (exact_size(source, _multiple(settings), limit) if is_too_large else None) or usual
    if size == usual:
        return size, None
    what = "photo's aspect" if settings.command == "generate" else "exact aspect of the clip"
    return size, (
        f"size {size.width}x{size.height}: the {what} in no more pixels than the model's "
        f"{config.width}x{config.height}; choose another with --width and --height"
    )


def _multiple(settings: RunSettings) -> int:
    """Number of which both sides must be multiples."""
    index, root = find_model(settings.model)
    stage1 = find_scale("stage1", index, root) if settings.command == "generate" else None
    return side_multiple(stage1, find_scale("stage2", index, root), settings.config)
