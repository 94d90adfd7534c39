"""The suite: prompts with photos, the videos to be made of them, and where those lie."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swifti2v.config import parse_config, settings
from swifti2v.errors import InputError
from swifti2v.evaluation.vbench.dimensions import CAMERA, DIMENSIONS
from swifti2v.storage import encode_text

MAX_SAMPLES = 5
"""Videos of a prompt that the official code looks for."""
SUFFIX = ".mp4"
MAX_NAME_BYTES = 240
"""Room for a sample number and a suffix within the 255 bytes of a file name."""


@settings
class SuiteEntry:
    """One prompt, with the official file's keys."""

    prompt_en: str
    """The prompt; names the video files too."""
    dimension: tuple[str, ...]
    """Dimensions its videos are measured for."""
    image_type: str
    """Such as ``animal``."""
    image_name: str
    """File name of the photo."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.dimension if name not in DIMENSIONS]:
            raise InputError(
                f"dimension {unknown[0]!r} is unknown; there are {', '.join(DIMENSIONS)}"
            )
        for name in (self.prompt_en, self.image_name):
            is_name = name.strip() and not set("/\0") & set(name)
            if not is_name or len(encode_text(name)) > MAX_NAME_BYTES:
                raise InputError(f"{name!r} cannot be part of a file name; shorten or rename it")


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteVideo:
    """A video of the suite, made or to be made."""

    entry: SuiteEntry
    """Entry with its prompt."""
    sample: int
    """Number of the sample, from 0; each has its own noise."""

    @property
    def name(self) -> str:
        """File name, as the official code expects it."""
        return f"{self.entry.prompt_en}-{self.sample}{SUFFIX}"


def read_suite(path: Path) -> tuple[SuiteEntry, ...]:
    """Read ``vbench2_i2v_full_info.json``, or a list of entries like it.

    Raises:
        InputError: The file cannot be read, is no such list, or two entries share a prompt.
        ConfigError: An entry has an unknown or missing key.
    """
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"suite {path}: {error.strerror}; check the path") from None
    except ValueError as error:
        raise InputError(f"suite {path} is not JSON ({error})") from None
    if not isinstance(values, list) or not values:
        raise InputError(f"suite {path} must be a list with at least one entry")
    entries = []
    for number, value in enumerate(values, start=1):
        place = f"suite {path}, entry {number}"
        try:
            entries.append(parse_config(SuiteEntry, value, place))
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
    prompts = [entry.prompt_en for entry in entries]
    if twice := next((prompt for prompt in prompts if prompts.count(prompt) > 1), None):
        raise InputError(f"suite {path} has the prompt {twice!r} twice, so videos share a name")
    return tuple(entries)


def select_entries(
    entries: Sequence[SuiteEntry], dimensions: Collection[str]
) -> tuple[SuiteEntry, ...]:
    """Entries that are measured for at least one of the dimensions.

    Raises:
        InputError: No entry is measured for them.
    """
    chosen = tuple(entry for entry in entries if not set(dimensions).isdisjoint(entry.dimension))
    if not chosen:
        raise InputError(f"no entry of the suite is measured for {', '.join(dimensions)}")
    return chosen


def without_camera(dimensions: Sequence[str]) -> tuple[str, ...]:
    """All dimensions but camera motion."""
    return tuple(name for name in dimensions if name != CAMERA)


def list_videos(entries: Sequence[SuiteEntry], num_samples: int) -> list[SuiteVideo]:
    """List every sample of every entry; the first samples of all entries come first.

    Raises:
        InputError: ``num_samples`` is not in 1 .. 5.
    """
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise InputError(f"--samples is {num_samples}; VBench takes 1 to {MAX_SAMPLES}")
    return [
        SuiteVideo(entry=entry, sample=sample) for sample in range(num_samples) for entry in entries
    ]


def find_photos(entries: Sequence[SuiteEntry], images: Path, ratio: str) -> dict[str, Path]:
    """Photos by name: the crops in the folder of one ratio, as in VBench's ``data/crop``.

    Raises:
        InputError: The folder, or a photo in it, is missing.
    """
    folder = images / ratio
    if not folder.is_dir():
        raise InputError(
            f"folder {folder} does not exist: --images must hold a folder for every ratio, as "
            "VBench's data/crop"
        )
    photos = {entry.image_name: folder / entry.image_name for entry in entries}
    require_files(list(photos.values()), "photos", f"{folder}; download the suite's images")
    return photos


def find_videos(
    entries: Sequence[SuiteEntry], num_samples: int, folder: Path
) -> list[tuple[SuiteVideo, Path]]:
    """The videos of a suite in a folder that holds just these.

    Raises:
        InputError: The folder is missing or empty, a video is not there, or there are other files.
    """
    if not folder.is_dir():
        raise InputError(f"folder {folder} does not exist; give the folder of videos")
    videos = [(video, folder / video.name) for video in list_videos(entries, num_samples)]
    if not any(folder.iterdir()):
        raise InputError(f"folder {folder} is empty; make videos with 'swifti2v vbench generate'")
    remedy = f"{folder}; finish 'swifti2v vbench generate', or ask for fewer --samples"
    require_files([path for _, path in videos], "videos", remedy)
    return videos


def require_files(paths: Sequence[Path], kind: str, place: str) -> None:
    """Refuse a set of files if some are missing.

    Raises:
        InputError: Files are missing; the message names the first five.
    """
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        more = " ..." if len(missing) > 5 else ""
        raise InputError(
            f"{len(missing)} of {len(paths)} {kind} are missing ({', '.join(missing[:5])}{more}) "
            f"in {place}"
        )
