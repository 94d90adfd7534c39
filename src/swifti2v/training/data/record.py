"""Record of a training run's data: its samples in ``data.json``, compared when it continues."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from swifti2v.errors import InputError, MediaError
from swifti2v.storage import write_whole
from swifti2v.training.data.clips import ManifestClips
from swifti2v.training.data.samples import Media, MediaFile
from swifti2v.training.engine.checkpoints import find_latest
from swifti2v.training.engine.session import Session

logger = logging.getLogger(__name__)

DATA_NAME = "data.json"
REMEDY = "restore it, or continue on other data with --allow-changed-data"
NUM_SHOWN = 3
"""Samples that are named for each kind of change."""


class SampleRecord(NamedTuple):
    """A sample of a run; hashes, so that a record of many is small."""

    caption: str
    """Hash of the prompt; empty without one."""
    row: str
    """Hash of times, size and weight in the manifest; empty without them."""
    media: str
    """Hash of what is in the files, see ``Media.fingerprint``."""
    stamp: str
    """Hash of the files' path, size and time of change: as long as it is the same, ``media`` is not
    computed again."""


Record = Mapping[str, SampleRecord]
"""Samples by ``PHASE:MANIFEST:ID``; ``::PATH`` in a folder."""


def require_same_clips(clips: Sequence[ManifestClips], session: Session) -> None:
    """Refuse to continue a training whose clips changed, and keep what it is begun on.

    Raises:
        InputError: See ``require_same_data``.
    """
    directory = session.directory
    if session.ranks.is_first:
        is_begun = session.resume and find_latest(directory / "checkpoints") is not None
        known = read_record(directory)
        require_same_data(
            directory,
            describe_clips(clips, known),
            is_begun=is_begun,
            allows_changes=session.allows_changed_data,
        )
    session.ranks.wait()


def require_same_data(
    directory: Path,
    now: Record,
    *,
    is_begun: bool,
    allows_changes: bool = False,
    remedy: str = REMEDY,
) -> None:
    """Compare a run's data with what it was begun on, and keep it in ``data.json``.

    With ``allows_changes`` what changed is said, and the run goes on.

    Raises:
        InputError: The data changed; the message tells what.
    """
    before = read_record(directory)
    if is_begun and before is None:
        logger.warning(
            "%s does not name the data of its start; the data counts as unchanged", directory
        )
    if is_begun and before is not None and (changes := _compare(before, now)):
        if not allows_changes:
            raise InputError(
                f"the data of {directory} has changed since its start: {changes}; {remedy}"
            )
        logger.warning("continuing on changed data: %s", changes)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / DATA_NAME, json.dumps(now, indent=0))


def read_record(directory: Path) -> dict[str, SampleRecord] | None:
    """Read the data that a run began with; None without a record.

    Raises:
        InputError: The file is damaged.
    """
    path = directory / DATA_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {name: SampleRecord(*record) for name, record in values.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({error}); delete it to continue without knowing whether the data "
            "has changed"
        ) from None


def describe_clips(
    clips: Sequence[ManifestClips], known: Record | None = None
) -> dict[str, SampleRecord]:
    """The samples of a curriculum; files with their stamp in an earlier record are not opened."""
    contents = _contents(known)
    found = {}
    for phase, own in enumerate(clips):
        for name, placement in own.placements.items():
            sample = placement.sample
            row = (sample.fps, sample.start, sample.end, sample.width, sample.height, sample.weight)
            reference = [] if sample.reference is None else [MediaFile(sample.reference)]
            found[f"{phase}:{name}"] = _describe(
                [sample.media, *reference],
                contents,
                caption=_hash(sample.prompt),
                row=_hash(*row, *placement.bucket),
            )
    return found


def describe_files(
    paths: Iterable[Path], folder: Path, known: Record | None = None
) -> dict[str, SampleRecord]:
    """Files of a folder; see ``describe_clips``."""
    contents = _contents(known)
    return {
        f"::{path.relative_to(folder).as_posix()}": _describe([MediaFile(path)], contents)
        for path in paths
    }


def _contents(known: Record | None) -> dict[str, str]:
    return {record.stamp: record.media for record in (known or {}).values()}


def _describe(
    media: Sequence[Media], contents: dict[str, str], *, caption: str = "", row: str = ""
) -> SampleRecord:
    """A sample; files that cannot be read are one content of their own."""
    try:
        stamp = _hash(*(value for file in media for value in file.stamp()))
        if stamp not in contents:
            contents[stamp] = _hash(*(file.fingerprint() for file in media))
    except (OSError, MediaError):
        return SampleRecord(caption, row, "unreadable", "")
    return SampleRecord(caption, row, contents[stamp], stamp)


def _compare(before: Record, now: Record) -> str:
    """Describe the changes; empty without any."""
    both = [name for name in before if name in now]
    kinds = {
        "gone": [name for name in before if name not in now],
        "new": [name for name in now if name not in before],
        "with another caption": [n for n in both if before[n].caption != now[n].caption],
        "with other times, size or weight": [n for n in both if before[n].row != now[n].row],
        "with other content": [n for n in both if before[n].media != now[n].media],
    }
    return "; ".join(_count(names, kind) for kind, names in kinds.items() if names)


def _count(names: Sequence[str], kind: str) -> str:
    """A sample of several phases counts once."""
    ids = list(dict.fromkeys(name.split(":", 2)[-1] for name in names))
    shown = [*ids[:NUM_SHOWN], *(["..."] if len(ids) > NUM_SHOWN else [])]
    return f"{len(ids)} {'sample' if len(ids) == 1 else 'samples'} {kind} ({', '.join(shown)})"


def _hash(*values: object) -> str:
    """64 bits, enough to tell the values of one sample from others."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
