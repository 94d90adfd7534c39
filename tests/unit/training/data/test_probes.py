"""Facts about media that are looked up once."""

import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from swifti2v.errors import MediaError
from swifti2v.training.data.buckets import BucketRules, assign_buckets, probe
from swifti2v.training.data.probes import Probes
from swifti2v.training.data.samples import TarMember
from tests.helpers.training_clips import sample_of, save_counting_clip, save_picture


def test_a_second_start_looks_into_nothing(tmp_path):
    path = save_counting_clip(tmp_path / "a.mkv", 9)
    clip = sample_of(path)
    reference = save_counting_clip(tmp_path / "low.mkv", 9, height=8, width=12)
    pair = sample_of(path, id="pair", reference=reference)
    picture = sample_of(save_picture(tmp_path / "p.png"))
    samples = (clip, pair, picture)
    rules = BucketRules(buckets=((9, 32, 48), (1, 32, 48)))
    with Probes(tmp_path / "probes") as look:
        first = assign_buckets(samples, rules, look=look)
    assert look.num_new == 3
    assert first == assign_buckets(samples, rules)
    with Probes(tmp_path / "probes") as again:
        assert assign_buckets(samples, rules, look=again) == first
    assert again.num_new == 0


def test_a_changed_file_is_looked_into_again(tmp_path):
    sample = sample_of(save_counting_clip(tmp_path / "a.mkv", 9))
    with Probes(tmp_path / "probes") as look:
        assert look(sample).num_frames == 9
    save_counting_clip(tmp_path / "a.mkv", 11)
    with Probes(tmp_path / "probes") as look:
        assert look(sample).num_frames == 11
    stat = (tmp_path / "a.mkv").stat()
    os.utime(tmp_path / "a.mkv", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with Probes(tmp_path / "probes") as look:
        assert look(sample) == probe(sample)
        assert look.num_new == 1


def test_what_cannot_be_read_is_not_remembered(tmp_path):
    path = tmp_path / "a.mkv"
    for content in (None, b"no clip"):
        if content is not None:
            path.write_bytes(content)
        with Probes(tmp_path / "probes") as look, pytest.raises(MediaError, match=r"a\.mkv"):
            look(sample_of(path))
    save_counting_clip(path, 9)
    with Probes(tmp_path / "probes") as look:
        assert look(sample_of(path)).num_frames == 9


def test_members_of_an_archive_are_told_apart(tmp_path):
    samples = []
    with tarfile.open(tmp_path / "clips.tar", "w") as archive:
        for num_frames in (9, 11):
            data = save_counting_clip(tmp_path / "clip.mkv", num_frames).read_bytes()
            info = tarfile.TarInfo(f"{num_frames}.mkv")
            info.size = len(data)
            offset = archive.offset + tarfile.BLOCKSIZE
            archive.addfile(info, io.BytesIO(data))
            member = TarMember(
                archive=tmp_path / "clips.tar", member=info.name, offset=offset, num_bytes=len(data)
            )
            samples.append(sample_of(tmp_path / info.name, media=member))
    for num_new in (2, 0):
        with Probes(tmp_path / "probes") as look:
            assert [look(sample).num_frames for sample in samples] == [9, 11]
        assert look.num_new == num_new


def test_what_an_index_knows_is_not_looked_into(tmp_path):
    samples = [sample_of(save_counting_clip(tmp_path / f"{n}.mkv", n), id=str(n)) for n in (9, 11)]
    with Probes(tmp_path / "index") as index:
        index(samples[0])
    with Probes(tmp_path / "own", [tmp_path / "index", tmp_path / "gone"]) as look:
        assert [look(sample).num_frames for sample in samples] == [9, 11]
    assert look.num_new == 1
    with Probes(tmp_path / "own") as own:  # only what the index did not know
        assert [own.find(sample) is None for sample in samples] == [True, False]


def test_many_are_looked_into_at_once_and_the_unreadable_are_named(tmp_path):
    (tmp_path / "bad.mkv").write_bytes(b"no clip")
    paths = [save_counting_clip(tmp_path / f"{n}.mkv", n) for n in (9, 11, 12)]
    samples = [sample_of(path, id=path.name) for path in (*paths, tmp_path / "bad.mkv")]
    seen: list[int] = []
    with Probes(tmp_path / "probes") as look, ThreadPoolExecutor(2) as executor:
        look(samples[1])
        (reject,) = look.look_into(samples, executor, seen.append)
    assert reject.id == "bad.mkv"
    assert reject.reason.startswith("cannot be read: ")
    assert (look.num_new, seen) == (3, [4])
    assert [look.find(sample) for sample in samples[:3]] == [probe(s) for s in samples[:3]]


def test_processes_see_what_others_wrote(tmp_path):
    samples = [sample_of(save_counting_clip(tmp_path / f"{n}.mkv", n), id=str(n)) for n in (9, 11)]
    first, second = Probes(tmp_path / "probes"), Probes(tmp_path / "probes")
    first(samples[0])
    second(samples[1])
    for look in (first, second):
        look.refresh()
    first.refresh()
    for look in (first, second):
        assert None not in [look.find(sample) for sample in samples]
