"""Images with their noise, time, caption and references, as the network takes them.

Legend: B images of a micro-batch, N image tokens, C channels, R references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.model.references import References
from posttrain.sft.batches import Batch, Job, noised
from posttrain.sft.order import Order
from posttrain.style.config import StyleConfig
from posttrain.style.dataset import Views

LAST = 1.0
"""The `choice` of the full caption, which is an image's last; see `EncodedImages.read`."""


@dataclass(frozen=True)
class StyleJob:
    """An entry to noise, and what is shown beside it."""

    job: Job
    views: Sequence[np.ndarray]
    """Squares of one size, uint8."""


@dataclass(frozen=True)
class StyleBatch(Batch):
    """Images of one size with the same number of references, of one size too."""

    shown: References | None = None

    def velocity(self, k2: K2) -> Tensor:
        return k2.velocity(self.x, self.t, self.text, *self.size, shown=self.shown)


def size_of_step(config: StyleConfig, step: int) -> int:
    """Side in pixels of a step's references: all have one, so that they fit into one forward."""
    sizes = config.references.sizes
    return sizes[sampler.seed_for(config.seed, step, 0, 5) % len(sizes)]


def job_of(views: Views, config: StyleConfig, entry: int, step: int, i: int, size: int) -> StyleJob:
    """The i-th image of a step's batch, the same whichever process has it."""
    # The last index of a seed is its use: 0 the time, 1 the noise, 4 caption and references, 5 their size.
    rng = np.random.default_rng(sampler.seed_for(config.seed, step, i, 4))
    own, dropped = config.references, config.images.drop_caption
    u, two, choice = rng.random(3).tolist()
    # One number decides, so that the shares add up: [0, drop) no references, [drop, drop + drop_both) neither these nor
    # a caption, and the next drop_caption no caption. The last two are what the empty prompt of guidance sees.
    alone = u < own.drop + own.drop_both
    mute = own.drop <= u < own.drop + own.drop_both + dropped
    count = 0 if alone else 2 if two < own.two else 1
    n = float(sampler.noise([sampler.seed_for(config.seed, step, i, 0)], (1,)))
    seed = sampler.seed_for(config.seed, step, i, 1)
    # Without references the caption has to name the style.
    job = Job(entry, n, seed, LAST if alone else choice, mute)
    return StyleJob(job, [views.draw(entry, size, rng) for _ in range(count)])


@dataclass(frozen=True)
class StepJobs:
    """What a process does in a step."""

    entries: list[int]
    """Of the whole batch."""
    side: int
    """Of its references, in pixels."""
    own: list[StyleJob]
    """Of this process."""


def jobs_of_step(
    views: Views, config: StyleConfig, order: Order, step: int, own: Callable[[int], Sequence[int]]
) -> StepJobs:
    """The jobs of a step, counted from 1. `own` says which places of a batch of that length this process has."""
    entries, side = order(step), size_of_step(config, step)
    return StepJobs(entries, side, [job_of(views, config, entries[i], step, i, side) for i in own(len(entries))])


class Ahead:
    """Jobs of one step after another. Those of the next one are made in a thread while a step trains: reading and
    cutting photographs may take as long as that.

    A context manager, which ends the thread.
    """

    def __init__(self, make: Callable[[int], StepJobs], last: int):
        """`last` is the last step that there is."""
        self._make, self._last = make, last
        self._thread = ThreadPoolExecutor(1, "jobs")
        self._next: tuple[int, Future[StepJobs]] | None = None

    def __call__(self, step: int) -> StepJobs:
        """Raises what making them raised."""
        if self._next is None or self._next[0] != step:
            self._next = step, self._thread.submit(self._make, step)
        jobs = self._next[1].result()
        if step < self._last:
            self._next = step + 1, self._thread.submit(self._make, step + 1)
        return jobs

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)


def batches_of(
    k2: K2, views: Views, jobs: Sequence[StyleJob], micro_batch: int, mean: float, std: float, shift: float
) -> list[StyleBatch]:
    """Micro-batches, each of one size of images and one number of references."""
    # The number of references is a shape of the forward: images with none, one and two do not go together.
    by_count: dict[int, list[int]] = {}
    for j, job in enumerate(jobs):
        by_count.setdefault(len(job.views), []).append(j)
    found = []
    for count, members in sorted(by_count.items()):
        plain = [jobs[j].job for j in members]
        for batch in noised(k2, views.images, plain, micro_batch, mean, std, shift):
            chosen = [members[j] for j in batch.jobs]  # numbers in `plain` as numbers in `jobs`
            shown = encoded(k2, [jobs[j].views for j in chosen]) if count else None
            found.append(StyleBatch(**vars(replace(batch, jobs=chosen)), shown=shown))
    return found


def encoded(k2: K2, images: Sequence[Sequence[np.ndarray]]) -> References:
    """References of a batch: of each image, R images, all of one size."""
    height, width = images[0][0].shape[:2]
    columns = []
    for r in range(len(images[0])):
        stack = torch.from_numpy(np.stack([of_one[r] for of_one in images]))
        columns.append(k2.encode_images(stack).to(k2.device))
    return References(tuple(columns), (k2.grid(height, width),) * len(columns))
