"""Parts of a job that may run anywhere at once: the hash of a name decides its part I of N."""

import hashlib

from swifti2v.errors import InputError


def is_in_shard(sample_id: str, index: int, num_shards: int) -> bool:
    """Whether shard ``index`` (from 1) of ``num_shards`` takes a sample, by the hash of its id."""
    digest = hashlib.sha256(f"shard {sample_id}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % num_shards == index - 1


def parse_shard(text: str) -> tuple[int, int]:
    """Read ``I/N``, I from 1 to N.

    Raises:
        InputError: ``text`` is not of this form.
    """
    index, _, total = text.partition("/")
    if not (index.isdecimal() and total.isdecimal() and 1 <= int(index) <= int(total)):
        raise InputError(f"shard {text!r} is not I/N with I from 1 to N, as 1/4")
    return int(index), int(total)
