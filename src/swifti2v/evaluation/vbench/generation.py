"""Make the videos of the suite: resumable, in shards, every file whole or not there."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swifti2v.config import GenerationConfig, parse_config, settings, to_dict
from swifti2v.errors import InputError
from swifti2v.evaluation.vbench.photos import PhotoFit, load_photo
from swifti2v.evaluation.vbench.suite import SUFFIX, SuiteVideo
from swifti2v.media import open_writer
from swifti2v.models.text import tokenize_prompts
from swifti2v.pipelines.progress import OnProgress
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.storage import require_same_settings, whole_file, write_whole

VIDEOS, RECORD = "videos", "generation.json"
"""Folder of the videos, and beside it (the official code wants videos only) how they were made."""
CRF = 10
"""Near lossless, as VBench's own examples: detail metrics must not measure the codec."""


@settings
class GenerationRecord:
    """What decides the videos of a suite; kept beside them and copied into results."""

    version: str
    """Of this package."""
    sampling_version: int = 1
    """See ``swifti2v.sampling.SAMPLING_VERSION``; 1 where a record does not say it."""
    suite_sha256: str
    """Of the suite's file."""
    num_samples: int
    """Videos of a prompt."""
    has_camera: bool
    """Whether the prompts for camera motion are part of it."""
    model: str
    """See ``SwiftI2VPipeline.from_pretrained``."""
    seed: int
    """Of the first sample; the next ones have the next seeds."""
    photo_fit: PhotoFit
    """How photos were fitted."""
    crf: int
    """Compression."""
    config: GenerationConfig
    """All other settings."""


def open_output(folder: Path, record: GenerationRecord) -> None:
    """Make the output folder, or see that the one there was started with the same settings.

    Raises:
        InputError: It holds something else, or videos made with other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {folder} is a file; give a folder")
    before = read_record(folder)
    if before is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"output {folder} is not empty and holds no {RECORD}; choose another")
        (folder / VIDEOS).mkdir(parents=True, exist_ok=True)
        write_whole(folder / RECORD, json.dumps(to_dict(record), indent=1) + "\n")
        return
    (folder / VIDEOS).mkdir(exist_ok=True)
    require_same_settings(to_dict(before), to_dict(record), f"output {folder}", "another folder")


def read_record(folder: Path) -> GenerationRecord | None:
    """How the videos of a folder were made; None if nothing says so.

    Raises:
        InputError: The record is damaged.
        ConfigError: It has unknown keys.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error})") from None
    return parse_config(GenerationRecord, values, str(path))


def require_prompts(pipe: SwiftI2VPipeline, videos: Sequence[SuiteVideo]) -> None:
    """Refuse prompts that the text encoder would have to cut.

    Raises:
        PromptError: As said.
    """
    prompts = [video.entry.prompt_en for video in videos]
    tokenize_prompts(pipe.components.tokenizer, prompts, pipe.components.max_text_length)


def take_shard(videos: Sequence[SuiteVideo], index: int, num_shards: int) -> list[SuiteVideo]:
    """Every ``num_shards``-th video, from the ``index``-th (from 1) on."""
    return list(videos[index - 1 :: num_shards])


def generate_videos(
    pipe: SwiftI2VPipeline,
    videos: Sequence[SuiteVideo],
    photos: Mapping[str, Path],
    record: GenerationRecord,
    folder: Path,
    on_video: Callable[[SuiteVideo, bool], None] | None = None,
    on_progress: OnProgress | None = None,
) -> int:
    """Make those videos that are not there yet.

    Args:
        pipe: Both stages.
        videos: To be made.
        photos: By name, of the ratio of ``record.photo_fit``.
        record: Settings.
        folder: See ``open_output``.
        on_video: Called for every video, with whether it was made now.
        on_progress: See ``SwiftI2VPipeline.stream``.

    Returns:
        How many were made.
    """
    num_made = 0
    for video in videos:
        path = folder / VIDEOS / video.name
        is_missing = not path.is_file()
        if is_missing:
            _generate(pipe, video, photos[video.entry.image_name], record, path, on_progress)
            num_made += 1
        if on_video is not None:
            on_video(video, is_missing)
    return num_made


def _generate(
    pipe: SwiftI2VPipeline,
    video: SuiteVideo,
    photo: Path,
    record: GenerationRecord,
    path: Path,
    on_progress: OnProgress | None,
) -> None:
    """One video; no more than a segment of it is held."""
    config = record.config
    image = load_photo(photo, config.height, config.width)
    seed = record.seed + video.sample
    about: dict[str, Any] = {"prompt": video.entry.prompt_en, "seed": seed, "model": record.model}
    with (
        whole_file(path, SUFFIX) as unfinished,
        open_writer(
            unfinished,
            height=config.height,
            width=config.width,
            fps=config.fps,
            crf=record.crf,
            metadata={"comment": json.dumps(about, ensure_ascii=False)},
        ) as writer,
    ):
        for segment in pipe.stream(
            image, video.entry.prompt_en, generator=seed, config=config, on_progress=on_progress
        ):
            writer.write(segment.frames)
