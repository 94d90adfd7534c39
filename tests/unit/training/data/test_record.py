"""Record of a training's data: another caption, row or clip is named, a copy is the same."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from swifti2v.errors import InputError
from swifti2v.training.data.buckets import BucketRules
from swifti2v.training.data.clips import DataConfig, ManifestClips, ManifestConfig
from swifti2v.training.data.record import (
    DATA_NAME,
    describe_clips,
    describe_files,
    read_record,
    require_same_clips,
    require_same_data,
)
from swifti2v.training.data.samples import MediaFile, TarMember
from swifti2v.training.engine.session import Session
from tests.helpers.regression import ALONE
from tests.helpers.training_clips import save_counting_clip

NAMES = ("a", "b", "c")
RULES = BucketRules(buckets=((5, 32, 48),))


def write_rows(folder: Path, **changes: object) -> None:
    """A table of three clips; ``changes`` are of the second row, which None takes out."""
    rows = [{"video": f"{name}.mkv", "prompt": f"clip {name}"} for name in NAMES]
    rows[1].update(changes)  # type: ignore[arg-type]
    lines = [json.dumps(row) + "\n" for row in rows if row["video"] is not None]
    (folder / "list.jsonl").write_text("".join(lines))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        save_counting_clip(tmp_path / "data" / f"{name}.mkv", 6 + number)
    write_rows(tmp_path / "data")
    return tmp_path / "data"


def read(folder: Path) -> tuple[ManifestClips, ...]:
    data = DataConfig(manifests=(ManifestConfig(path=str(folder / "list.jsonl")),), rules=RULES)
    return (ManifestClips(data, 2, 0, "stop"),)


def begin(folder: Path, run: Path) -> Session:
    """A run that has a checkpoint."""
    session = Session(directory=run, ranks=ALONE, resume=True)
    require_same_clips(read(folder), session)
    checkpoint = run / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (run / "checkpoints" / "latest").write_text(checkpoint.name)
    return session


def take_b_out(folder: Path) -> None:
    write_rows(folder, video=None)


def add_a_clip(folder: Path) -> None:
    save_counting_clip(folder / "d.mkv", 9)
    with (folder / "list.jsonl").open("a") as file:
        file.write('{"video": "d.mkv", "prompt": "new"}\n')


def replace_b(folder: Path) -> None:
    save_counting_clip(folder / "b.mkv", 7, fps=15)


def flip_a_byte_of_b(folder: Path) -> None:
    data = bytearray((folder / "b.mkv").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "b.mkv").write_bytes(data)


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (take_b_out, "1 sample gone (b.mkv)"),
    (add_a_clip, "1 sample new (d.mkv)"),
    (lambda folder: write_rows(folder, prompt="other"), "1 sample with another caption (b.mkv)"),
    (lambda folder: write_rows(folder, weight=2), "1 sample with other times, size or weight (b"),
    (
        lambda folder: write_rows(folder, end=0.4),
        "1 sample gone (b.mkv); 1 sample new (b.mkv#-0.4)",
    ),
    (replace_b, "1 sample with other content (b.mkv)"),
    (flip_a_byte_of_b, "1 sample with other content (b.mkv)"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_change_is_refused_or_said(folder, tmp_path, caplog, change, message):
    session = begin(folder, tmp_path / "run")
    before = (session.directory / DATA_NAME).read_bytes()
    change(folder)

    with pytest.raises(InputError) as caught:
        require_same_clips(read(folder), session)
    assert message in str(caught.value)
    assert "continue on other data with --allow-changed-data" in str(caught.value)
    assert (session.directory / DATA_NAME).read_bytes() == before  # and is refused again

    require_same_clips(read(folder), replace(session, allows_changed_data=True))
    assert f"continuing on changed data: {message}" in caplog.text
    require_same_clips(read(folder), session)  # the record is of the new data


def test_a_copy_of_other_times_is_the_same_data(folder, tmp_path):
    session = begin(folder, tmp_path / "run")
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, (1, 1))
    require_same_clips(read(tmp_path / "copy"), session)


def test_files_with_a_known_stamp_are_not_opened(folder, monkeypatch):
    clips = read(folder)
    known = describe_clips(clips)

    def open_(self: MediaFile) -> str:
        raise AssertionError(f"{self.path} is opened")

    monkeypatch.setattr(MediaFile, "fingerprint", open_)
    assert describe_clips(clips, known) == known
    with pytest.raises(AssertionError):
        describe_clips(clips)


def test_a_run_without_a_checkpoint_may_begin_on_other_data(folder, tmp_path):
    session = Session(directory=tmp_path / "run", ranks=ALONE, resume=True)
    require_same_clips(read(folder), session)
    take_b_out(folder)
    require_same_clips(read(folder), session)
    assert len(read_record(session.directory) or {}) == 2


def test_a_run_of_before_there_were_records_says_so(folder, tmp_path, caplog):
    session = begin(folder, tmp_path / "run")
    (session.directory / DATA_NAME).unlink()
    require_same_clips(read(folder), session)
    assert "does not name the data of its start" in caplog.text
    assert (session.directory / DATA_NAME).is_file()


def test_a_damaged_record_names_the_remedy(folder, tmp_path):
    session = begin(folder, tmp_path / "run")
    (session.directory / DATA_NAME).write_text("[")
    with pytest.raises(InputError, match="delete it to continue without knowing"):
        require_same_clips(read(folder), session)


def test_many_changes_are_counted_and_some_named(folder, tmp_path):
    files = [folder / f"{number}.jpg" for number in range(5)]
    for path in files:
        path.write_bytes(b"x")
    require_same_data(tmp_path / "run", describe_files(files, folder), is_begun=False)
    now = describe_files(files[:1], folder)
    with pytest.raises(InputError, match=r"4 samples gone \(1.jpg, 2.jpg, 3.jpg, ...\); ask again"):
        require_same_data(tmp_path / "run", now, is_begun=True, remedy="ask again")


def test_a_member_of_an_archive_is_told_by_its_own_bytes(folder, tmp_path):
    with tarfile.open(tmp_path / "clips.tar", "w") as archive:
        for name in NAMES:
            archive.add(folder / f"{name}.mkv", f"{name}.mkv")
    with tarfile.open(tmp_path / "clips.tar") as archive:
        members = archive.getmembers()
    for name, member in zip(NAMES, members, strict=True):
        own = TarMember(
            archive=tmp_path / "clips.tar",
            member=member.name,
            offset=member.offset_data,
            num_bytes=member.size,
        )
        assert own.fingerprint() == MediaFile(folder / f"{name}.mkv").fingerprint()
