"""Two sets of videos, paired by name and checked before a page is built."""

from dataclasses import dataclass
from pathlib import Path

from swifti2v.errors import InputError, MediaError, ShapeError
from swifti2v.evaluation.clips.inputs import SAME_FPS
from swifti2v.evaluation.clips.pairing import files_by_name
from swifti2v.evaluation.clips.summary import require_same_names
from swifti2v.media import iter_frames, probe_clip

PLAYABLE = frozenset({"h264", "vp9", "av1"})
"""Codecs that browsers play from an MP4."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A clip of equal name from both sets."""

    name: str
    """File name without suffix."""
    first: Path
    """Video of the first set."""
    second: Path
    """Video of the second set."""
    fps: float
    """Frames a second, of both."""
    num_frames: int
    """Frames of both."""
    width: int
    """Pixels, of both."""
    height: int
    """Pixels, of both."""


def find_pairs(first: Path, second: Path) -> list[Pair]:
    """Pair two videos, or two folders by file name, and check that each pair is comparable.

    Raises:
        InputError: A path is missing, a folder is empty, names differ, or a file is put next to
            a folder.
        MediaError: A video cannot be read or played by browsers, or rates differ.
        ShapeError: Sizes or lengths differ.
    """
    for path in (first, second):
        if not path.exists():
            raise InputError(f"{path} does not exist; check the path")
    if first.resolve() == second.resolve():
        raise InputError(f"{first} is compared with itself; give two sets")
    if first.is_dir() != second.is_dir():
        raise InputError(f"{first} and {second}: give two videos or two folders")
    if not first.is_dir():
        return [_check(first.stem, first, second)]
    ours, theirs = (files_by_name(folder, are_clips=True) for folder in (first, second))
    require_same_names(ours, theirs, str(first), str(second))
    return [_check(name, ours[name], theirs[name]) for name in ours]


def name_sets(first: Path, second: Path) -> tuple[str, str]:
    """Short names of two sets: the last parts of their paths that differ."""
    ours, theirs = first.resolve().parts, second.resolve().parts
    for depth in range(1, max(len(ours), len(theirs)) + 1):
        names = tuple("/".join(parts[-depth:]) for parts in (ours, theirs))
        if names[0] != names[1]:
            return names[0], names[1]
    raise InputError(f"{first} is compared with itself; give two sets")


def _check(name: str, first: Path, second: Path) -> Pair:
    infos = [probe_clip(path) for path in (first, second)]
    for path, info in zip((first, second), infos, strict=True):
        if info.codec not in PLAYABLE:
            raise MediaError(
                f"{path} is {info.codec}, which browsers do not play; write it as H.264 "
                "(--codec h264)"
            )
    sizes = [f"{info.width}x{info.height}" for info in infos]
    if sizes[0] != sizes[1]:
        raise ShapeError(f"{first} is {sizes[0]}, {second} is {sizes[1]}; scale one to the other")
    lengths = [_count(path) for path in (first, second)]
    if lengths[0] != lengths[1]:
        raise ShapeError(
            f"{first} has {lengths[0]} frames, {second} has {lengths[1]}; cut them to the same frames"
        )
    if abs(infos[0].fps - infos[1].fps) > SAME_FPS:
        raise MediaError(
            f"{first} plays at {infos[0].fps:g} fps, {second} at {infos[1].fps:g}; resample one"
        )
    return Pair(
        name=name,
        first=first,
        second=second,
        fps=infos[0].fps,
        num_frames=lengths[0],
        width=infos[0].width,
        height=infos[0].height,
    )


def _count(path: Path) -> int:
    """Frames of a clip, decoded: a damaged one is refused here, not in the browser."""
    return sum(1 for _ in iter_frames(path, min_frames=1))
