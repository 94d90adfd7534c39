"""Samples of each step: a function of the seed and the step, without state."""

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from swifti2v.errors import ConfigError, InputError
from swifti2v.shapes import PixelShape

_SCHEDULE, _EPOCH, _SEEDS = range(3)  # independent streams of random numbers
_BLOCK = 1024  # steps whose buckets are drawn together


class BatchPlan:
    """A map from steps to batches.

    Every batch is of one bucket. Buckets come in proportion to the sum of their samples' weights:
    of each 1024 steps each gets its share to within two steps. A bucket's samples come in
    epochs of as many places as there are samples, in a new order each time; a sample of n takes
    n * weight / sum of weights places, rounded up or down at random: with equal weights each
    sample comes once before any comes again. Batches go on over the end of an epoch, so nothing
    is left out; a bucket smaller than a batch fills it with several epochs.

    Two plans of the same samples, weights, batch size and seed are equal, whatever the order in
    which they were listed, the number of ranks, and the steps asked for before.
    """

    def __init__(
        self,
        members: Mapping[PixelShape, Mapping[str, float]],
        *,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        """Check and sort the samples: ids and weights by bucket. Empty buckets never come.

        Raises:
            InputError: There is no sample, or a weight is not above 0.
            ConfigError: ``batch_size`` is below 1, or ``seed`` below 0.
        """
        if batch_size < 1 or seed < 0:
            raise ConfigError(
                f"batch_size {batch_size} must be at least 1 and seed {seed} at least 0"
            )
        self.batch_size = batch_size
        self.seed = seed
        self._buckets = [
            _Bucket(shape, members[shape], (seed, _EPOCH, index))
            for index, shape in enumerate(sorted(shape for shape in members if members[shape]))
        ]
        if not self._buckets:
            raise InputError("there is no sample to plan batches of; see `swifti2v data inspect`")
        totals = np.array([bucket.total_weight for bucket in self._buckets])
        self._bounds = np.cumsum(totals)[:-1] / totals.sum()
        # Batches of each bucket before each block of steps, as far as asked for.
        self._counts: list[NDArray[np.int64]] = [np.zeros(len(totals), np.int64)]
        self._block: tuple[int, NDArray[np.int64]] = (0, self._draw_block(0))

    def batch(self, step: int) -> tuple[PixelShape, list[tuple[str, int]]]:
        """The samples of a step, counted from 0, on all ranks.

        Returns:
            Bucket of all samples; id and seed of each. An id may come twice. A seed, for all that
            is drawn for a sample, has 63 bits and is another one each time the sample comes.

        Raises:
            InputError: ``step`` is below 0.
        """
        if step < 0:
            raise InputError(f"step is {step}; it must be at least 0")
        number, place = divmod(step, _BLOCK)
        drawn = self._buckets_of_block(number)
        index = int(drawn[place])
        num_before = int(self._counts[number][index] + np.count_nonzero(drawn[:place] == index))
        bucket = self._buckets[index]
        ids = bucket.take(num_before * self.batch_size, self.batch_size)
        words = np.random.SeedSequence((self.seed, _SEEDS, step)).generate_state(
            self.batch_size, np.uint64
        )
        return bucket.shape, [(id_, int(word) >> 1) for id_, word in zip(ids, words, strict=True)]

    @property
    def shares(self) -> dict[PixelShape, float]:
        """Part of the steps that each bucket gets; they add up to 1."""
        total = sum(bucket.total_weight for bucket in self._buckets)
        return {bucket.shape: bucket.total_weight / total for bucket in self._buckets}

    @property
    def fingerprint(self) -> str:
        """Hash that only equal plans share; a resumed run compares it and its step number."""
        digest = hashlib.sha256(f"{self.seed} {self.batch_size}".encode())
        for bucket in self._buckets:
            digest.update(f"\n{tuple(bucket.shape)}\n".encode())
            digest.update("\n".join(map(repr, bucket.ids)).encode())
            digest.update(bucket.weights.tobytes())
        return digest.hexdigest()

    def _buckets_of_block(self, number: int) -> NDArray[np.int64]:
        """``[_BLOCK]`` indices of buckets; also counts all blocks before."""
        while len(self._counts) <= number:
            drawn = self._draw_block(len(self._counts) - 1)
            counts = np.bincount(drawn, minlength=len(self._buckets))
            self._counts.append(self._counts[-1] + counts)
        if self._block[0] != number:
            self._block = (number, self._draw_block(number))
        return self._block[1]

    def _draw_block(self, number: int) -> NDArray[np.int64]:
        # One draw in each of _BLOCK equal parts of [0, 1), then shuffled.
        raw = _random((self.seed, _SCHEDULE, number), 2 * _BLOCK)
        points = (np.arange(_BLOCK) + _to_unit(raw[:_BLOCK])) / _BLOCK
        drawn = np.searchsorted(self._bounds, points, side="right")
        return drawn[np.argsort(raw[_BLOCK:], kind="stable")].astype(np.int64)


class _Bucket:
    """The endless row of a bucket's samples."""

    def __init__(
        self, shape: PixelShape, weights: Mapping[str, float], key: tuple[int, ...]
    ) -> None:
        self.shape = shape
        self.ids = sorted(weights)
        self.weights = np.array([weights[id_] for id_ in self.ids], np.float64)
        if bad := [i for i, w in zip(self.ids, self.weights, strict=True) if not 0 < w < np.inf]:
            raise InputError(f"sample {bad[0]} has weight {weights[bad[0]]}; it must be above 0")
        self.total_weight = float(self.weights.sum())
        self._is_even = bool((self.weights == self.weights[0]).all())
        self._ends = np.cumsum(self.weights)
        self._key = key
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def take(self, first: int, length: int) -> tuple[str, ...]:
        """Ids at the places ``first`` to ``first + length``."""
        ids: list[str] = []
        while len(ids) < length:
            epoch, place = divmod(first + len(ids), len(self.ids))
            order = self._order(epoch)[place : place + length - len(ids)]
            ids += [self.ids[index] for index in order]
        return tuple(ids)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """``[n]`` indices of the samples of an epoch; the last one is kept."""
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._draw_order(epoch))
        return self._epoch[1]

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        num_samples = len(self.ids)
        raw = _random((*self._key, epoch), num_samples + 1)
        shuffled: NDArray[np.int64] = np.argsort(raw[1:], kind="stable")
        if self._is_even:
            return shuffled
        # Systematic sampling: evenly spaced points on the line of weights, at a random offset.
        points = (np.arange(num_samples) + _to_unit(raw[:1])) * (self._ends[-1] / num_samples)
        drawn: NDArray[np.int64] = np.searchsorted(self._ends, points, side="right")
        drawn = np.minimum(drawn, num_samples - 1)  # the last point may be rounded up to the end
        return drawn[shuffled]


def _random(key: tuple[int, ...], count: int) -> NDArray[np.uint64]:
    """Raw numbers, which no version of numpy changes (those of ``Generator`` may change)."""
    return np.asarray(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), np.uint64)


def _to_unit(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
