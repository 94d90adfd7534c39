"""Reading of manifests: tables, folders, webdataset archives and Hugging Face datasets."""

import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, cast

from swifti2v.errors import InputError
from swifti2v.tables import read_csv, read_json_lines
from swifti2v.training.data.entries import (
    OPTIONAL_COLUMNS,
    Listing,
    Locate,
    find_layout,
    require_known,
    text_of,
)
from swifti2v.training.data.samples import (
    DatasetRow,
    Manifest,
    Media,
    MediaFile,
    MediaKind,
    TarMember,
    import_extra,
    load_dataset,
)

CLIP_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"})
PHOTO_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".avif", ".heic", ".heif"}
)
DATASET_FILES = ("dataset_dict.json", "state.json")
"""Files that ``save_to_disk`` of Hugging Face ``datasets`` writes."""


def read_manifest(
    path: str | Path, *, root: str | Path | None = None, split: str | None = None
) -> Manifest:
    """Read what there is to train on; media are not opened yet.

    ``path`` is one of:

    - a table (``.csv``, ``.jsonl``, ``.parquet``) with a column ``video`` or ``image`` (a path) and
      a column ``prompt``; also ``fps``, ``start`` and ``end`` (seconds), ``width``, ``height``,
      ``split``, ``weight``, ``source``, ``reference`` (a path) where known;
    - the table of OpenVid or UltraVideo, recognised by its header; files are found by their name
      anywhere below ``root``, and the prompt is ``caption`` or ``Summarized Description``;
    - a folder of clips and pictures with a ``.txt`` of the same name beside each; ``.tar`` archives
      in it are read too, files of other kinds are passed over;
    - a webdataset archive ``.tar``: for each key a clip or a picture with ``.txt``, or with a
      ``.json`` that has ``prompt`` or ``caption``, and the columns above where known;
    - a folder that ``save_to_disk`` of Hugging Face ``datasets`` wrote, with the columns above;
      media are paths, bytes, or the features ``Video`` and ``Image``.

    Args:
        path: File or folder.
        root: Folder from which relative paths start; by default that of ``path``.
        split: Read only what belongs to it; None reads everything.

    Returns:
        Samples in the order of the manifest (sorted by path in a folder), and rejects.

    Raises:
        InputError: There is nothing at ``path`` or nothing listed, columns are missing or unknown,
            two samples have one id, ``split`` is unknown, or an extra is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"manifest {path} does not exist; check the path")
    base = path if path.is_dir() else path.parent
    folder = Path(root) if root is not None else base
    if not folder.is_dir():
        raise InputError(f"root {folder} is not a folder; name the one that holds the media")
    listing = Listing(path, folder, split)
    _list(path, folder, listing)
    if not listing.ids:
        raise InputError(f"manifest {path} is empty; add clips or pictures")
    if not listing.samples and not listing.rejects:
        raise InputError(
            f"{path} has no split {split!r}; it has {', '.join(sorted(listing.splits))}"
        )
    return Manifest(tuple(listing.samples), tuple(listing.rejects))


def _list(path: Path, root: Path, listing: Listing) -> None:
    if path.is_dir():
        if any((path / name).is_file() for name in DATASET_FILES):
            return _list_dataset(path, root, listing)
        return _list_folder(path, listing)
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return _list_archive(path, path.name, listing)
    readers = {".csv": read_csv, ".jsonl": read_json_lines, ".parquet": _parquet_rows}
    if suffix not in readers:
        raise InputError(
            f"manifest {path} is of an unknown kind; give .csv, .jsonl, .parquet, .tar or a folder"
        )
    return _list_table(path, readers[suffix](path), root, listing)


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    pyarrow, parquet = import_extra("pyarrow"), import_extra("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a Parquet file that can be read: {error}") from error


def _list_table(
    path: Path, rows: Iterator[Mapping[str, Any]], root: Path, listing: Listing
) -> None:
    first = next(rows, None)
    if first is None:
        return
    layout = find_layout(path, first)
    locate = _by_name(root) if layout.is_by_name else _by_path(root)
    for number, row in enumerate(chain([first], rows), 1):
        require_known(path, row, layout)
        listing.add_row(row, layout, number, locate)


def _by_path(root: Path) -> Locate:
    def locate(column: str, cell: Any) -> Media | str:
        if not isinstance(cell, str):
            return f"bad path: {column} holds {type(cell).__name__}, not a path"
        return MediaFile(root / cell.strip())

    return locate


def _by_name(root: Path) -> Locate:
    index: dict[str, list[Path]] = {}
    for path in _walk(root):
        index.setdefault(path.name, []).append(path)

    def locate(_: str, cell: Any) -> Media | str:
        name = PurePosixPath(text_of(cell)).name
        found = index.get(name, [])
        if len(found) > 1:
            places = ", ".join(str(path.parent) for path in found[:3])
            return f"found more than once: {name} lies in {places}"
        return MediaFile(found[0]) if found else f"file not found: no {name} below {root}"

    return locate


def _walk(root: Path) -> Iterator[Path]:
    """All files below a folder, sorted; links to folders are followed, each folder once."""
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        yield from (Path(folder, name) for name in sorted(names))


def _kind_of(name: str) -> MediaKind | None:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in CLIP_SUFFIXES:
        return "video"
    return "image" if suffix in PHOTO_SUFFIXES else None


def _list_folder(folder: Path, listing: Listing) -> None:
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        kind = _kind_of(name)
        if path.suffix.lower() == ".tar":
            _list_archive(path, name, listing)
        elif kind is not None:
            caption = path.with_suffix(".txt")
            has_caption = caption.is_file()
            listing.add(
                name,
                {"prompt": _decode(caption.read_bytes())} if has_caption else {},
                MediaFile(path),
                kind,
                None if has_caption else f"no caption: no {caption.name} beside it",
            )


def _list_archive(archive: Path, name: str, listing: Listing) -> None:
    groups: dict[str, dict[str, Any]] = {}
    end = 0
    try:
        with tarfile.open(archive, "r:") as file:
            for member in file:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if not member.isfile():
                    continue
                folder, _, last = member.name.rpartition("/")
                stem, _, suffix = last.partition(".")
                group = groups.setdefault(f"{folder}/{stem}".lstrip("/"), {})
                if suffix in group:
                    raise InputError(f"{archive} holds {member.name} twice; remove one")
                group[suffix] = _read_member(archive, file, member)
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{archive} is not a plain tar archive ({error}); unpack it") from error
    # What is cut off between two members reads like a whole archive, but for the blocks at its end.
    if archive.stat().st_size <= end:
        raise InputError(f"{archive} is cut off; copy it again")
    for key, group in groups.items():
        _list_group(f"{name}/{key}", group, listing)


def _read_member(archive: Path, file: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    """Bytes of a text, or where anything else lies."""
    if PurePosixPath(member.name).suffix in (".txt", ".json"):
        return cast("Any", file.extractfile(member)).read()
    return TarMember(
        archive=archive, member=member.name, offset=member.offset_data, num_bytes=member.size
    )


def _list_group(id_: str, group: Mapping[str, Any], listing: Listing) -> None:
    media = [m for m in group.values() if isinstance(m, TarMember) and _kind_of(m.member)]
    values: dict[str, Any] = {}
    if "json" in group:
        try:
            record = json.loads(group["json"])
            values = {name: record.get(name) for name in OPTIONAL_COLUMNS}
            values["prompt"] = record.get("prompt") or record.get("caption")
        except (ValueError, AttributeError):
            listing.add(id_, {}, problem="bad json: it is not an object of JSON")
            return
    if "txt" in group:
        values["prompt"] = _decode(group["txt"])
    if len(media) != 1:
        problem = f"no media: the key has {len(media)} clips and pictures; it must have one"
        listing.add(id_, values, problem=problem)
        return
    listing.add(id_, values, media[0], _kind_of(media[0].member) or "video")


def _decode(data: bytes) -> str:
    """A caption; what is no UTF-8 is refused later, as the replacement character tells."""
    return data.decode("utf-8-sig", errors="replace")


def _list_dataset(directory: Path, root: Path, listing: Listing) -> None:
    datasets = import_extra("datasets")
    try:
        loaded = datasets.load_from_disk(str(directory))
    except Exception as error:  # of many libraries, on damaged files
        raise InputError(f"dataset {directory} cannot be loaded: {error}") from error
    for split in list(loaded) if isinstance(loaded, datasets.DatasetDict) else [None]:
        columns = load_dataset(directory, split).column_names
        layout = find_layout(directory, columns)
        require_known(directory, columns, layout)
        for index, row in enumerate(_dataset_rows(directory, split, set(layout.media))):
            row["split"] = row.get("split") or split
            id_ = f"{split or directory.name}/{index}"
            locate = _by_row(root, directory, split, index)
            listing.add_row(row, layout, index + 1, locate, id_)


def _dataset_rows(directory: Path, split: str | None, media: set[str]) -> Iterator[dict[str, Any]]:
    """Rows whose media cells hold a path, or True where the dataset holds the bytes."""
    for batch in load_dataset(directory, split).iter(batch_size=1000):
        names = batch.column_names
        rows = batch.select([name for name in names if name not in media]).to_pylist()
        rows = rows or [{} for _ in range(batch.num_rows)]
        for name in media.intersection(names):
            for row, cell in zip(rows, _cells(batch.column(name).chunks), strict=True):
                row[name] = cell
        yield from rows


def _cells(chunks: Iterable[Any]) -> Iterator[str | bool | None]:
    for chunk in chunks:  # not combined: that would copy the bytes
        kind = str(chunk.type)
        if kind in ("string", "large_string"):
            yield from chunk.to_pylist()
            continue
        is_record = kind.startswith("struct")
        has_bytes = (chunk.field("bytes") if is_record else chunk).is_valid().to_pylist()
        paths = chunk.field("path").to_pylist() if is_record else [None] * len(chunk)
        yield from (is_held or path for is_held, path in zip(has_bytes, paths, strict=True))


def _by_row(root: Path, directory: Path, split: str | None, index: int) -> Locate:
    by_path = _by_path(root)

    def locate(column: str, cell: Any) -> Media | str:
        if cell is True:
            return DatasetRow(directory=directory, split=split, index=index, column=column)
        return by_path(column, cell)

    return locate
