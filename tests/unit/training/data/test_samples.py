"""Places of media, and ways to open it."""

import pickle
import tarfile
from pathlib import Path

import av
import pytest

from swifti2v.errors import MediaError
from swifti2v.media import probe_clip
from swifti2v.training.data.buckets import probe
from swifti2v.training.data.readers import read_manifest
from swifti2v.training.data.samples import Reject, Sample, TarMember, local_media
from tests.helpers.training_clips import sample_of, save_counting_clip


@pytest.fixture
def in_tar(tmp_path: Path) -> Sample:
    clip = save_counting_clip(tmp_path / "a.mp4", 9)
    clip.with_suffix(".txt").write_text("counting")
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for path in (clip.with_suffix(".txt"), clip):
            archive.add(path, path.name)
    (sample,) = read_manifest(tmp_path / "shard.tar").samples
    return sample


def test_a_file_opens_as_its_path(tmp_path: Path) -> None:
    sample = sample_of(save_counting_clip(tmp_path / "a.mkv", 3))
    assert sample.open() == tmp_path / "a.mkv"
    with local_media(sample) as path:
        assert path == tmp_path / "a.mkv"


def test_a_member_opens_as_a_file_that_av_reads(in_tar: Sample, tmp_path: Path) -> None:
    media = in_tar.open()
    assert not isinstance(media, Path)
    with media, av.open(media, "r") as container:
        assert len(list(container.decode(video=0))) == 9
    with local_media(in_tar) as path:
        assert probe_clip(path).num_frames == 9
        assert path.read_bytes() == (tmp_path / "a.mp4").read_bytes()
    assert not path.exists()


def test_samples_reach_other_processes(in_tar: Sample) -> None:
    copy = pickle.loads(pickle.dumps(in_tar))
    assert copy == in_tar
    assert probe(copy).num_frames == 9


def test_errors_name_the_sample_and_its_place(in_tar: Sample, tmp_path: Path) -> None:
    archive = tmp_path / "shard.tar"
    media = in_tar.media
    assert isinstance(media, TarMember)
    data = bytearray(archive.read_bytes())
    data[media.offset : media.offset + 200] = bytes(200)
    archive.write_bytes(data)
    with pytest.raises(MediaError) as error:
        probe(in_tar)
    assert str(error.value).startswith(f"sample shard.tar/a: {archive}/a.mp4 cannot be read")
    archive.write_bytes(data[: media.offset + 100])
    with pytest.raises(MediaError, match=r"sample shard\.tar/a: .*is cut off within a\.mp4"):
        probe(in_tar)
    archive.unlink()
    with pytest.raises(MediaError, match=r"sample shard\.tar/a: .*No such file"):
        probe(in_tar)


def test_a_cause_is_the_reason_without_detail() -> None:
    assert Reject("a", "too short: it has 8: frames").cause == "too short"
    assert Reject("a", "damaged").cause == "damaged"
