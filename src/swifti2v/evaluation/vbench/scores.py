"""Turn the official code's result files into normalised values and the total score.

All dimensions make a score; with some missing the score is labelled as partial. A missing
dimension never counts as zero.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swifti2v.errors import InputError
from swifti2v.evaluation.vbench.dimensions import DIMENSIONS, Group

RESULT_SUFFIX = "_eval_results.json"
_SAMPLE = re.compile(r"-(\d+)\.\w+$")
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class DimensionResult:
    """Result of the official code for one dimension."""

    value: float
    """0 to 1."""
    num_videos: int
    """Videos measured for it."""
    num_prompts: int
    """Prompts of those videos."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupScore:
    """A weighted mean of normalised values."""

    value: float
    """Mean of the dimensions at hand; NaN without any."""
    missing: tuple[str, ...]
    """Dimensions that are missing in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """The scores of a model."""

    results: dict[str, DimensionResult]
    """Results by dimension."""
    quality: GroupScore
    """Video quality."""
    i2v: GroupScore
    """Likeness to the photo and the camera prompt."""
    total: float
    """Mean of both; NaN if one is."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Dimensions that a full score lacks."""
        return (*self.i2v.missing, *self.quality.missing)


def find_result_files(paths: Sequence[Path]) -> list[Path]:
    """Result files, and those in folders.

    Raises:
        InputError: A path does not exist, or a folder holds no result files.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob(f"*{RESULT_SUFFIX}"))
            if not inside:
                raise InputError(f"folder {path} holds no *{RESULT_SUFFIX}; see 'vbench run'")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"{path} does not exist; check the path")
    return files


def read_results(files: Sequence[Path]) -> dict[str, DimensionResult]:
    """Dimensions of the official code's result files, which may hold one or many each.

    Raises:
        InputError: A file is of another kind, a dimension is unknown or in two files, or a value
            is not a number.
    """
    results: dict[str, DimensionResult] = {}
    places: dict[str, Path] = {}
    for file in files:
        for name, value in _read(file).items():
            if name not in DIMENSIONS:
                raise InputError(
                    f"{file}: dimension {name!r} is unknown; there are {', '.join(DIMENSIONS)}"
                )
            if name in results:
                raise InputError(f"{name} is in {places[name]} and in {file}; give one of them")
            results[name], places[name] = _parse(value, f"{file}, {name}"), file
    return {name: results[name] for name in DIMENSIONS if name in results}


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"result {file} cannot be read ({error})") from None
    if isinstance(values, dict) and "kind" in values:
        raise InputError(
            f"{file} holds {values['kind']} results: they do not belong in an official score"
        )
    if not isinstance(values, dict) or not values:
        raise InputError(f"{file} holds no results of VBench")
    return values


def _parse(value: Any, place: str) -> DimensionResult:
    """``[mean, videos]``; camera motion has its means by type in between."""
    is_result = isinstance(value, list) and len(value) in (2, 3) and isinstance(value[-1], list)
    if not is_result or not isinstance(value[0], int | float):
        raise InputError(f"{place}: not [mean, videos], as VBench writes it")
    try:
        names = [Path(video["video_path"]).name for video in value[-1]]
    except (TypeError, KeyError):
        raise InputError(f"{place}: a video has no video_path, as VBench writes it") from None
    mean = float(value[0])
    if not names or math.isnan(mean):
        raise InputError(f"{place}: no video was measured; check names and folder, run it again")
    if not -_ROUNDING <= mean <= 1 + _ROUNDING:
        raise InputError(f"{place}: {mean:g} is outside 0 .. 1")
    prompts = {_SAMPLE.sub("", name) for name in names}
    return DimensionResult(value=mean, num_videos=len(names), num_prompts=len(prompts))


def score(results: Mapping[str, DimensionResult]) -> Scores:
    """Normalise, weigh and average; missing dimensions are left out and named.

    Source:
        VBench, ``scripts/cal_i2v_final_score.py``, which counts missing dimensions as zero.
    """
    quality, i2v = _group("quality", results), _group("i2v", results)
    return Scores(
        results=dict(results), quality=quality, i2v=i2v, total=(quality.value + i2v.value) / 2
    )


def _group(group: Group, results: Mapping[str, DimensionResult]) -> GroupScore:
    members = {name: item for name, item in DIMENSIONS.items() if item.group == group}
    present = {name: item for name, item in members.items() if name in results}
    weight = sum(item.weight for item in present.values())
    total = sum(item.weight * item.normalize(results[name].value) for name, item in present.items())
    return GroupScore(
        value=total / weight if weight else math.nan,
        missing=tuple(name for name in members if name not in results),
    )


def require_complete(scores: Scores) -> None:
    """Refuse a score that lacks dimensions.

    Raises:
        InputError: Dimensions are missing; the message names them.
    """
    if scores.missing:
        raise InputError(
            f"{len(scores.missing)} dimensions are missing ({', '.join(scores.missing)}): measure "
            "them too, or ask for a --partial score"
        )
