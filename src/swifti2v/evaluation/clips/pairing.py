"""Pairing of files: one clip, folders paired by file name, or a manifest."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swifti2v.config import parse_config, settings
from swifti2v.errors import InputError
from swifti2v.evaluation.clips.summary import require_same_names

VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".gif", ".mpg", ".ts"})
MANIFEST_SUFFIXES = frozenset({".csv", ".jsonl"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """One clip and the files it is compared with."""

    name: str
    """Name in tables."""
    video: Path
    """The clip."""
    image: Path | None = None
    """The photo."""
    reference: Path | None = None
    """The true clip."""
    motion_reference: Path | None = None
    """Stage I's clip."""
    baseline: Path | None = None
    """The same clip made in another way."""
    segment_starts: tuple[int, ...] | None = None
    """First pixel frames of the segments."""


@settings
class ManifestLine:
    """One line of a manifest; paths are relative to its folder."""

    video: str
    """The clip."""
    name: str | None = None
    """Name in tables; by default the file name without suffix."""
    image: str | None = None
    """The photo."""
    reference: str | None = None
    """The true clip."""
    motion_reference: str | None = None
    """Stage I's clip."""
    baseline: str | None = None
    """The same clip made in another way."""
    segment_starts: str | tuple[int, ...] | None = None
    """First pixel frames of the segments: ``13,25`` or a list."""


def parse_starts(text: str) -> tuple[int, ...]:
    """Numbers divided by commas or spaces.

    Raises:
        InputError: The text holds something else.
    """
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        raise InputError(f"segment starts {text!r} are not numbers; give them as 13,25,37")
    return tuple(int(part) for part in parts)


def find_files(video: Path, others: Mapping[str, Path | None]) -> list[Files]:
    """Pair files: a clip with files, or a folder of clips with folders, by name without suffix.

    ``others`` has a file or folder by field of ``Files``. A manifest (``.csv``, ``.jsonl``) names
    all files itself.

    Raises:
        InputError: A path is missing or of the wrong kind, or names in folders do not match.
    """
    given = {role: path for role, path in others.items() if path is not None}
    for path in (video, *given.values()):
        if not path.exists():
            raise InputError(f"{path} does not exist; check the path")
    if video.suffix.lower() in MANIFEST_SUFFIXES and video.is_file():
        if given:
            options = ", ".join(map(_option, given))
            raise InputError(
                f"{video} is a manifest: name these files in its columns, not with {options}"
            )
        return list(_read_manifest(video))
    for role, path in given.items():
        if path.is_dir() != video.is_dir():
            kinds = ("a folder", "a file") if video.is_dir() else ("a file", "a folder")
            raise InputError(
                f"{video} is {kinds[0]}, but {_option(role)} {path} is {kinds[1]}; give "
                "file with file or folder with folder"
            )
    return _pair(video, given) if video.is_dir() else [_files(video, given)]


def _pair(folder: Path, others: Mapping[str, Path]) -> list[Files]:
    clips = files_by_name(folder, are_clips=True)
    files = {}
    for role, other in others.items():
        files[role] = files_by_name(other, are_clips=role != "image")
        require_same_names(clips, files[role], str(folder), f"{_option(role)} {other}")
    return [
        _files(clip, {role: paths[name] for role, paths in files.items()})
        for name, clip in clips.items()
    ]


def _files(video: Path, others: Mapping[str, Path]) -> Files:
    return Files(
        name=video.stem,
        video=video,
        image=others.get("image"),
        reference=others.get("reference"),
        motion_reference=others.get("motion_reference"),
        baseline=others.get("baseline"),
    )


def _option(role: str) -> str:
    return "--" + role.replace("_", "-")


def files_by_name(folder: Path, *, are_clips: bool) -> dict[str, Path]:
    """Videos or photos of a folder by their names without suffix; hidden files are left out.

    Raises:
        InputError: Two files have the same name, or the folder has no such file.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        is_clip = path.suffix.lower() in VIDEO_SUFFIXES
        if is_clip != are_clips or (not are_clips and path.suffix.lower() in _TEXTS):
            continue
        if path.stem in files:
            raise InputError(f"{files[path.stem]} and {path} have the same name; rename one")
        files[path.stem] = path
    if not files:
        kind = f"videos ({', '.join(sorted(VIDEO_SUFFIXES))})" if are_clips else "photos"
        raise InputError(f"folder {folder} holds no {kind}")
    return files


_TEXTS = frozenset({".csv", ".json", ".jsonl", ".md", ".txt", ".yaml", ".yml"})


def _read_manifest(path: Path) -> Iterator[Files]:
    names: set[str] = set()
    for place, values in _manifest_lines(path):
        line = parse_config(ManifestLine, values, place)
        files = {
            role: path.parent / getattr(line, role)
            for role in ("video", "image", "reference", "motion_reference", "baseline")
            if getattr(line, role) is not None
        }
        for role, file in files.items():
            if not file.is_file():
                raise InputError(f"{place}: {role} {file} does not exist; check the path")
        name = line.name or files["video"].stem
        if name in names:
            raise InputError(f"{place}: the name {name} appears twice; give a column 'name'")
        names.add(name)
        starts = line.segment_starts
        yield replace(
            _files(files["video"], files),
            name=name,
            segment_starts=parse_starts(starts) if isinstance(starts, str) else starts,
        )
    if not names:
        raise InputError(f"manifest {path} has no lines; give one a clip")


def _manifest_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines that are not empty, each with its place for messages."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                reader = csv.DictReader(file, strict=True)
                for values in reader:
                    place = f"{path}, line {reader.line_num}"
                    if None in values:
                        raise InputError(f"{place} has more cells than the header has columns")
                    yield place, {key: value for key, value in values.items() if value}
                return
            for number, text in enumerate(file, start=1):
                if text.strip():
                    values = json.loads(text)
                    if not isinstance(values, dict):
                        raise InputError(f"{path}, line {number} is not a JSON object")
                    yield f"{path}, line {number}", values
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise InputError(f"manifest {path} cannot be read ({error}); write it as UTF-8") from None
