"""Which entries of a set each step trains on: batches of one bucket, in an order that follows from the seed alone."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping

import torch

from posttrain.model import sampler

Bucket = tuple[int, ...]


class Order:
    """The batch of each step. Every epoch goes through all entries in a new random order; whenever a bucket has enough
    of them, they are a batch. What is left of an epoch waits for the next, so that all entries are taken equally often.

    A bucket with fewer entries than a batch so fills over several epochs, and its batch holds an entry several times.
    """

    def __init__(self, bucket_of: Mapping[int, Bucket], batch: int, seed: int):
        """`bucket_of` is the bucket of each entry."""
        self.bucket_of, self.batch, self.seed = bucket_of, batch, seed
        self._entries = list(bucket_of)
        self._step = 0
        self._current: list[int] = []
        self._walk = self._batches()

    def __call__(self, step: int) -> list[int]:
        """The entries of a step, counted from 1; also of an earlier one, or of the same again."""
        # The walk only goes forward: an earlier step is reached from the start again.
        if step < self._step:
            self._step, self._walk = 0, self._batches()
        while self._step < step:
            self._current = next(self._walk)
            self._step += 1
        return self._current

    def small(self) -> dict[Bucket, int]:
        """Buckets with fewer entries than a batch, and how many they have."""
        counts = sorted(Counter(self.bucket_of.values()).items())
        return {bucket: count for bucket, count in counts if count < self.batch}

    def _batches(self) -> Iterator[list[int]]:
        waiting: dict[Bucket, list[int]] = {}
        for epoch in itertools.count():
            generator = torch.Generator().manual_seed(sampler.seed_for(self.seed, epoch, -4))  # used by nothing else
            for place in torch.randperm(len(self._entries), generator=generator).tolist():
                entry = self._entries[place]
                bucket = self.bucket_of[entry]
                batch = waiting.setdefault(bucket, [])
                batch.append(entry)
                if len(batch) == self.batch:
                    yield waiting.pop(bucket)
