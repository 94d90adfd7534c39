"""Stage-transition samples on disk: written whole, found again, never mixed up."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from swifti2v.errors import InputError
from swifti2v.media import open_writer
from swifti2v.storage import UNFINISHED, require_same_settings, whole_file, write_whole
from swifti2v.training.transition.samples import TransitionSample

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.jsonl"
"""Manifest of the samples of all parts."""
CLIPS_DIR = "clips"
"""Folder of the samples, below the output directory."""
MAX_STEM = 120
"""Characters of an id that its file name keeps."""


class TransitionStore:
    """Finished samples below ``directory/clips``: a lossless clip and a record for each.

    Clip and record are written under other names, synced and renamed, the record last: a sample
    with a record is whole, and a killed run leaves nothing else that counts.
    """

    def __init__(self, directory: Path) -> None:
        if directory.exists() and not directory.is_dir():
            raise InputError(f"output dir {directory} is a file; name a directory")
        self.directory = directory

    def clip_path(self, sample_id: str) -> Path:
        """Path of a sample's clip, present or future; the record lies beside it as ``.json``."""
        return self.directory / CLIPS_DIR / f"{file_stem(sample_id)}.mkv"

    def find(self, sample_id: str, parameters: Mapping[str, Any]) -> dict[str, Any] | None:
        """Record of a finished sample, or None; a damaged one counts as none, with a warning.

        ``parameters`` are all that decides it, as plain values.

        Raises:
            InputError: It was made with other parameters; the message names them.
        """
        clip = self.clip_path(sample_id)
        path = clip.with_suffix(".json")
        if not path.is_file():
            return None
        try:
            record = dict(json.loads(path.read_text(encoding="utf-8")))
            stored = {"id": record["id"], **record["parameters"]}
            num_bytes = int(record["clip_bytes"])
        except (ValueError, TypeError, KeyError):
            logger.warning("%s is damaged: the sample is made again", path)
            return None
        now = {"id": sample_id, **parameters}
        require_same_settings(stored, now, str(path), "another output dir")
        if not clip.is_file() or clip.stat().st_size != num_bytes:
            logger.warning("%s no longer has %d bytes: it is made again", clip, num_bytes)
            return None
        return record

    def save(
        self,
        sample_id: str,
        sample: TransitionSample,
        fps: float,
        parameters: Mapping[str, Any],
        origin: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Store a sample and return its record; ``origin`` are facts besides the parameters.

        Raises:
            MediaError: Nothing can be written.
        """
        clip = self.clip_path(sample_id)
        clip.parent.mkdir(parents=True, exist_ok=True)
        num_frames, height, width, _ = sample.frames.shape
        with (
            whole_file(clip, ending=clip.suffix) as aside,
            open_writer(aside, height=height, width=width, fps=fps, codec="ffv1") as writer,
        ):
            writer.write(sample.frames)
        frames = np.ascontiguousarray(sample.frames).tobytes()
        record = {
            "id": sample_id,
            "clip": clip.name,
            "clip_bytes": clip.stat().st_size,
            "frames_sha256": hashlib.sha256(frames).hexdigest(),
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "fps": fps,
            "sigma": sample.draw.sigma,
            "sigmas": list(sample.sigmas),
            "noise_seed": sample.draw.seed,
            "psnr": sample.psnr,
            "still_psnr": sample.still_psnr,
            "parameters": dict(parameters),
            **origin,
        }
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        write_whole(clip.with_suffix(".json"), text)
        return record

    def write_rows(
        self, rows: Sequence[Mapping[str, Any]], index: int, num_shards: int
    ) -> Path | None:
        """Write the rows of a part, and the training manifest once the rows of all parts exist.

        Returns:
            The manifest, or None if rows of other parts are missing or all parts are empty.

        Raises:
            MediaError: Nothing can be written.
        """
        parts = [
            self.directory / f"manifest-{number}-of-{num_shards}.jsonl"
            for number in range(1, num_shards + 1)
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if num_shards > 1:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_whole(parts[index - 1], text)
            if not all(part.is_file() for part in parts):
                return None
            text = "".join(part.read_text(encoding="utf-8") for part in parts)
        if not text:
            return None
        manifest = self.directory / MANIFEST_NAME
        write_whole(manifest, text)
        return manifest


def file_stem(sample_id: str) -> str:
    """File name for an id, another one for each id: unusual characters as ``%XX``, long ids cut."""
    stem = quote(os.fsencode(sample_id), safe=" ,+=@()[]")
    if len(stem) <= MAX_STEM and re.fullmatch(r"[^.].*", stem) and not stem.endswith(UNFINISHED):
        return stem
    return (
        f"{stem[:MAX_STEM].replace('.', '_')}-{hashlib.sha256(os.fsencode(sample_id)).hexdigest()}"
    )
