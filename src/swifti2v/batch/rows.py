"""Rows of a manifest: what each clip is made from, checked before the first one is made."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from swifti2v.config import (
    GenerationConfig,
    expand_shorthands,
    merge,
    parse_config,
    settings,
)
from swifti2v.errors import ConfigError, InputError
from swifti2v.jobs.request import ClipRequest
from swifti2v.media.encoder import CodecName
from swifti2v.models.loading.sources import LoraSource, find_model
from swifti2v.models.runtime.roles import Placement
from swifti2v.tables import read_csv, read_json_lines

READERS = {".csv": read_csv, ".jsonl": read_json_lines}
TEXTS = frozenset({"id", "image", "motion", "prompt", "negative_prompt", "model", "background"})
"""Columns of a CSV that are taken as they are; the cells of the others are read as YAML."""
FILES = ("image", "motion")
NAME = re.compile(r"\w[\w. -]{0,119}")
"""Names that become file names on every file system."""


@settings
class ClipRow:
    """One clip that is asked for, in plain values."""

    id: str
    """Name of the video, without its suffix."""
    image: str
    """The photo: a path, or a URL that fsspec reads."""
    prompt: str
    """Text that says what happens in the video."""
    motion: str | None = None
    """The user's own clip in place of Stage I, as for ``swifti2v refine``."""
    model: str = "nano"
    """See ``SwiftI2VPipeline.from_pretrained``."""
    seed: int
    """Seed of the initial noise; by default it follows from the id."""
    fit: Literal["crop", "pad"] | None = None
    """Way to fit a photo of another aspect."""
    background: str | None = None
    """Colour behind a see-through photo."""
    loras: tuple[LoraSource, ...] = ()
    """LoRAs to merge after the model's own."""
    truncate_prompt: bool = False
    """Whether to cut a prompt that is over the limit."""
    codec: CodecName | None = None
    """Video codec."""
    crf: int | None = None
    """Quality of the compression; lower is better and larger."""
    ten_bit: bool = False
    """Whether to store 10 bits a colour."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Nested fields of ``GenerationConfig`` that are asked for."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.id):
            raise ConfigError(
                f"id {self.id!r} cannot name a file; use letters, digits, '_', '-', '.' and spaces, "
                "at most 120"
            )
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0")
        if self.codec == "png":
            raise ConfigError(
                "codec png makes a folder of pictures; take ffv1 for a lossless video"
            )

    def to_request(self, output: Path, machine: "Machine", files: "RowFiles") -> ClipRequest:
        """The request that ``swifti2v.jobs.resolve`` takes."""
        return ClipRequest(
            command="refine" if self.motion else "generate",
            output=output,
            image=files.image,
            motion=files.motion,
            prompt=self.prompt,
            model=self.model,
            seed=self.seed,
            layers=((f"clip {self.id}", self.changes),),
            fit=self.fit,
            background=self.background,
            loras=self.loras,
            truncate_prompt=self.truncate_prompt,
            codec=self.codec,
            crf=self.crf,
            ten_bit=self.ten_bit,
            device=machine.device,
            dtype=machine.dtype,
            placement=machine.placement,
            memory=machine.memory,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFiles:
    """Files of a row on this machine."""

    image: Path
    motion: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The way in which every clip is computed; see the fields of ``ClipRequest``."""

    device: str | None = None
    dtype: str | None = None
    placement: Placement | None = None
    memory: str | None = None


OWN = {item.name for item in fields(ClipRow)} - {"changes"}


def read_rows(path: Path, defaults: Mapping[str, Any]) -> list[ClipRow]:
    """Read a manifest and check every row; no photo is opened.

    Args:
        path: A ``.csv`` or ``.jsonl``. Columns are the fields of ``ClipRow`` (``image`` and
            ``prompt`` are needed) and settings by their path (``stage2.segment_size``) or short
            name (``num_frames``). Relative paths start at its folder.
        defaults: Nested values for what a row leaves open.

    Raises:
        InputError: The manifest, a file that it names or an id cannot be used.
        ConfigError: An unknown column or a bad value; the message names row and column.
    """
    if path.suffix not in READERS or not path.is_file():
        raise InputError(
            f"manifest {path} is not there or not of a known kind; give .csv or .jsonl"
        )
    rows = [
        make_row(
            _parse_cells(values) if path.suffix == ".csv" else values, source, path.parent, defaults
        )
        for number, values in enumerate(READERS[path.suffix](path), 1)
        if (source := f"{path}, row {number}")
    ]
    if not rows:
        raise InputError(f"manifest {path} has no rows; add a clip")
    require_distinct(rows)
    for model in {row.model for row in rows}:
        find_model(model)
    return rows


def make_row(
    values: Mapping[str, Any], source: str, root: Path, defaults: Mapping[str, Any]
) -> ClipRow:
    """A row from its columns.

    Args:
        values: Values by column; None is left open.
        source: Named in errors.
        root: Folder from which relative paths start.
        defaults: Nested values for what is left open.

    Raises:
        InputError: A file is not there, or the id cannot be a file name.
        ConfigError: An unknown column or a bad value.
    """
    nested = merge(defaults, expand_shorthands(values))
    own = {name: nested.pop(name) for name in list(nested) if name in OWN}
    parse_config(GenerationConfig, nested, source)
    if "image" in own:
        own.setdefault("id", Path(str(own["image"])).stem)
    own.setdefault("seed", _seed_of(str(own.get("id"))))
    if isinstance(own.get("loras"), str):
        own["loras"] = [{"path": own["loras"]}]
    for name in FILES:
        if isinstance(own.get(name), str):
            own[name] = _find(own[name], root, f"{source}: {name}")
    return parse_config(ClipRow, {**own, "changes": nested}, source)


def require_distinct(rows: Sequence[ClipRow]) -> None:
    """Refuse ids that come twice, also where only capitals differ.

    Raises:
        InputError: Naming the ids.
    """
    counts = Counter(row.id.casefold() for row in rows)
    if twice := sorted(row.id for row in rows if counts[row.id.casefold()] > 1):
        raise InputError(
            f"id {twice[0]!r} comes {counts[twice[0].casefold()]} times: give each row an id of its "
            "own (without one, a row takes the name of its photo)"
        )


def _parse_cells(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a CSV's row; empty cells are left open."""
    cells = {name: cell for name, cell in values.items() if cell not in (None, "")}
    return {name: cell if name in TEXTS else yaml.safe_load(cell) for name, cell in cells.items()}


def _find(name: str, root: Path, what: str) -> str:
    if "://" in name:
        return name
    path = root / Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"{what} {path} does not exist; check the path")
    return str(path)


def _seed_of(name: str) -> int:
    """A seed that every run of the manifest gives the same clip."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
