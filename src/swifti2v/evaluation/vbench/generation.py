"""Make the videos of the suite: resumable, in shards, every file whole or not there."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from swifti2v.config import GenerationConfig, parse_config, settings, to_dict
from swifti2v.errors import InputError
from swifti2v.evaluation.vbench.photos import PhotoFit
from swifti2v.evaluation.vbench.suite import SUFFIX, SuiteVideo
from swifti2v.jobs.check import check
from swifti2v.jobs.interruption import Interruption
from swifti2v.jobs.request import ClipRequest
from swifti2v.jobs.resolve import resolve
from swifti2v.jobs.run import run
from swifti2v.models.text import tokenize_prompts
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.storage import require_same_settings, whole_file, write_whole

VIDEOS, RECORD = "videos", "generation.json"
"""Folder of the videos, and beside it (the official code wants videos only) how they were made."""
CRF = 10
"""Near lossless, as VBench's own examples: detail metrics must not measure the codec."""


@settings
class GenerationRecord:
    """Settings that decide the videos of a suite; kept beside them and copied into results."""

    version: str
    """Version of this package."""
    sampling_version: int = 1
    """See ``swifti2v.sampling.SAMPLING_VERSION``; 1 for records that do not state it."""
    suite_sha256: str
    """SHA-256 of the suite's file."""
    num_samples: int
    """Videos of a prompt."""
    has_camera: bool
    """Whether the prompts for camera motion are part of it."""
    model: str
    """See ``SwiftI2VPipeline.from_pretrained``."""
    seed: int
    """Seed of the first sample; the next samples take the next seeds."""
    photo_fit: PhotoFit
    """Fitting of the photos."""
    crf: int
    """Quality of the compression; lower is better."""
    config: GenerationConfig
    """All other settings."""


def open_output(folder: Path, record: GenerationRecord) -> None:
    """Make the output folder, or check that the existing one has the same settings.

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
    """Read the settings that made the videos of a folder; None without a record.

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
        raise InputError(f"{path} is damaged ({error}); use another output folder") from None
    return parse_config(GenerationRecord, values, str(path))


def require_prompts(pipe: SwiftI2VPipeline, videos: Sequence[SuiteVideo]) -> None:
    """Refuse prompts that the text encoder would have to cut.

    Raises:
        PromptError: A prompt is too long.
    """
    prompts = [video.entry.prompt_en for video in videos]
    tokenize_prompts(pipe.components.tokenizer, prompts, pipe.components.max_text_length)


def take_shard(videos: Sequence[SuiteVideo], index: int, num_shards: int) -> list[SuiteVideo]:
    """Take every ``num_shards``-th video, from the ``index``-th (from 1) on."""
    return list(videos[index - 1 :: num_shards])


def request_video(record: GenerationRecord, video: SuiteVideo, photo: Path) -> ClipRequest:
    """One video as a job that ``swifti2v generate`` could have been asked for.

    The photo is a crop of the ratio of ``record.photo_fit``.
    """
    return ClipRequest(
        command="generate",
        output=Path(video.name),
        image=photo,
        prompt=video.entry.prompt_en,
        model=record.model,
        seed=record.seed + video.sample,
        layers=((RECORD, to_dict(record.config)),),
        codec="h264",
        crf=record.crf,
    )


def generate_videos(
    pipe: SwiftI2VPipeline,
    requests: Sequence[ClipRequest],
    folder: Path,
    on_video: Callable[[str, bool], None] | None = None,
    interruption: Interruption | None = None,
) -> int:
    """Make those videos that are not there yet, with their settings; returns how many were made.

    Outputs of the requests are names in the folder of videos. ``on_video`` is called for every
    name, with whether it was made now.
    """
    num_made = 0
    for request in requests:
        path = folder / VIDEOS / request.output
        is_missing = not path.is_file()
        if is_missing:
            with whole_file(path, SUFFIX) as unfinished:
                job = check(resolve(replace(request, output=unfinished)), pipe)
                run(job, interruption=interruption)
            num_made += 1
        if on_video is not None:
            on_video(path.name, is_missing)
    return num_made
