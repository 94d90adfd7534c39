"""``swifti2v data index``: what it reads no training and no inspection reads again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swifti2v.training.data.buckets import BucketRules
from swifti2v.training.data.clips import DataConfig, ManifestConfig
from swifti2v.training.data.phases import ClipsPhase, find_clips
from swifti2v.training.engine.ranks import Ranks
from swifti2v.training.engine.run_config import RunConfig
from tests.helpers.command_line import succeed, swifti2v
from tests.helpers.training_clips import save_counting_clip

NUM_CLIPS = 5
RULES = BucketRules(buckets=((5, 32, 48),))
ALONE = Ranks.alone(torch.device("cpu"))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for number in range(NUM_CLIPS):
        save_counting_clip(folder / f"{number}.mkv", 9 + number)
    rows = [{"video": f"{number}.mkv", "prompt": "it brightens"} for number in range(NUM_CLIPS)]
    (folder / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "clips.jsonl"


def index(*words: object) -> dict[str, Any]:
    result = succeed(swifti2v("data", "index", *map(str, words), "--workers", "1", "--json"))
    account: dict[str, Any] = json.loads(result.stdout)
    return account


def clips_of(manifest: Path, directory: Path) -> Any:
    data = DataConfig(manifests=(ManifestConfig(path=str(manifest)),), rules=RULES)
    phases = (ClipsPhase(steps=1, data=data),)
    (clips,) = find_clips(phases, 0, RunConfig(batch_size=1), directory, ALONE)
    return clips


def test_a_training_looks_into_nothing_that_is_indexed(manifest: Path, tmp_path: Path) -> None:
    unindexed = clips_of(manifest, tmp_path / "without").placements
    assert (tmp_path / "without" / "probes").is_dir()
    account = index(manifest)
    assert account["directory"] == str(manifest.with_name("clips.jsonl.index"))
    assert (account["read"], account["known"], account["rejects"]) == (NUM_CLIPS, 0, [])
    assert clips_of(manifest, tmp_path / "with").placements == unindexed
    assert not (tmp_path / "with" / "probes").exists()  # nothing was found out


def test_an_index_in_a_cache_is_used_too(manifest: Path, tmp_path: Path) -> None:
    index(manifest, "--output-dir", tmp_path / "cache")
    before = sorted((tmp_path / "cache" / "probes").iterdir())
    assert len(clips_of(manifest, tmp_path / "cache").placements) == NUM_CLIPS
    assert sorted((tmp_path / "cache" / "probes").iterdir()) == before


def test_parts_make_one_index_and_only_changes_are_read_again(manifest: Path) -> None:
    (manifest.parent / "3.mkv").write_bytes(b"no clip")
    parts = [index(manifest, "--shard", f"{number}/3") for number in (1, 2, 3)]
    assert sum(part["read"] for part in parts) == NUM_CLIPS - 1
    assert [reject["id"] for part in parts for reject in part["rejects"]] == ["3.mkv"]
    save_counting_clip(manifest.parent / "3.mkv", 12)
    save_counting_clip(manifest.parent / "0.mkv", 20)
    whole = index(manifest)
    assert (whole["read"], whole["known"], whole["rejects"]) == (2, NUM_CLIPS - 2, [])
