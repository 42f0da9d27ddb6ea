"""Images of a set with their noise, time and caption, as the network takes them.

Legend: B images of a micro-batch, N image tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.model import sampler
from posttrain.model.k2 import K2, Text
from posttrain.sft.buckets import Size
from posttrain.sft.cache import EncodedImages


@dataclass(frozen=True)
class Job:
    """An entry to noise."""

    entry: int
    n: float
    """Standard normal, which its time is made of."""
    seed: int
    """Of its noise."""
    choice: float
    """In [0, 1): which of its captions it gets."""
    dropped: bool
    """It gets the empty caption."""


@dataclass(frozen=True)
class Batch:
    """Images of one size, noised, for one forward."""

    x: Tensor
    """(B, N, C) latents at t."""
    target: Tensor
    """(B, N, C) the target velocity."""
    t: Tensor
    """(B,)"""
    text: Text
    size: Size
    dropped: int
    """How many of them have the empty caption."""
    jobs: list[int]
    """Which of the jobs that were asked for, in their order."""

    def velocity(self, k2: K2) -> Tensor:
        """(B, N, C) under the active role."""
        return k2.velocity(self.x, self.t, self.text, *self.size)


def noised(
    k2: K2, images: EncodedImages, jobs: Sequence[Job], micro_batch: int, mean: float, std: float, shift: float
) -> list[Batch]:
    """Micro-batches, each of one size. logit t = mean + std n + mu + shift, with mu that of the size's image tokens."""
    # A step's images are of one bucket, but those that an evaluation measures are of any.
    by_size: dict[Size, list[int]] = {}
    for j, job in enumerate(jobs):
        height, width = images.size[job.entry].tolist()
        by_size.setdefault((height, width), []).append(j)
    batches = []
    for size, members in by_size.items():
        for first in range(0, len(members), micro_batch):
            chosen = members[first : first + micro_batch]
            latents, texts, normals, seeds, dropped = [], [], [], [], 0
            for j in chosen:
                job = jobs[j]
                image, text = images.read(job.entry, job.choice)  # from disk
                latents.append(image)
                texts.append((images.null if job.dropped else text).to(k2.device))
                normals.append(job.n)
                seeds.append(job.seed)
                dropped += job.dropped
            x0 = torch.stack(latents).to(k2.device)
            t = sampler.logit_normal(torch.tensor(normals, device=k2.device), mean, std, k2.mu(*size) + shift)
            noise = sampler.noise(seeds, x0.shape[1:]).to(k2.device)
            x, target = sampler.noised(x0, noise, t), sampler.velocity_target(x0, noise)
            batches.append(Batch(x, target, t, Text.of(texts), size, dropped, chosen))
    return batches
