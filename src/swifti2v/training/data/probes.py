"""Facts about media, looked up once as long as the files do not change."""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from swifti2v.errors import MediaError
from swifti2v.training.cache.fingerprints import make_key
from swifti2v.training.cache.tensor_cache import TensorCache
from swifti2v.training.data.buckets import MediaFacts, in_chunks, probe
from swifti2v.training.data.samples import MediaFile, Reject, Sample

CODE = 2
"""Raised when ``probe`` tells something else than before."""
FLUSH_INTERVAL = 2000
"""Samples after which those looked into are written, for a run that is stopped."""
INDEX_SUFFIX = ".index"
"""Ending of a manifest's index, which lies beside it."""


class Probes:
    """``probe``, remembered on disk by path, size and time of change.

    What cannot be read is not remembered. It may be called in several threads; leaving the context
    writes what is new.

    Args:
        directory: What is found out goes here.
        indexes: Directories that others filled; those that are not there are passed over.

    Raises:
        InputError: A directory holds something else, or is of another version.
    """

    def __init__(self, directory: Path, indexes: Iterable[Path] = ()) -> None:
        self._cache = _open(directory)
        self._indexes = [_open(path) for path in indexes if path.is_dir()]
        self._lock = threading.Lock()
        self.num_new = 0
        """Samples that had to be looked into."""

    def __call__(self, sample: Sample) -> MediaFacts:
        """See ``probe``."""
        if (facts := self.find(sample)) is None:
            facts = probe(sample)
            self.remember(sample, facts)
        return facts

    def find(self, sample: Sample) -> MediaFacts | None:
        """Find what is known of a sample; None if it has to be looked into."""
        try:
            key = _key(sample)
        except OSError:
            return None
        for cache in (self._cache, *self._indexes):
            if (record := cache.record(key)) is not None:
                return _to_facts(record)
        return None

    def remember(self, sample: Sample, facts: MediaFacts) -> None:
        """Add what was found out."""
        with self._lock:
            self._cache.put(_key(sample), {}, asdict(facts))
            self.num_new += 1
            if self.num_new % FLUSH_INTERVAL == 0:
                self._cache.flush()

    def look_into(
        self,
        samples: Sequence[Sample],
        executor: Executor,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Reject]:
        """Look into all samples that are not known, many at a time.

        Args:
            samples: Samples, known ones among them.
            executor: Threads or processes that read the files.
            on_progress: Told how many samples are done.

        Returns:
            Those that cannot be read.
        """
        rejects, num_done = [], 0
        for chunk in in_chunks(samples):
            unknown = [sample for sample in chunk if self.find(sample) is None]
            for sample, facts in zip(unknown, executor.map(_try_probe, unknown), strict=True):
                if isinstance(facts, Reject):
                    rejects.append(facts)
                else:
                    self.remember(sample, facts)
            num_done += len(chunk)
            if on_progress is not None:
                on_progress(num_done)
        return rejects

    def refresh(self) -> None:
        """Write what is new, and read what other processes wrote."""
        self._cache.flush()
        self._cache.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cache.flush()


def index_path(manifest: str) -> Path:
    """Directory of the facts about a manifest's media, beside it."""
    path = Path(manifest)
    return path.with_name(f"{path.name}{INDEX_SUFFIX}")


def _open(directory: Path) -> TensorCache:
    return TensorCache(directory, {"kind": "probes", "code": CODE})


def _try_probe(sample: Sample) -> MediaFacts | Reject:
    try:
        return probe(sample)
    except MediaError as error:
        return Reject(sample.id, f"cannot be read: {error}")


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
