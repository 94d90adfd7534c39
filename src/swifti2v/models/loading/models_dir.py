"""Files that people have: a folder such as ComfyUI's ``models`` or a cache of the Hub."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from swifti2v.errors import ConfigError, LoadingError
from swifti2v.models.weights.headers import CONTROL, SHARD, list_shards

VARIABLE = "SWIFTI2V_MODELS_DIR"
"""Environment variable with the folder, which ``--models-dir`` sets."""
PROCESSOR = "preprocessor_config.json"
"""File of an image processor, which has no weights."""
UNFINISHED = (".part", ".crdownload", ".download", ".incomplete", ".tmp", CONTROL)
"""Suffixes of files that are not finished."""
WEIGHTS = (".safetensors", ".gguf", ".pth", ".pt", ".bin")
TOKENIZERS = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model")


def models_dir() -> Path | None:
    """Folder in which files are looked for before the Hub is asked; None without one.

    Raises:
        ConfigError: It is no folder.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} (--models-dir or {VARIABLE}) is not a folder; name one such as ComfyUI/models"
        )
    return folder


def find_in(folder: Path, source: str, subfolder: str, also: Sequence[str] = ()) -> Path | None:
    """Find a source of the Hub in a folder of files.

    Args:
        folder: Searched with all folders below it.
        source: ``org/repo``, or ``org/repo/path/of/a/file``.
        subfolder: Folder below it.
        also: Other names of a file with the same weights.

    Returns:
        The file, or a folder that holds all it says; None if it is not there.

    Raises:
        LoadingError: Several different files have the name.
    """
    organization, name, *inside = source.split("/")
    inside = [part for part in (*inside, subfolder) if part]
    for place in _folders(folder, organization, name):
        found = place.joinpath(*inside)
        if found.exists() and is_complete(found):
            return found
    files = list_files(folder)
    for wanted in file_names(source, subfolder, also):
        matching = [path for path in files if path.name.lower() == wanted.lower()]
        if len({path.stat().st_size for path in matching}) > 1:
            raise LoadingError(
                f"{folder} holds several files of the name {wanted}: "
                f"{', '.join(str(path.relative_to(folder)) for path in matching)}; keep one of them"
            )
        if matching:
            return matching[0]
    return None


def file_names(source: str, subfolder: str, also: Sequence[str]) -> list[str]:
    """Names of single files that hold a source of the Hub, the likeliest first."""
    own = Path(source).name if not subfolder and Path(source).suffix in WEIGHTS else None
    return [*filter(None, [own]), *also]


def find_unfinished(folder: Path, names: Sequence[str]) -> Path | None:
    """Path of what a browser or downloader has left of a file before its end."""
    wanted = {f"{name}{suffix}".lower() for name in names for suffix in UNFINISHED}
    found = (
        Path(place) / name
        for place, _, files in os.walk(folder)
        for name in files
        if name.lower() in wanted
    )
    return next(found, None)


def _folders(folder: Path, organization: str, name: str) -> Iterator[Path]:
    """Folders that may be a repository: under its name, or in a cache of the Hub."""
    yield folder / organization / name
    yield folder / name
    for cache in (folder, folder / "hub"):
        yield from sorted((cache / f"models--{organization}--{name}").glob("snapshots/*"))


def list_files(folder: Path) -> list[Path]:
    """Files with weights below a folder, in the order of their paths; links are followed."""
    found = [
        Path(place) / name
        for place, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix in WEIGHTS
    ]
    return sorted(path for path in found if path.is_file())


def is_complete(place: Path) -> bool:
    """Whether a file is there, or all that a folder with a model or tokenizer must hold."""
    if not place.is_dir():
        return place.is_file()
    indexes = [*place.glob("*.index.json")]
    if any(not (place / shard).is_file() for file in indexes for shard in list_shards(file) or "?"):
        return False
    shards = [match for file in place.iterdir() if (match := SHARD.search(file.stem))]
    if any(len(shards) < int(match[2]) for match in shards):
        return False
    if (place / "tokenizer_config.json").is_file():
        return any((place / name).is_file() for name in TOKENIZERS)
    if (place / PROCESSOR).is_file() and not (place / "config.json").is_file():
        return True
    return any(path.suffix in WEIGHTS for path in place.rglob("*") if path.is_file())
