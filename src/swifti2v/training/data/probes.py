"""Facts about media, looked up once as long as the files do not change."""

import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from swifti2v.training.cache.fingerprints import make_key
from swifti2v.training.cache.tensor_cache import TensorCache
from swifti2v.training.data.buckets import MediaFacts, probe
from swifti2v.training.data.samples import MediaFile, Sample

CODE = 2
"""Raised when ``probe`` tells something else than before."""
FLUSH_INTERVAL = 2000
"""Samples after which those looked into are written, for a run that is stopped."""


class Probes:
    """``probe``, remembered on disk by path, size and time of change.

    What cannot be read is not remembered. It may be called in several threads; leaving the context
    writes what is new.
    """

    def __init__(self, directory: Path) -> None:
        self._cache = TensorCache(directory, {"kind": "probes", "code": CODE})
        self._lock = threading.Lock()
        self.num_new = 0
        """Samples that had to be looked into."""

    def __call__(self, sample: Sample) -> MediaFacts:
        """See ``probe``."""
        try:
            key = _key(sample)
        except OSError:
            return probe(sample)  # and its error
        if (record := self._cache.record(key)) is not None:
            return _to_facts(record)
        facts = probe(sample)
        with self._lock:
            self._cache.put(key, {}, asdict(facts))
            self.num_new += 1
            if self.num_new % FLUSH_INTERVAL == 0:
                self._cache.flush()
        return facts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cache.flush()


def _key(sample: Sample) -> str:
    stamps = sample.media.stamp()
    if sample.reference is not None:
        stamps = (*stamps, *MediaFile(sample.reference).stamp())
    return make_key(sample.kind, *stamps)


def _to_facts(record: dict[str, Any]) -> MediaFacts:
    reference, notes = record.pop("reference"), tuple(record.pop("notes"))
    return MediaFacts(
        **record, notes=notes, reference=None if reference is None else _to_facts(reference)
    )
