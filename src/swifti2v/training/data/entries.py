"""Check a row, a file or an archive's key: a sample, or the reason against it."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swifti2v.errors import InputError
from swifti2v.training.data.samples import Media, MediaFile, MediaKind, Reject, Sample

OPTIONAL_COLUMNS = (
    "fps", "start", "end", "width", "height", "split", "weight", "source", "reference",
)  # fmt: skip
"""Columns that any manifest may have."""
Locate = Callable[[str, Any], Media | str]
"""Function from a media column and its cell to the media, or the reason against it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Columns of a table."""

    media: Mapping[str, MediaKind]
    """Column of the path, and what it leads to."""
    prompt: str
    """Column of the caption."""
    required: frozenset[str] = frozenset()
    """Further columns by which it is recognised."""
    others: frozenset[str] = frozenset()
    """Columns that are known and not used."""
    source: str | None = None
    """Name of the collection."""

    @property
    def is_by_name(self) -> bool:
        """Whether files are searched by their name, at any depth: collections come in many zips."""
        return self.source is not None


# The header of data/train/OpenVid-1M.csv and OpenVidHD.csv in nkp37/OpenVid-1M.
OPENVID = Layout(
    media={"video": "video"},
    prompt="caption",
    required=frozenset({"aesthetic score", "motion score"}),
    others=frozenset(
        {"temporal consistency score", "camera motion", "frame", "seconds", "part_id"}
    ),
    source="OpenVid",
)
# The header of short.csv in APRIL-AIGC/UltraVideo. The stated size is that of the original; the
# clips also come smaller. Start and end are those within the film the clip was cut from.
ULTRAVIDEO = Layout(
    media={"clip_id": "video"},
    prompt="Summarized Description",
    others=frozenset(
        {
            "url", "frame_width", "frame_height", "start_frame", "end_frame", "total_frames",
            "start_time", "end_time", "duration", "vtss_score", "motion_score", "video_clip_score",
            "Brief Description", "Detailed Description", "Background", "Theme Description",
            "Style", "Shot Type", "Camera Movement", "Lighting", "Video Atmosphere",
        }
    ),
    source="UltraVideo",
)  # fmt: skip
PLAIN = Layout(media={"video": "video", "image": "image"}, prompt="prompt")


class UnusableError(Exception):
    """Carries the reason to refuse an entry; it never leaves a listing.

    The sample is what it would be with a caption, if that alone is missing.
    """

    def __init__(self, reason: str, sample: Sample | None = None) -> None:
        super().__init__(reason)
        self.sample = sample


def find_layout(path: Path, columns: Collection[str]) -> Layout:
    """The layout that a table's columns have; a plain one may lack captions.

    Raises:
        InputError: Columns of media are missing.
    """
    for layout in (ULTRAVIDEO, OPENVID, PLAIN):
        has_media = any(column in columns for column in layout.media)
        has_prompt = layout.prompt in columns or layout is PLAIN
        if has_media and has_prompt and layout.required <= set(columns):
            return layout
    raise InputError(
        f"{path} has the columns {', '.join(map(str, columns))}; it needs video or image, and "
        "prompt (or the header of OpenVid or UltraVideo)"
    )


def require_known(path: Path, columns: Collection[str], layout: Layout) -> None:
    """Refuse a table with a column that would be passed over.

    Raises:
        InputError: Naming the unknown columns and the known ones.
    """
    known = {*layout.media, layout.prompt, *layout.required, *layout.others, *OPTIONAL_COLUMNS}
    if unknown := [str(column) for column in columns if column not in known]:
        raise InputError(
            f"{path} has unknown columns {', '.join(unknown)}; rename or remove them "
            f"(known: {', '.join((*layout.media, layout.prompt, *OPTIONAL_COLUMNS))})"
        )


class Listing:
    """Samples and rejects of a manifest, checked one by one; files are looked for, not opened."""

    def __init__(self, path: Path, root: Path, split: str | None) -> None:
        self.path, self.root, self.split = path, root, split
        self.samples: list[Sample] = []
        self.rejects: list[Reject] = []
        self.ids: set[str] = set()
        self.splits: set[str] = set()

    def add(
        self,
        id_: str,
        values: Mapping[str, Any],
        media: Media | None = None,
        kind: MediaKind = "video",
        problem: str | None = None,
    ) -> None:
        """Add a sample of a prompt and the optional columns, or the reason against it.

        A ``problem`` of a sample that has media is that they have no caption.

        Raises:
            InputError: The id came before.
        """
        split = text_of(values.get("split"))
        self.splits.add(split or "(none)")
        if id_ in self.ids:
            raise InputError(f"{self.path} lists {id_} twice; remove one, or give other start, end")
        self.ids.add(id_)
        if self.split is not None and split != self.split:
            return
        try:
            if media is None:
                raise UnusableError(problem or "no media: nothing is given")
            self.samples.append(self._check(id_, values, media, kind, problem))
        except UnusableError as error:
            self.rejects.append(Reject(id_, str(error), error.sample))

    def add_row(
        self,
        row: Mapping[str, Any],
        layout: Layout,
        number: int,
        locate: Locate,
        id_: str | None = None,
    ) -> None:
        """Add what a row of a table lists; empty cells and None in media columns count as missing.

        The row's number, from 1, is named where it has no media. Without an id it is made from the
        media's path, ``start`` and ``end``.
        """
        values = {name: row.get(name) for name in OPTIONAL_COLUMNS}
        values |= {"prompt": row.get(layout.prompt), "source": row.get("source") or layout.source}
        given = [name for name in layout.media if row.get(name) and text_of(row[name])]
        if len(given) != 1:
            names = " and ".join(layout.media)
            reason = f"no media: {names} are both given" if given else f"no media: no {names}"
            self.add(id_ or f"row {number}", values, problem=reason)
            return
        (column,) = given
        if id_ is None:
            start, end = text_of(row.get("start")), text_of(row.get("end"))
            path = row[column].strip() if isinstance(row[column], str) else f"row {number}"
            id_ = f"{path}#{start}-{end}" if start or end else path
        found = locate(column, row[column])
        if isinstance(found, str):
            self.add(id_, values, problem=found)
            return
        problem = None if layout.prompt in row else f"no caption: no column {layout.prompt}"
        self.add(id_, values, found, layout.media[column], problem)

    def _check(
        self,
        id_: str,
        values: Mapping[str, Any],
        media: Media,
        kind: MediaKind,
        problem: str | None,
    ) -> Sample:
        if isinstance(media, MediaFile) and not media.path.is_file():
            raise UnusableError(f"file not found: {media.path}")
        start = _number(values, "start", low=0) or 0.0
        end = _number(values, "end", low=0)
        if end is not None and end <= start:
            raise UnusableError(f"bad number: end {end:g} is not after start {start:g}")
        weight = _number(values, "weight", is_positive=True)
        problem = problem or _find_caption_problem(values.get("prompt"))
        sample = Sample(
            id=id_,
            media=media,
            kind=kind,
            prompt="" if problem else values["prompt"].strip(),
            fps=_number(values, "fps", is_positive=True),
            start=start,
            end=end,
            width=_whole_number(values, "width"),
            height=_whole_number(values, "height"),
            split=text_of(values.get("split")) or None,
            weight=1.0 if weight is None else weight,
            source=text_of(values.get("source")) or None,
            reference=_find_reference(values, kind, self.root),
        )
        if problem:
            raise UnusableError(problem, sample)
        return sample


def _find_caption_problem(prompt: Any) -> str | None:
    if prompt is None or not str(prompt).strip():
        return "no caption: the prompt is empty"
    if not isinstance(prompt, str) or "\ufffd" in prompt:
        return "bad caption: the prompt is not a text in UTF-8"
    return None


def _find_reference(values: Mapping[str, Any], kind: MediaKind, root: Path) -> Path | None:
    text = text_of(values.get("reference"))
    if not text:
        return None
    if kind == "image":
        raise UnusableError("bad reference: a picture cannot have one")
    if not (root / text).is_file():
        raise UnusableError(f"reference not found: {root / text}")
    return root / text


def text_of(value: Any) -> str:
    """A cell as a text without blanks around it; None is empty."""
    return "" if value is None else str(value).strip()


def _number(
    values: Mapping[str, Any], name: str, *, low: float = -math.inf, is_positive: bool = False
) -> float | None:
    text = text_of(values.get(name))
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        raise UnusableError(f"bad number: {name} {text!r} is not a number") from None
    if not math.isfinite(number) or number < low or (is_positive and number <= 0):
        raise UnusableError(f"bad number: {name} {text} is out of range")
    return number


def _whole_number(values: Mapping[str, Any], name: str) -> int | None:
    number = _number(values, name, is_positive=True)
    if number is not None and number != int(number):
        raise UnusableError(f"bad number: {name} {number:g} is not whole")
    return None if number is None else int(number)
