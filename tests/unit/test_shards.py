"""Parts of a job."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.errors import InputError
from swifti2v.shards import is_in_shard, parse_shard


@given(st.lists(st.text(), max_size=20), st.integers(1, 7))
def test_every_sample_is_in_exactly_one_shard(ids, num_shards):
    for sample_id in ids:
        assert sum(is_in_shard(sample_id, i + 1, num_shards) for i in range(num_shards)) == 1


def test_shards_are_parsed():
    assert parse_shard("2/16") == (2, 16)
    for wrong in ("", "1", "0/2", "3/2", "-1/2", "1/2/3", "a/b", "1.0/2", "/2"):
        with pytest.raises(InputError, match="is not I/N"):
            parse_shard(wrong)


def test_shards_are_about_equal():
    sizes = [sum(is_in_shard(f"clip{n}", shard, 4) for n in range(2000)) for shard in (1, 2, 3, 4)]
    assert min(sizes) > 420  # four standard deviations below 500
