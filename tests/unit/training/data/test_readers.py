"""Samples read from each kind of manifest."""

import io
import json
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from swifti2v.errors import InputError
from swifti2v.training.data.readers import read_manifest
from swifti2v.training.data.samples import DatasetRow, Manifest, MediaFile, Sample, TarMember
from tests.helpers.training_clips import OPENVID, ULTRAVIDEO, save_csv

PLAIN = ("video", "image", "prompt", "fps", "start", "end", "width", "height", "split", "weight",
         "source", "reference")  # fmt: skip
FOLDER = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files are not opened by reading, so they hold nothing."""
    for name in ("a.mp4", "b.mp4", "deep/c.mp4", "p.png", "small.mp4"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def reasons(manifest: Manifest) -> dict[str, str]:
    return {reject.id: reject.reason for reject in manifest.rejects}


def content(sample: Sample) -> bytes:
    media = sample.open()
    assert not isinstance(media, Path)
    with media:
        return media.read()


def save_jsonl(path: Path, *rows: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_all_columns_of_a_csv(folder: Path) -> None:
    full = {"video": "a.mp4", "prompt": " A dog, \"Rex\",\nruns. ", "fps": "23.976", "start": "0.5",
            "end": "2", "width": "1920", "height": "1080.0", "split": "train", "weight": "2.5",
            "source": "own", "reference": "small.mp4"}  # fmt: skip
    manifest = read_manifest(
        save_csv(
            folder / "m.csv",
            PLAIN,
            [
                full,
                {"image": "p.png", "prompt": "x"},
                {"video": str(folder / "b.mp4"), "prompt": "y"},
            ],
        )
    )
    assert manifest.rejects == ()
    first, second, third = manifest.samples
    assert (first.id, first.kind, first.prompt) == (
        "a.mp4#0.5-2", "video", 'A dog, "Rex",\nruns.',
    )  # fmt: skip
    assert (first.fps, first.start, first.end) == (23.976, 0.5, 2.0)
    assert (first.width, first.height, first.weight) == (1920, 1080, 2.5)
    assert (first.split, first.source, first.reference) == ("train", "own", folder / "small.mp4")
    assert (second.id, second.kind, second.media) == ("p.png", "image", MediaFile(folder / "p.png"))
    assert (second.start, second.end, second.weight, second.split) == (0.0, None, 1.0, None)
    assert third.media == MediaFile(folder / "b.mp4")


def test_a_table_may_lie_elsewhere(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    table = save_csv(
        tmp_path_factory.mktemp("other") / "m.csv",
        PLAIN[:3],
        [{"video": "deep/c.mp4", "prompt": "x"}],
    )
    assert reasons(read_manifest(table))["deep/c.mp4"].startswith("file not found: ")
    (sample,) = read_manifest(table, root=folder).samples
    assert sample.media == MediaFile(folder / "deep" / "c.mp4")


def test_jsonl_with_numbers(folder: Path) -> None:
    path = save_jsonl(
        folder / "m.jsonl",
        {"video": "a.mp4", "prompt": "x", "weight": 3, "start": 1},
        {"image": "p.png", "prompt": "y", "width": None},
        {"video": "a.mp4", "prompt": "z"},
    )
    samples = read_manifest(path).samples
    assert [(s.id, s.weight, s.start) for s in samples] == [
        ("a.mp4#1-", 3.0, 1.0), ("p.png", 1.0, 0.0), ("a.mp4", 1.0, 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"video": "none.mp4"}, "file not found: "),
        ({"prompt": "  "}, "no caption: the prompt is empty"),
        ({"fps": "fast"}, "bad number: fps 'fast' is not a number"),
        ({"fps": "0"}, "bad number: fps 0 is out of range"),
        ({"weight": "-1"}, "bad number: weight -1 is out of range"),
        ({"weight": "nan"}, "bad number: weight nan is out of range"),
        ({"start": "-2"}, "bad number: start -2 is out of range"),
        ({"end": "inf"}, "bad number: end inf is out of range"),
        ({"start": "2", "end": "2"}, "bad number: end 2 is not after start 2"),
        ({"width": "10.5"}, "bad number: width 10.5 is not whole"),
        ({"reference": "gone.mp4"}, "reference not found: "),
        ({"video": "", "image": "p.png", "reference": "small.mp4"}, "bad reference: a picture"),
        ({"video": ""}, "no media: no video and image"),
        ({"image": "p.png"}, "no media: video and image are both given"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(folder, row, reason):
    good = {"video": "b.mp4", "prompt": "fine"}
    rows = [{"video": "a.mp4", "prompt": "x", **row}, good]
    manifest = read_manifest(save_csv(folder / "m.csv", PLAIN, rows))
    assert [sample.id for sample in manifest.samples] == ["b.mp4"]
    assert [reject.reason.startswith(reason) for reject in manifest.rejects] == [True], manifest


def test_openvid_is_known_by_its_header_and_searched_by_name(folder: Path) -> None:
    (folder / "deep" / "b.mp4").write_bytes(b"")
    rows = [
        {"video": "c.mp4", "caption": "a cat", "fps": "29.97", "frame": "99", "seconds": "3.3"},
        {"video": "b.mp4", "caption": "two of it"},
        {"video": "none.mp4", "caption": "x"},
    ]
    manifest = read_manifest(save_csv(folder / "OpenVidHD.csv", OPENVID, rows))
    (sample,) = manifest.samples
    assert (sample.id, sample.prompt, sample.fps, sample.source, sample.end) == (
        "c.mp4", "a cat", 29.97, "OpenVid", None,
    )  # fmt: skip
    assert sample.media == MediaFile(folder / "deep" / "c.mp4")
    assert reasons(manifest) == {
        "b.mp4": f"found more than once: b.mp4 lies in {folder}, {folder / 'deep'}",
        "none.mp4": f"file not found: no none.mp4 below {folder}",
    }


def test_ultravideo_is_known_by_its_header_and_each_file_is_the_clip(folder: Path) -> None:
    row = {"clip_id": "c.mp4", "frame_width": "3840", "frame_height": "2160", "fps": "24",
           "start_frame": "100", "end_frame": "200", "start_time": "4.1", "end_time": "8.3",
           "Brief Description": "short", "Summarized Description": "the whole"}  # fmt: skip
    manifest = read_manifest(
        save_csv(folder / "short.csv", ULTRAVIDEO, [row, {"clip_id": "a.mp4", "fps": "24"}])
    )
    (sample,) = manifest.samples
    assert (sample.id, sample.prompt, sample.fps) == ("c.mp4", "the whole", 24.0)
    assert (sample.start, sample.end, sample.width) == (0.0, None, None)
    assert (sample.source, reasons(manifest)) == (
        "UltraVideo", {"a.mp4": "no caption: the prompt is empty"},
    )  # fmt: skip


def test_columns_may_be_added_to_a_collection(folder: Path) -> None:
    rows = [{"video": "a.mp4", "caption": "x", "weight": "4", "split": "val"}]
    table = save_csv(folder / "m.csv", (*OPENVID, "weight", "split"), rows)
    (sample,) = read_manifest(table).samples
    assert (sample.weight, sample.split) == (4.0, "val")


def test_linked_folders_are_searched_once(folder: Path) -> None:
    (folder / "deep" / "loop").symlink_to(folder)
    rows = [{"video": "c.mp4", "caption": "x"}]
    manifest = read_manifest(save_csv(folder / "m.csv", OPENVID, rows))
    assert len(manifest.samples) == 1


def test_splits(folder: Path) -> None:
    rows = [
        {"video": "a.mp4", "prompt": "x", "split": "train"},
        {"video": "b.mp4", "prompt": "x", "split": "val"},
        {"video": "gone.mp4", "prompt": "x", "split": "val"},
        {"image": "p.png", "prompt": "x"},
    ]
    table = save_csv(folder / "m.csv", PLAIN, rows)
    manifest = read_manifest(table, split="val")
    assert [s.id for s in manifest.samples] + list(reasons(manifest)) == ["b.mp4", "gone.mp4"]
    with pytest.raises(InputError, match=r"no split 'test'; it has \(none\), train, val"):
        read_manifest(table, split="test")


def test_a_folder_with_captions_beside(folder: Path) -> None:
    (folder / "a.txt").write_text("\ufeffein Hund läuft\n", encoding="utf-8")
    (folder / "deep" / "c.txt").write_text("deep")
    (folder / "b.txt").write_bytes(b"\xff\xfe")
    (folder / "p.txt").write_text(" \n")
    (folder / "notes.md").write_text("not for training")
    manifest = read_manifest(folder)
    assert [(s.id, s.prompt) for s in manifest.samples] == [
        ("a.mp4", "ein Hund läuft"), ("deep/c.mp4", "deep"),
    ]  # fmt: skip
    assert reasons(manifest) == {
        "b.mp4": "bad caption: the prompt is not a text in UTF-8",
        "p.png": "no caption: the prompt is empty",
        "small.mp4": "no caption: no small.txt beside it",
    }


def save_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_a_webdataset_archive(folder: Path) -> None:
    record = {"caption": "from json", "weight": 2, "fps": 24, "url": "https://example.org/x"}
    members = {
        "0001.mp4": b"clip one",
        "0001.txt": b"from txt",
        "0001.json": json.dumps(record).encode(),
        "sub/0002.jpg": b"picture",
        "sub/0002.json": json.dumps(record).encode(),
        "0003.mp4": b"x",
        "0004.txt": b"lonely",
        "0005.mp4": b"x",
        "0005.json": b"[1",
        "0006.mp4": b"x",
        "0006.png": b"x",
        "0006.txt": b"x",
    }
    manifest = read_manifest(save_tar(folder / "shard-0.tar", members))
    first, second = manifest.samples
    assert (first.id, first.prompt, first.weight, first.fps) == (
        "shard-0.tar/0001", "from txt", 2.0, 24.0,
    )  # fmt: skip
    assert (second.id, second.kind, second.prompt) == (
        "shard-0.tar/sub/0002", "image", "from json",
    )  # fmt: skip
    assert isinstance(first.media, TarMember)
    assert content(first) == b"clip one"
    assert {id_[12:]: reason.partition(":")[0] for id_, reason in reasons(manifest).items()} == {
        "0003": "no caption", "0004": "no media", "0005": "bad json", "0006": "no media",
    }  # fmt: skip


def test_a_folder_of_archives(tmp_path: Path) -> None:
    for name in ("shard-0.tar", "more/shard-1.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_tar(tmp_path / name, {"1.mp4": b"x", "1.txt": b"y"})
    assert [sample.id for sample in read_manifest(tmp_path).samples] == [
        "shard-0.tar/1", "more/shard-1.tar/1",
    ]  # fmt: skip


def test_archives_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a plain tar|cut off"):
        read_manifest(save_tar(tmp_path / "packed.tar", {"1.mp4": b"x"}, "w:gz"))
    whole = save_tar(tmp_path / "a.tar", {f"{i}.mp4": b"x" * 2000 for i in range(9)}).read_bytes()
    for num_blocks in (4, 5, 6):  # within the first clip, at its end, after the next header
        (tmp_path / "a.tar").write_bytes(whole[: 512 * num_blocks])
        with pytest.raises(InputError, match=r"not a plain tar|cut off"):
            read_manifest(tmp_path / "a.tar")
    save_tar(tmp_path / "b.tar", {"1.mp4": b"x"})
    with tarfile.open(tmp_path / "b.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo("1.mp4"), io.BytesIO())
    with pytest.raises(InputError, match=r"holds 1\.mp4 twice"):
        read_manifest(tmp_path / "b.tar")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "video,prompt\n", "is empty"),
        ("m.csv", "", "is empty"),
        ("m.csv", "prompt,split\nx,y\n", "has the columns prompt, split; it needs video or image"),
        ("m.csv", "video,caption\na.mp4,x\n", "has unknown columns caption; rename or remove them"),
        ("m.csv", "video,prompt,colour\na.mp4,x,red\n", "unknown columns colour"),
        ("m.csv", "video,prompt\na.mp4,x, y\n", "line 2: more fields than columns"),
        ("m.csv", "video,prompt\na.mp4,x\na.mp4,y\n", r"lists a\.mp4 twice"),
        ("m.csv", 'video,prompt\na.mp4,"x" y\n', "not a CSV"),
        ("m.csv", "video,prompt\na.mp4,\xff\n", "not a CSV in UTF-8"),
        ("m.jsonl", '{"video": "a.mp4", "prompt": "x"}\n{"video"\n', "line 2 is not JSON"),
        ("m.jsonl", "[1]\n", "line 1 must be an object"),
        ("m.jsonl", '{"video": "a.mp4", "prompt": "x"}\n{"vidoe": "b.mp4"}\n', "columns vidoe"),
        ("m.yaml", "x", "of an unknown kind; give"),
    ],
)
def test_manifests_that_cannot_be_used(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        read_manifest(folder / name)


def test_places_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_manifest(tmp_path / "none.csv")
    table = save_csv(tmp_path / "m.csv", PLAIN, [{"video": "a.mp4", "prompt": "x"}])
    with pytest.raises(InputError, match=r"root .* is not a folder"):
        read_manifest(table, root=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is empty"):
        read_manifest(tmp_path / "empty")


texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\0\ufffd"), max_size=30)


@settings(max_examples=40, **FOLDER)  # type: ignore[arg-type]
@given(prompts=st.lists(texts, min_size=1, max_size=8), kind=st.sampled_from([".csv", ".jsonl"]))
def test_every_row_is_a_sample_or_a_reject(folder: Path, prompts: list[str], kind: str) -> None:
    rows = [{"video": "a.mp4", "prompt": p, "start": i} for i, p in enumerate(prompts, 1)]
    path = folder / f"m{kind}"
    if kind == ".csv":
        save_csv(path, ("video", "prompt", "start"), rows)
    else:
        save_jsonl(path, *rows)
    manifest = read_manifest(path)
    found = {sample.id: sample.prompt for sample in manifest.samples}
    named = {f"a.mp4#{i}-": prompt.strip() for i, prompt in enumerate(prompts, 1)}
    assert found == {id_: prompt for id_, prompt in named.items() if prompt}
    assert set(reasons(manifest)) == {id_ for id_, prompt in named.items() if not prompt}


def test_parquet_without_pyarrow_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (folder / "m.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"needs pyarrow.*pip install 'swifti2v\[train\]'"):
        read_manifest(folder / "m.parquet")


def test_a_dataset_without_datasets_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"needs datasets.*pip install 'swifti2v\[train\]'"):
        read_manifest(tmp_path)


def test_parquet(folder: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"video": ["a.mp4", "b.mp4", None], "prompt": ["x", None, "z"], "weight": [2, 1, 1]}
    parquet.write_table(pyarrow.table(columns), folder / "m.parquet")
    manifest = read_manifest(folder / "m.parquet")
    assert [(s.id, s.weight) for s in manifest.samples] == [("a.mp4", 2.0)]
    assert reasons(manifest) == {
        "b.mp4": "no caption: the prompt is empty", "row 3": "no media: no video and image",
    }  # fmt: skip
    parquet.write_table(
        pyarrow.table({"video": [b"bytes"], "prompt": ["x"]}), folder / "bytes.parquet"
    )
    assert reasons(read_manifest(folder / "bytes.parquet")) == {
        "row 1": "bad path: video holds bytes, not a path",
    }
    (folder / "m.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match="not a Parquet file"):
        read_manifest(folder / "m.parquet")


def test_saved_datasets(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    plain = datasets.Dataset.from_dict(
        {"video": [b"one", None, b"three"], "prompt": ["x", "y", "z"], "weight": [1.0, 2.0, None]}
    )
    paths = datasets.Dataset.from_dict({"video": ["a.mp4", "gone.mp4"], "prompt": ["x", "y"]})
    both = datasets.DatasetDict({"train": plain, "test": paths})
    both.save_to_disk(folder / "saved")
    manifest = read_manifest(folder / "saved", root=folder)
    assert [(s.id, s.split) for s in manifest.samples] == [
        ("train/0", "train"), ("train/2", "train"), ("test/0", "test"),
    ]  # fmt: skip
    assert {id_: reason[:14] for id_, reason in reasons(manifest).items()} == {
        "train/1": "no media: no v", "test/1": "file not found",
    }  # fmt: skip
    first, third, path = manifest.samples
    assert isinstance(third.media, DatasetRow)
    assert content(third) == b"three"
    assert (first.weight, path.media) == (1.0, MediaFile(folder / "a.mp4"))
    assert len(read_manifest(folder / "saved", root=folder, split="test").samples) == 1


def test_a_saved_dataset_of_pictures(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    Image.new("RGB", (4, 3)).save(folder / "p.png")
    records = [{"bytes": (folder / "p.png").read_bytes(), "path": None}, str(folder / "p.png")]
    features = datasets.Features({"image": datasets.Image(), "prompt": datasets.Value("string")})
    saved = datasets.Dataset.from_dict({"image": records, "prompt": ["x", "y"]}, features=features)
    saved.save_to_disk(folder / "saved")
    samples = read_manifest(folder / "saved").samples
    assert [(s.id, s.kind) for s in samples] == [("saved/0", "image"), ("saved/1", "image")]
    assert content(samples[0]) == (folder / "p.png").read_bytes()
    saved.rename_column("prompt", "text").save_to_disk(folder / "other")
    with pytest.raises(InputError, match="has unknown columns text; rename"):
        read_manifest(folder / "other")
