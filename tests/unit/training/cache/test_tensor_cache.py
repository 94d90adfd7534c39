"""The training cache: what comes back, who may write at once, and what is refused."""

import json
import logging
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from swifti2v.errors import InputError, LoadingError, MediaError
from swifti2v.models.fingerprints import fingerprint_model
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.training.cache.fingerprints import (
    ENDS_BYTES,
    hash_source,
    make_key,
)
from swifti2v.training.cache.tensor_cache import SHARD_BYTES, TensorCache

FINGERPRINT: dict[str, Any] = {"vae": "abc", "size": [16, 32], "dtype": "float32", "code": "1"}


def make_entry(number: int) -> dict[str, torch.Tensor]:
    return {"latents": torch.full((4, 3), float(number)), "mask": torch.tensor([True, False])}


def fill(directory: Path, numbers: range, shard_bytes: int = SHARD_BYTES) -> TensorCache:
    with TensorCache(directory, FINGERPRINT, shard_bytes) as cache:
        for number in numbers:
            cache.put(f"k{number}", make_entry(number))
    return cache


def assert_holds(cache: TensorCache, numbers: range) -> None:
    for number in numbers:
        entry = cache.get(f"k{number}")
        assert entry is not None
        assert entry.tensors.keys() == {"latents", "mask"}
        assert torch.equal(entry.tensors["latents"], make_entry(number)["latents"])
        assert torch.equal(entry.tensors["mask"], make_entry(number)["mask"])


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def test_an_entry_comes_back_before_and_after_it_is_written(tmp_path):
    cache = TensorCache(tmp_path / "cache", FINGERPRINT)
    assert cache.get("k1") is None
    cache.put("k1", make_entry(1))
    assert not (tmp_path / "cache").exists()  # nothing is written before a shard is
    assert_holds(cache, range(1, 2))
    cache.flush()
    assert_holds(cache, range(1, 2))
    again = TensorCache(tmp_path / "cache", FINGERPRINT)
    assert_holds(again, range(1, 2))
    assert (len(again), "k1" in again, "k2" in again) == (1, True, False)
    assert again.get("k2") is None


def test_every_kind_of_tensor_comes_back_as_it_was(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 4)
    entry = {
        "bf16": base.to(torch.bfloat16),
        "strided": base.transpose(0, 2),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 5),
        "grad": base.clone().requires_grad_(),
    }
    with TensorCache(tmp_path, FINGERPRINT) as cache:
        cache.put("k", entry)
    found = TensorCache(tmp_path, FINGERPRINT).get("k")
    assert found is not None
    for name, tensor in entry.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
        assert not found.tensors[name].requires_grad


def test_tensors_given_and_returned_may_be_changed_afterwards(tmp_path):
    mine = make_entry(1)
    cache = TensorCache(tmp_path, FINGERPRINT)
    cache.put("k1", mine)
    mine["latents"].zero_()
    for _ in range(2):  # waiting, then written
        found = cache.get("k1")
        assert found is not None
        found.tensors["latents"].zero_()
        assert_holds(cache, range(1, 2))
        cache.flush()


def test_an_entry_that_is_there_stays(tmp_path):
    fill(tmp_path, range(1))
    with TensorCache(tmp_path, FINGERPRINT) as cache:
        cache.put("k0", make_entry(9))
    assert_holds(TensorCache(tmp_path, FINGERPRINT), range(1))
    assert len(shards(tmp_path)) == 1


def test_a_record_comes_back_with_tensors_and_without(tmp_path):
    with TensorCache(tmp_path, FINGERPRINT) as cache:
        cache.put("both", make_entry(1), {"source": "abc", "size": (16, 32)})
        cache.put("alone", {}, {"fps": 23.976, "reference": None})
        assert cache.record("alone") == {"fps": 23.976, "reference": None}
    for number in range(2):  # with the index and without it
        found = TensorCache(tmp_path, FINGERPRINT)
        entry = found.get("both")
        assert entry is not None
        assert entry.record == found.record("both") == {"source": "abc", "size": [16, 32]}
        assert torch.equal(entry.tensors["latents"], make_entry(1)["latents"])
        assert found.get("alone") == ({"fps": 23.976, "reference": None}, {})
        assert found.record("none") is None
        if not number:
            next(tmp_path.glob("*.index.jsonl")).unlink()


def test_an_entry_of_another_record_is_replaced(tmp_path):
    for number in range(4):  # the later writer counts, whatever the names of the files
        with TensorCache(tmp_path, FINGERPRINT) as cache:
            cache.put("k", make_entry(number), {"source": number})
        for found in (cache, TensorCache(tmp_path, FINGERPRINT)):
            entry = found.get("k")
            assert entry is not None
            assert entry.record == {"source": number}
            assert torch.equal(entry.tensors["latents"], make_entry(number)["latents"])
    assert len(shards(tmp_path)) == 4


def test_an_entry_that_is_required_must_be_there_and_fresh(tmp_path):
    cache = TensorCache(tmp_path, FINGERPRINT)
    cache.put("k", make_entry(1), {"source": "abc", "size": (16, 32), "note": 1})
    origin = {"source": "abc", "size": (16, 32)}
    assert "latents" in cache.require("k", "clip a", origin, "make it").tensors
    with pytest.raises(InputError, match=r"does not hold clip b; make it"):
        cache.require("other", "clip b", origin, "make it")
    stale = r"its entry of clip a is stale \(source is 'abc' there and 'abd' now\); make it"
    with pytest.raises(InputError, match=stale):
        cache.require("k", "clip a", origin | {"source": "abd"}, "make it")


def test_shards_are_written_when_they_are_full(tmp_path):
    size = sum(tensor.nbytes for tensor in make_entry(0).values())
    fill(tmp_path, range(7), shard_bytes=3 * size)
    assert len(shards(tmp_path)) == 3
    assert_holds(TensorCache(tmp_path, FINGERPRINT), range(7))
    assert not list(tmp_path.glob("*.writing"))


def test_two_writers_at_once_lose_nothing(tmp_path):
    first, second = (TensorCache(tmp_path, FINGERPRINT, shard_bytes=1) for _ in range(2))
    for number in range(6):
        (first, second)[number % 2].put(f"k{number}", make_entry(number))
    assert first.get("k1") is None  # the other's: not seen before a refresh
    first.refresh()
    for cache in (first, TensorCache(tmp_path, FINGERPRINT)):
        assert_holds(cache, range(6))
    assert len({path.name.rpartition("-")[0] for path in shards(tmp_path)}) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # Python 3.12
def test_writers_in_other_processes_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    numbers = (range(4), range(4, 8), range(2, 6))
    workers = [context.Process(target=fill, args=(tmp_path, own, 1)) for own in numbers]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    cache = TensorCache(tmp_path, FINGERPRINT)
    assert len(cache) == 8
    assert cache.damaged == ()
    assert_holds(cache, range(8))


def test_a_pickled_cache_reads_and_writes_on_its_own(tmp_path):
    cache = TensorCache(tmp_path, FINGERPRINT)
    cache.put("k0", make_entry(0))
    cache.flush()
    cache.put("k1", make_entry(1))
    copy = pickle.loads(pickle.dumps(cache))
    assert_holds(copy, range(1))
    assert copy.get("k1") is None  # waits in the other one
    copy.put("k2", make_entry(2))
    copy.flush()
    cache.flush()
    assert_holds(TensorCache(tmp_path, FINGERPRINT), range(3))
    assert len(shards(tmp_path)) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # Python 3.12
def test_a_forked_cache_does_not_write_what_waits_in_its_parent(tmp_path):
    cache = TensorCache(tmp_path, FINGERPRINT)
    cache.put("k0", make_entry(0))
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=_put_and_flush, args=(cache, 1))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert len(TensorCache(tmp_path, FINGERPRINT)) == 1
    cache.flush()
    assert_holds(TensorCache(tmp_path, FINGERPRINT), range(2))


def _put_and_flush(cache: TensorCache, number: int) -> None:
    cache.put(f"k{number}", make_entry(number))
    cache.flush()


def test_indexes_are_not_needed(tmp_path):
    fill(tmp_path, range(3), shard_bytes=1)
    (index,) = tmp_path.glob("*.index.jsonl")
    lines = index.read_text().splitlines()
    assert [json.loads(line)["entries"] for line in lines] == [
        {f"k{number}": [["latents", "mask"], {}]} for number in range(3)
    ]
    index.write_text(lines[0] + "\n" + lines[1][:20])  # killed while it wrote
    assert_holds(TensorCache(tmp_path, FINGERPRINT), range(3))
    index.unlink()
    assert_holds(TensorCache(tmp_path, FINGERPRINT), range(3))


@pytest.mark.parametrize("with_file", [True, False])
def test_another_fingerprint_is_refused_and_the_fields_named(tmp_path, with_file):
    fill(tmp_path, range(1))
    if not with_file:  # the shards say it too
        (tmp_path / "fingerprint.json").unlink()
    other = FINGERPRINT | {"size": (32, 32), "vae": "abd"}
    with pytest.raises(InputError) as caught:
        TensorCache(tmp_path, other)
    message = str(caught.value)
    assert "size.0 is 16 there and 32 now; vae is 'abc' there and 'abd' now" in message
    assert "dtype" not in message
    assert "delete this one" in message
    with pytest.raises(InputError, match="code is '1' there and None now"):
        TensorCache(tmp_path, {k: v for k, v in FINGERPRINT.items() if k != "code"})
    assert_holds(TensorCache(tmp_path, FINGERPRINT | {"size": (16, 32)}), range(1))


def test_of_two_fingerprints_that_race_one_wins(tmp_path):
    first = TensorCache(tmp_path, FINGERPRINT)
    second = TensorCache(tmp_path, FINGERPRINT | {"dtype": "bfloat16"})
    for cache in (first, second):
        cache.put("k0", make_entry(0))
    first.flush()
    with pytest.raises(InputError, match="dtype is 'float32' there and 'bfloat16' now"):
        second.flush()
    assert len(shards(tmp_path)) == 1


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("num_bytes", [0, 100, -1])
def test_a_truncated_shard_is_named_and_its_entries_are_missing(
    tmp_path, caplog, with_index, num_bytes
):
    fill(tmp_path, range(3), shard_bytes=1)
    broken = shards(tmp_path)[1]
    os.truncate(broken, num_bytes % broken.stat().st_size)
    if not with_index:
        next(tmp_path.glob("*.index.jsonl")).unlink()
    with caplog.at_level(logging.WARNING):
        cache = TensorCache(tmp_path, FINGERPRINT)
    assert f"{broken} is damaged" in caplog.text
    assert cache.damaged == (broken.name,)
    assert [cache.get(f"k{n}") is None for n in range(3)] == [False, True, False]
    cache.put("k1", make_entry(1))
    cache.flush()
    broken.unlink()
    whole = TensorCache(tmp_path, FINGERPRINT)
    assert whole.damaged == ()
    assert_holds(whole, range(3))


def test_a_shard_damaged_under_way_is_an_error(tmp_path):
    fill(tmp_path, range(1))
    cache = TensorCache(tmp_path, FINGERPRINT)
    os.truncate(shards(tmp_path)[0], 50)
    with pytest.raises(LoadingError, match="delete it and run again"):
        cache.get("k0")


def test_a_kill_while_a_shard_is_written_leaves_nothing_that_counts(tmp_path):
    fill(tmp_path, range(1))
    (tmp_path / "0123-00000.safetensors.writing").write_bytes(b"half")
    cache = TensorCache(tmp_path, FINGERPRINT)
    assert (len(cache), cache.damaged) == (1, ())


def test_a_full_disk_keeps_what_waits(tmp_path):
    if os.geteuid() == 0:
        directory = tmp_path / "file"  # root may write anywhere, but not below a file
        cache = TensorCache(directory, FINGERPRINT)
        cache.put("k0", make_entry(0))
        directory.write_text("in the way")
        with pytest.raises(MediaError, match="cannot be written"):
            cache.flush()
        directory.unlink()
    else:
        tmp_path.chmod(0o500)
        directory = tmp_path
        cache = TensorCache(directory, FINGERPRINT)
        cache.put("k0", make_entry(0))
        with pytest.raises(MediaError, match="cannot be written"):
            cache.flush()
        tmp_path.chmod(0o700)
    cache.flush()
    assert_holds(TensorCache(directory, FINGERPRINT), range(1))


@pytest.mark.parametrize("key", ["", "a/b", "a b", "ä", "k" * 129])
def test_keys_that_cannot_be_are_refused(tmp_path, key):
    with pytest.raises(InputError, match="make it with make_key"):
        TensorCache(tmp_path, FINGERPRINT).put(key, make_entry(0))


def test_other_bad_input_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds nothing"):
        TensorCache(tmp_path, FINGERPRINT).put("k", {})
    with pytest.raises(InputError, match="plain JSON values"):
        TensorCache(tmp_path, {"vae": object()})
    with pytest.raises(InputError, match="shard_bytes is 0"):
        TensorCache(tmp_path, FINGERPRINT, shard_bytes=0)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        TensorCache(tmp_path / "file", FINGERPRINT)
    (tmp_path / "fingerprint.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        TensorCache(tmp_path, FINGERPRINT)


@pytest.mark.parametrize("size", [0, 10, ENDS_BYTES, ENDS_BYTES + 1, 3 * ENDS_BYTES])
def test_a_source_is_told_by_its_size_and_ends(tmp_path, size):
    content = bytearray(os.urandom(size))
    path = tmp_path / "clip"
    path.write_bytes(content)
    own = hash_source(path)
    assert own == hash_source(path)
    hashes = {own}
    for place in {0, size - 1} if size else set():
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        hashes.add(hash_source(path))
    path.write_bytes(content + b"x")
    hashes.add(hash_source(path))
    assert len(hashes) == 2 + min(size, 2)


@given(st.lists(st.text(max_size=3) | st.integers(), max_size=3), st.data())
def test_keys_tell_all_parts_apart(parts, data):
    other = data.draw(st.lists(st.text(max_size=3) | st.integers(), max_size=3))
    assert (make_key(*parts) == make_key(*other)) == (parts == other)


def test_the_fingerprint_of_a_model_tells_weights_dtype_and_configuration():
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(300, 300)

    own = fingerprint_model(make(0))
    assert own == fingerprint_model(make(0))
    changed = make(0)
    with torch.no_grad():
        changed.get_parameter("bias")[7] += 1e-3
    others = [make(1), make(0).to(torch.bfloat16), changed, nn.Linear(300, 300, bias=False)]
    codecs = [BlockCodec(latents_std=(std,) * 768) for std in (0.5, 1.0)]
    hashes = {own, *(fingerprint_model(model) for model in (*others, *codecs))}
    assert len(hashes) == 1 + len(others) + len(codecs)
    with pytest.raises(LoadingError, match="not in memory"):
        fingerprint_model(make(0).to("meta"))


def test_the_bytes_of_a_window_at_2k(tmp_path):
    """Anchor, a context frame and three target frames of 2560x1408 in bfloat16, and their pair."""
    window = {name: torch.zeros(48, 5, 88, 160, dtype=torch.bfloat16) for name in ("target", "ref")}
    with TensorCache(tmp_path, FINGERPRINT) as cache:
        cache.put("window", window)
    (shard,) = shards(tmp_path)
    num_bytes = shard.stat().st_size
    assert num_bytes == pytest.approx(13.5e6, rel=0.01)
    whole_pair = 2 * 48 * 21 * 88 * 160 * 2
    assert whole_pair == pytest.approx(57e6, rel=0.01)
    assert num_bytes / whole_pair == pytest.approx(5 / 21, rel=0.01)
